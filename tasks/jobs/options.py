"""What the caller of a job asked for: kept with the stored request, shown again, and submitted again.

request ─▶ kept with the job ─▶ as_asked: in the request's own terms, without what planning added ─▶ to_retry

Requests that carry tensors keep only the names of their fields, since the tensors lie in the stored request: as they
came up to 64 KiB, else as blobs.
"""

from __future__ import annotations

from collections.abc import Callable

from device_operations.errors import failure
from device_operations.jobs import Kind, State
from device_operations.requests.base import JobRequest
from device_operations.requests.kinds import REQUESTS
from device_operations.tensors import TEXT_DTYPES, Tensor
from device_operations.wire.json_text import loads
from device_operations.wire.json_types import FreeJson, JsonObject
from device_operations.wire.texts import unpack_texts
from tasks.jobs.model import AskedRow

#: Where a tensor's elements are.
_SOURCES = ("data", "base64", "blob_id", "allocation_id")


def asked_of(request: JobRequest) -> FreeJson:
    """What is kept of a checked request: just what its caller gave, no defaults."""
    kept: FreeJson
    if request.carries_tensors:
        kept = {"fields": sorted(request.model_fields_set - {"job"})}
    else:
        kept = {"request": request.model_dump(mode="json", exclude={"job"}, exclude_unset=True)}
    if request.job.model_fields_set:
        kept["job"] = request.job.model_dump(mode="json", exclude_unset=True)
    return kept


def as_asked(job: AskedRow) -> FreeJson:
    """The request of a job as its caller gave it; `job` has the stored request and what was kept with it."""
    stored, kept = job["request"], job["asked"]
    if kept is None:
        kept = {"fields": _known_fields(Kind(job["kind"]), stored)}
    given = kept.get("request")
    if given is None:
        given = {name: _tensors_as_asked(stored[name]) for name in kept["fields"] if name in stored}
    return {**given, "job": kept["job"]} if "job" in kept else dict(given)


def to_retry(job: AskedRow, changes: FreeJson, read_blob: Callable[[str], memoryview]) -> FreeJson:
    """The request that tries an ended job again, with the fields of `changes` in place of the first ones.

    A field that is null is left out; `job` is changed option by option. What is made gets a new id, except for an
    allocation whose id the caller chose and whose job did not succeed. Raises `sequence_conflict` for a step that was
    applied under the number that it was given, `blob_not_found` where its tensors are not kept.
    """
    asked = as_asked(job)
    chosen = REQUESTS[Kind(job["kind"])].chosen_id
    if chosen is not None and job["state"] == State.SUCCEEDED:
        # The id is taken by what the first job made; one that failed has left it free.
        asked.pop(chosen, None)
    options = {**asked.pop("job", {}), **(changes.get("job") or {})}
    request = {**asked, **{name: value for name, value in changes.items() if name != "job"}}
    request = {name: value for name, value in request.items() if value is not None}
    if options:
        request["job"] = {name: value for name, value in options.items() if value is not None}
    if job["state"] == State.SUCCEEDED and "sequence" not in changes and request.get("sequence") is not None:
        raise failure(
            "sequence_conflict",
            f"step {request['sequence']} was applied by job {job['id']}; give another sequence, or null for the next",
        )
    kept = {name: value for name, value in request.items() if name not in changes}
    return {**request, **{name: _sendable(value, job["id"], read_blob) for name, value in kept.items()}}


def _known_fields(kind: Kind, stored: FreeJson) -> list[str]:
    """The fields that the request's model knows, for a job of which nothing was kept: it came over /v2, or long ago."""
    known = [name for name in REQUESTS[kind].model_fields if name in stored]
    resolved = {"model_id"} if {"model_name", "session_id"} & set(known) else set()
    if stored.get("form") == "transient":
        resolved.add("form")
    return [name for name in known if name not in resolved]


def _is_tensor(value: JsonObject) -> bool:
    return "dtype" in value and "shape" in value


def _tensors_as_asked(value: object) -> object:
    """The value without what planning added to its tensors."""
    if isinstance(value, list):
        return [_tensors_as_asked(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if _is_tensor(value):
        # One that came over /v2 is gone once its run has ended; where it lay is not shown.
        kept = Tensor.model_fields if any(source in value for source in _SOURCES) else ("dtype", "shape")
        return {name: inner for name, inner in value.items() if name in kept}
    return {name: _tensors_as_asked(inner) for name, inner in value.items()}


def _sendable(value: object, job_id: str, read_blob: Callable[[str], memoryview]) -> object:
    """The value with tensors that can be sent again: text above 64 KiB, which lies in a blob, is read from there."""
    if not isinstance(value, dict):
        return value
    if not _is_tensor(value):
        return {name: _sendable(inner, job_id, read_blob) for name, inner in value.items()}
    if not any(value.get(source) is not None for source in _SOURCES):
        raise failure("blob_not_found", f"the tensors of job {job_id} came over /v2 and are not kept; give them anew")
    if value["dtype"] in TEXT_DTYPES and value.get("blob_id"):
        count = 1
        for side in value["shape"]:
            count *= side
        texts = unpack_texts(read_blob(value["blob_id"]), count)
        data = [loads(text, anywhere=True) for text in texts] if value["dtype"] == "json" else texts
        return {"dtype": value["dtype"], "shape": value["shape"], "data": data}
    return value
