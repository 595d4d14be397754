"""Jobs over HTTP: submit, wait, list, follow, cancel. Every method that makes a job goes through `submission`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import httpx

from device_operations.client.transport.calls import Call, Content, Emit, Flow, Sleep, at, get, json_of, next_line, send
from device_operations.client.transport.operations import Mode, Noun, emits, operation
from device_operations.errors import error_of, failure, from_job_error
from device_operations.jobs import Job, Kind, State
from device_operations.json_text import JsonObject
from device_operations.requests.base import JobOptions, JobRequest
from device_operations.requests.kinds import parse

#: The longest that the gateway lets one request wait, in seconds.
MAX_WAIT_SECONDS = 60.0

#: A wait outlives a gateway that is restarted: about a minute without any answer.
PATIENT_RETRIES = 30

#: Where each kind is submitted; in braces, a field of the request that is part of the address. A `?` separates fields
#: that go into the query. What has no route of its own, and what a route cannot say, goes to `POST /api/jobs`.
_ROUTES: dict[Kind, str] = {
    Kind.MEMORY_ALLOCATE: "POST /api/memory/allocate",
    Kind.MEMORY_DEALLOCATE: "DELETE /api/memory/deallocate/{allocation_id}",
    Kind.MEMORY_COPY: "POST /api/memory/copy",
    Kind.MEMORY_CLEAR: "POST /api/memory/clear/{allocation_id}",
    Kind.INFERENCE_LOAD_MODEL: "POST /api/inference/load-model",
    Kind.INFERENCE_RUN: "POST /api/inference/run",
    Kind.INFERENCE_UNLOAD_MODEL: "DELETE /api/inference/unload-model/{model_id}?force,recycle",
    Kind.INFERENCE_CLOSE_SESSION: "DELETE /api/inference/sessions/{session_id}",
    Kind.TRAINING_INITIALIZE: "POST /api/training/initialize",
    Kind.TRAINING_STEP: "POST /api/training/step",
    Kind.TRAINING_CHECKPOINT: "POST /api/training/checkpoint",
    Kind.TRAINING_VALIDATE: "POST /api/training/validate",
    Kind.TRAINING_END_SESSION: "DELETE /api/training/session/{session_id}?checkpoint",
}


class Submission(TypedDict, total=False):
    """What every method takes that makes a job.

    `job`: options for the job. `idempotency_key`: one of the caller's own, so that the same
    submission from another process is the same job. `wait`: seconds to wait for the end; the job comes back as it
    stands then, failed ones too: `result(job)` raises.
    """

    job: JobOptions | Mapping[str, object]
    idempotency_key: str
    wait: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job: `state`, `progress`, and at last `done`; `data` is the job, or its progress."""

    name: str
    data: JsonObject


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
        entries = [{"kind": str(Kind(kind)), "request": _body(_checked(kind, request, None))} for kind, request in jobs]
        return (yield from _bulk(entries, idempotency_key, wait))

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
                headers=_headers(idempotency_key, wait),
                waits_seconds=min(wait, MAX_WAIT_SECONDS),
                keyed=True,
            )
        )
        return (yield from _until(Job.model_validate_json(response.content), deadline))

    @operation
    def request_of(self, job: Job | str) -> Flow[JsonObject]:
        """What a job was asked to do, as its caller gave it; tensors above 64 KiB in it are blobs."""
        told = yield from get(at("/api/jobs/{}", job_id_of(job)), include="request")
        request: JsonObject = told["request"]
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
    def result(self, job: Job | str, timeout: float | None = None) -> Flow[JsonObject]:
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
        raise failure("gateway_unreachable", f"GET {path}: the stream broke off {failures} times and told nothing")

    @operation
    def ready(self) -> Flow[JsonObject]:
        """What `/readyz` says: `status` is `ready` or `not ready`, with each part's state beside it."""
        response = yield from send(Call("GET", "/readyz", accepts=frozenset({503})))
        return json_of(response)


def submission(kind: Kind | str, request: JobRequest | Mapping[str, object], given: Submission) -> Flow[Job]:
    """Checks, sends, and waits where asked to. Raises what the gateway refuses with."""
    kind = Kind(kind)
    checked = _checked(kind, request, given.get("job"))
    wait = given.get("wait", 0)
    deadline = time.monotonic() + wait
    call = _call(kind, _body(checked), given.get("idempotency_key"), wait)
    if call is None:
        entry = {"kind": str(kind), "request": _body(checked)}
        job = (yield from _bulk([entry], given.get("idempotency_key"), wait))[0]
    else:
        response = yield from send(call)
        job = Job.model_validate_json(response.content)
    return (yield from _until(job, deadline))


def submission_of_bytes(path: str, params: Mapping[str, object], content: Content, given: Submission) -> Flow[Job]:
    """The same for a request whose body is raw bytes."""
    wait = given.get("wait", 0)
    deadline = time.monotonic() + wait
    headers = _headers(given.get("idempotency_key"), wait)
    response = yield from send(
        Call(
            "PUT", path, params, content=content, headers=headers, waits_seconds=min(wait, MAX_WAIT_SECONDS), keyed=True
        )
    )
    return (yield from _until(Job.model_validate_json(response.content), deadline))


def read(job_id: str, wait: float = 0) -> Flow[Job]:
    """One read of a job, which waits for up to 60 seconds."""
    wait = max(0.0, min(wait, MAX_WAIT_SECONDS))
    response = yield from send(
        Call(
            "GET",
            at("/api/jobs/{}", job_id),
            {"wait": f"{wait:g}"} if wait else {},
            waits_seconds=wait,
            retries=PATIENT_RETRIES if wait else None,
        )
    )
    return Job.model_validate_json(response.content)


def ended(job: Job | str, timeout_seconds: float | None) -> Flow[Job]:
    """The job in its terminal state, or `TimeoutError`."""
    if isinstance(job, Job) and job.terminal:
        return job
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        left = MAX_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
        found = yield from read(job_id_of(job), left)
        if found.terminal:
            return found
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(
                f"job {found.job_id} ({found.kind}) is {found.state} after timeout = {timeout_seconds:g} s"
            )


def succeeded(job: Job | str, timeout_seconds: float | None) -> Flow[JsonObject]:
    """The job's result, or its error raised."""
    found = yield from ended(job, timeout_seconds)
    return result_of(found)


def result_of(job: Job) -> JsonObject:
    """The result of a job that has ended; raises its error where it did not succeed."""
    if job.state is State.SUCCEEDED:
        return job.result or {}
    error = from_job_error(error_of(job.error, job.state, "the job"))
    error.add_note(f"job {job.job_id} ({job.kind}) {job.state}")
    raise error


def job_id_of(job: Job | str) -> str:
    """A job's id, given the job or the id."""
    return job.job_id if isinstance(job, Job) else job


def said(**fields: object) -> JsonObject:
    """The fields that were given: those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _checked(
    kind: Kind | str, request: JobRequest | Mapping[str, object], options: JobOptions | Mapping[str, object] | None
) -> JobRequest:
    """The request as its kind's type, with the options in it."""
    fields = request.model_dump(mode="json", exclude_unset=True) if isinstance(request, JobRequest) else dict(request)
    if options is not None:
        fields["job"] = options
    return parse(Kind(kind), fields)


def _body(request: JobRequest) -> JsonObject:
    """What was said, and no defaults: those are the gateway's, which may be newer than this client."""
    return request.model_dump(mode="json", exclude_unset=True)


def _call(kind: Kind, body: JsonObject, key: str | None, wait: float) -> Call | None:
    """The call on the kind's own route, or None where it has none that can say all this."""
    method, _, address = _ROUTES.get(kind, "").partition(" ")
    path, _, query = address.partition("?")
    named = {name: body[name] for name in body if f"{{{name}}}" in path}
    params = {name: body[name] for name in query.split(",") if name in body}
    rest = {name: value for name, value in body.items() if name not in named and name not in params}
    if not method or (method == "DELETE" and rest):
        return None
    for name, value in named.items():
        path = at(path.replace(f"{{{name}}}", "{}"), value)
    return Call(
        method,
        path,
        params,
        json=None if method == "DELETE" else rest,
        headers=_headers(key, wait),
        waits_seconds=min(wait, MAX_WAIT_SECONDS),
        keyed=True,
    )


def _until(job: Job, deadline: float) -> Flow[Job]:
    while not job.terminal and (left := deadline - time.monotonic()) > 0:
        job = yield from read(job.job_id, left)
    return job


def _headers(key: str | None, wait: float) -> dict[str, str]:
    preferred = {"Prefer": f"wait={min(wait, MAX_WAIT_SECONDS):g}"} if wait > 0 else {}
    return preferred | ({"Idempotency-Key": key} if key else {})


def _bulk(entries: list[JsonObject], key: str | None, wait: float = 0) -> Flow[list[Job]]:
    response = yield from send(
        Call(
            "POST",
            "/api/jobs",
            json={"jobs": entries},
            headers=_headers(key, wait),
            waits_seconds=min(wait, MAX_WAIT_SECONDS),
            keyed=True,
        )
    )
    return [Job.model_validate(entry) for entry in response.json()["jobs"]]
