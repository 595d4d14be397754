"""Jobs over HTTP: submit, wait, list, follow, cancel."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import httpx

from device_operations.client.submission import (
    MAX_WAIT_SECONDS,
    PATIENT_RETRIES,
    Submission,
    body_of,
    bulk,
    checked_request,
    ended,
    job_id_of,
    read,
    submission,
    submission_headers,
    succeeded,
    until_deadline,
)
from device_operations.client.transport.calls import Call, Emit, Flow, Sleep, at, get, json_of, next_line, send
from device_operations.client.transport.operations import Mode, Noun, emits, operation
from device_operations.errors import failure
from device_operations.jobs import Job, Kind, State
from device_operations.requests.base import JobOptions, JobRequest
from device_operations.wire.json_types import FreeJson


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job: `state`, `progress`, and at last `done`; `data` is the job, or its progress."""

    name: str
    data: FreeJson


class Jobs(Noun[Mode]):
    """The methods on jobs, which both clients have themselves."""

    @operation
    def submit(
        self,
        kind: Kind | str,
        request: JobRequest | Mapping[str, object],
        *,
        job: JobOptions | Mapping[str, object] | None = None,
        idempotency_key: str | None = None,
        wait: float = 0,
    ) -> Flow[Job]:
        """Submits a job of any kind: `submit("memory.clear", {"allocation_id": …})`.

        Raises `validation_failed` before anything is sent where the request does not fit its kind.
        """
        given: Submission = {"wait": wait}
        if job is not None:
            given["job"] = job
        if idempotency_key is not None:
            given["idempotency_key"] = idempotency_key
        return (yield from submission(kind, request, given))

    @operation
    def submit_many(
        self,
        jobs: Iterable[tuple[Kind | str, JobRequest | Mapping[str, object]]],
        *,
        idempotency_key: str | None = None,
        wait: float = 0,
    ) -> Flow[list[Job]]:
        """Submits 1 to 1,000 jobs at once: all are recorded, or none. Options go into each request's `job`.

        With `wait`, they come back as they stand once all have ended, or after so many seconds (60 at most).
        """
        entries = [
            {"kind": str(Kind(kind)), "request": body_of(checked_request(kind, request, None))}
            for kind, request in jobs
        ]
        return (yield from bulk(entries, idempotency_key, wait))

    @operation
    def retry(
        self,
        job: Job | str,
        changes: Mapping[str, object] | None = None,
        *,
        idempotency_key: str | None = None,
        wait: float = 0,
    ) -> Flow[Job]:
        """Submits an ended job again as a new one, which names it in `retried_from`.

        `changes` are fields of the request to replace; None leaves one out, `job` is changed option by option. Raises
        `job_not_finished` where it has not ended.
        """
        deadline = time.monotonic() + wait
        response = yield from send(
            Call(
                "POST",
                at("/api/jobs/{}/retry", job_id_of(job)),
                json=dict(changes or {}),
                headers=submission_headers(idempotency_key, wait),
                waits_seconds=min(wait, MAX_WAIT_SECONDS),
                keyed=True,
            )
        )
        return (yield from until_deadline(Job.model_validate_json(response.content), deadline))

    @operation
    def request_of(self, job: Job | str) -> Flow[FreeJson]:
        """A job's request, as its caller gave it; tensors above 64 KiB in it are blobs."""
        answer = yield from get(at("/api/jobs/{}", job_id_of(job)), include="request")
        request: FreeJson = answer["request"]
        return request

    @operation
    def job(self, job: Job | str, *, wait: float = 0) -> Flow[Job]:
        """The job as it stands, or after at most `wait` seconds (0 to 60) as soon as it has ended."""
        return (yield from read(job_id_of(job), wait))

    @emits(Job)
    def jobs(
        self,
        *,
        state: State | str | None = None,
        kind: Kind | str | None = None,
        device_id: str | None = None,
        owner: str | None = None,
        label: str | None = None,
        limit: int | None = None,
    ) -> Flow[None]:
        """Jobs newest first, at most `limit`, read page by page; `label` is `name:value`."""
        cursor, left = None, limit
        while left is None or left > 0:
            page = yield from get(
                "/api/jobs",
                state=state,
                kind=kind,
                device_id=device_id,
                owner=owner,
                label=label,
                limit=100 if left is None else min(left, 1000),
                cursor=cursor,
            )
            for entry in page["jobs"]:
                yield Emit(Job.model_validate(entry))
            cursor = page["next_cursor"]
            left = None if left is None else left - len(page["jobs"])
            if cursor is None:
                return

    @operation
    def cancel(self, job: Job | str) -> Flow[Job]:
        """Asks for cancellation: a queued job never starts, a running one stops soon.

        Raises `job_finished` where it has ended already.
        """
        response = yield from send(Call("DELETE", at("/api/jobs/{}", job_id_of(job))))
        return Job.model_validate_json(response.content)

    @operation
    def wait(self, job: Job | str, timeout: float | None = None) -> Flow[Job]:
        """The job once it has ended, however. Raises `TimeoutError` where that takes over `timeout` seconds."""
        return (yield from ended(job, timeout))

    @operation
    def result(self, job: Job | str, timeout: float | None = None) -> Flow[FreeJson]:
        """Waits for the job's result. Raises the job's error, `TimeoutError` after `timeout` seconds."""
        return (yield from succeeded(job, timeout))

    @emits(Event)
    def events(self, job: Job | str) -> Flow[None]:
        """Follows a job until it has ended; a broken connection is made again, beginning with the state of then."""
        path = at("/api/jobs/{}/events", job_id_of(job))
        failures = 0
        while failures <= PATIENT_RETRIES:
            try:
                response = yield from send(
                    Call("GET", path, stream=str, waits_seconds=MAX_WAIT_SECONDS, retries=PATIENT_RETRIES)
                )
                name = ""
                while (line := (yield from next_line(response))) is not None:
                    field, _, value = line.partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        failures = 0
                        yield Emit(Event(name, json.loads(value)))
                        if name == "done":
                            return
            except httpx.TransportError:
                pass  # The job goes on without us; the next connection begins with where it stands.
            failures += 1
            yield Sleep(min(2.0, 0.1 * 2**failures))
        raise failure("gateway_unreachable", f"GET {path}: the stream broke off {failures} times without an event")

    @operation
    def ready(self) -> Flow[FreeJson]:
        """What `/readyz` says: `status` is `ready` or `not ready`, with each part's state."""
        response = yield from send(Call("GET", "/readyz", accepts=frozenset({503})))
        return json_of(response)
