"""How every method that makes a job submits it, and how the client waits for a job's end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypedDict

from device_operations.client.transport.calls import Call, Content, Flow, at, send
from device_operations.errors import error_of, from_job_error
from device_operations.jobs import Job, Kind, State
from device_operations.requests.base import JobOptions, JobRequest
from device_operations.requests.kinds import parse
from device_operations.wire.json_types import FreeJson

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

    `job`: options for the job. `idempotency_key`: one of the caller's own, so that the same submission from another
    process is the same job. `wait`: seconds to wait for the end; the job comes back as it stands then, failed ones
    too: `result(job)` raises.
    """

    job: JobOptions | Mapping[str, object]
    idempotency_key: str
    wait: float


def submission(kind: Kind | str, request: JobRequest | Mapping[str, object], given: Submission) -> Flow[Job]:
    """Checks, sends, and waits if the submission says so. Raises what the gateway refuses with."""
    kind = Kind(kind)
    checked = checked_request(kind, request, given.get("job"))
    wait = given.get("wait", 0)
    deadline = time.monotonic() + wait
    call = _call(kind, body_of(checked), given.get("idempotency_key"), wait)
    if call is None:
        entry = {"kind": str(kind), "request": body_of(checked)}
        job = (yield from bulk([entry], given.get("idempotency_key"), wait))[0]
    else:
        response = yield from send(call)
        job = Job.model_validate_json(response.content)
    return (yield from until_deadline(job, deadline))


def submission_of_bytes(path: str, params: Mapping[str, object], content: Content, given: Submission) -> Flow[Job]:
    """The same for a request whose body is raw bytes."""
    wait = given.get("wait", 0)
    deadline = time.monotonic() + wait
    headers = submission_headers(given.get("idempotency_key"), wait)
    response = yield from send(
        Call(
            "PUT", path, params, content=content, headers=headers, waits_seconds=min(wait, MAX_WAIT_SECONDS), keyed=True
        )
    )
    return (yield from until_deadline(Job.model_validate_json(response.content), deadline))


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


def succeeded(job: Job | str, timeout_seconds: float | None) -> Flow[FreeJson]:
    """The job's result, or its error raised."""
    found = yield from ended(job, timeout_seconds)
    return result_of(found)


def result_of(job: Job) -> FreeJson:
    """The result of a job that has ended; raises its error where it did not succeed."""
    if job.state is State.SUCCEEDED:
        return job.result or {}
    error = from_job_error(error_of(job.error, job.state, "the job"))
    error.add_note(f"job {job.job_id} ({job.kind}) {job.state}")
    raise error


def job_id_of(job: Job | str) -> str:
    """A job's id, given the job or the id."""
    return job.job_id if isinstance(job, Job) else job


def said(**fields: object) -> dict[str, object]:
    """The fields that were given: those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def checked_request(
    kind: Kind | str, request: JobRequest | Mapping[str, object], options: JobOptions | Mapping[str, object] | None
) -> JobRequest:
    """The request as its kind's type, with the options in it."""
    fields = request.model_dump(mode="json", exclude_unset=True) if isinstance(request, JobRequest) else dict(request)
    if options is not None:
        fields["job"] = options
    return parse(Kind(kind), fields)


def body_of(request: JobRequest) -> dict[str, object]:
    """What was said, and no defaults: those are the gateway's, which may be newer than this client."""
    return request.model_dump(mode="json", exclude_unset=True)


def _call(kind: Kind, body: FreeJson, key: str | None, wait: float) -> Call | None:
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
        headers=submission_headers(key, wait),
        waits_seconds=min(wait, MAX_WAIT_SECONDS),
        keyed=True,
    )


def until_deadline(job: Job, deadline: float) -> Flow[Job]:
    """The job once it has ended, or as it stands at a time of `time.monotonic`."""
    while not job.terminal and (left := deadline - time.monotonic()) > 0:
        job = yield from read(job.job_id, left)
    return job


def submission_headers(key: str | None, wait: float) -> dict[str, str]:
    """The headers of a submission: how long it waits, and its Idempotency-Key."""
    preferred = {"Prefer": f"wait={min(wait, MAX_WAIT_SECONDS):g}"} if wait > 0 else {}
    return preferred | ({"Idempotency-Key": key} if key else {})


def bulk(entries: list[FreeJson], key: str | None, wait: float = 0) -> Flow[list[Job]]:
    """Submits several jobs at once."""
    response = yield from send(
        Call(
            "POST",
            "/api/jobs",
            json={"jobs": entries},
            headers=submission_headers(key, wait),
            waits_seconds=min(wait, MAX_WAIT_SECONDS),
            keyed=True,
        )
    )
    return [Job.model_validate(entry) for entry in response.json()["jobs"]]
