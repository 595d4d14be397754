"""What each route may answer, for `/openapi.json`: every status with its schema, and who may call it.

A route that is not in `ANSWERS` fails when the document is made, so that none is forgotten.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from device_operations.wire.json_types import FreeJson

Schema = FreeJson

#: Statuses that a submission may be refused with, in addition to those of every route.
SUBMISSION = (404, 409, 410, 413, 422, 429, 507)

#: The same below /v1, where what does not fit is a 400.
_OPENAI_SUBMISSION = (404, 409, 413, 429, 507)

#: Statuses that a job may end with whose caller waits for its bytes or its outputs.
RUN = (500, 504)

#: Statuses of every route: what cannot be read, comes too slowly, or meets a limit, a device or database that is away.
ALWAYS = (400, 408, 431, 503)

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_JOB: Schema = {"$ref": "#/components/schemas/Job"}
#: One event of a stream, as its fields.
_EVENT: Schema = {
    "type": "object", "required": ["event", "data"], "properties": {"event": _TEXT, "data": _TEXT},
}  # fmt: skip
_BYTES: Schema = {"type": "string", "format": "binary"}


def _object(*required: str, **properties: Schema) -> Schema:
    """An object with these fields, and others."""
    return {"type": "object", "required": [*required, *properties], "properties": properties}


def _list(name: str, *required: str, cursor: bool = False) -> Schema:
    """An object with a list of objects that have these fields."""
    more = {"next_cursor": {"type": ["string", "null"]}} if cursor else {}
    return _object(**{name: {"type": "array", "items": _object(*required)}}, **more)


_DEVICE = _object("device_id", "backend", "name", "epoch", "heartbeat_at", "capabilities", state=_TEXT, queued=_COUNT)
_ALLOCATION = _object("device_id", "owner", allocation_id=_TEXT, state=_TEXT, size_bytes=_COUNT)
_STANDING = _object("state", "total_bytes", "free_bytes", "budget_bytes", "by_owner", device_id=_TEXT)
_MODEL = _object("name", "version", "device_id", "inputs", "outputs", model_id=_TEXT, state=_TEXT)
_SESSION = _object("model_id", "device_id", "runs", "opened_at", session_id=_TEXT, state=_TEXT)
_TRAINING = _object("device_id", "step", "history", "checkpoints", session_id=_TEXT, state=_TEXT)
_CHECKPOINT = _object("session_id", "step", "blob_id", checkpoint_id=_TEXT)
_BLOB = _object(blob_id=_TEXT, sha256=_TEXT, size_bytes=_COUNT)
_JOBS = _object(jobs={"type": "array", "items": _JOB})
_JOB_PAGE = _object(jobs={"type": "array", "items": _JOB}, next_cursor={"type": ["string", "null"]})
_METADATA = _object("name", "versions", "inputs", "outputs")
_STATISTICS = _list("model_stats", "name", "version", "inference_count", "inference_stats")
_CONFIG = _object("name", "platform", "max_batch_size")
_READY = _object("status", "postgresql", "redis", "devices")

Answer = tuple[dict[int, tuple[str, Schema] | None], tuple[int, ...]]


def _json(status: int, schema: Schema, *refusals: int) -> Answer:
    return {status: ("application/json", schema)}, refusals


_SUBMITTED: Answer = ({200: ("application/json", _JOB), 202: ("application/json", _JOB)}, SUBMISSION)
_DONE = _json(200, {"type": "object"}, *SUBMISSION, *RUN)

_OPENAI_MODEL = _object("created", "owned_by", id=_TEXT, object={"const": "model"})
_OPENAI_USAGE = _object(prompt_tokens=_COUNT, total_tokens=_COUNT)
_EMBEDDINGS: Answer = (
    {
        200: ("application/json", _object("data", object={"const": "list"}, model=_TEXT, usage=_OPENAI_USAGE)),
        499: None,
    },
    (*_OPENAI_SUBMISSION, *RUN),
)
_IMAGES: Answer = (
    {200: ("application/json", _object("data", created=_COUNT)), 499: None}, (*_OPENAI_SUBMISSION, *RUN)
)  # fmt: skip

_READY_OR_NOT: Answer = ({200: ("application/json", {}), 503: ("application/json", {})}, (404,))
_INFERRED: Answer = (
    {200: ("application/json", _object("model_name", "outputs")), 499: None}, (*SUBMISSION, *RUN, 415)
)  # fmt: skip

#: For each route what it answers when all is well (None: no body), and its refusals besides those of every route.
ANSWERS: dict[str, Answer] = {
    "GET /healthz": _json(200, _object(status={"const": "ok"})),
    "GET /readyz": ({200: ("application/json", _READY), 503: ("application/json", _READY)}, ()),
    "GET /metrics": ({200: ("text/plain", _TEXT)}, ()),
    "GET /api/jobs": _json(200, _JOB_PAGE, 422),
    "POST /api/jobs": ({200: ("application/json", _JOBS), 202: ("application/json", _JOBS)}, SUBMISSION),
    "GET /api/jobs/{job_id}": _json(200, _JOB, 404, 422),
    "DELETE /api/jobs/{job_id}": _json(202, _JOB, 404, 409),
    "POST /api/jobs/{job_id}/retry": _SUBMITTED,
    "GET /api/jobs/{job_id}/events": ({200: ("text/event-stream", _EVENT)}, (404,)),
    "GET /api/devices": _json(200, _object(devices={"type": "array", "items": _DEVICE})),
    "GET /api/devices/{device_id}": _json(200, _DEVICE, 404),
    "POST /api/devices/{device_id}/drain": _json(200, _DEVICE, 404),
    "POST /api/devices/{device_id}/resume": _json(200, _DEVICE, 404),
    "GET /api/devices/{device_id}/samples": _json(200, _list("samples"), 404, 422),
    "GET /api/memory/status": _json(200, _object(devices={"type": "array", "items": _STANDING})),
    "GET /api/memory/device/{device_id}": _json(200, _STANDING, 404, 422),
    "POST /api/memory/allocate": _SUBMITTED,
    "DELETE /api/memory/deallocate/{allocation_id}": _SUBMITTED,
    "POST /api/memory/copy": _SUBMITTED,
    "POST /api/memory/clear/{allocation_id}": _SUBMITTED,
    "GET /api/memory/allocations": _json(200, _list("allocations", "allocation_id", "state", cursor=True), 422),
    "GET /api/memory/allocations/{allocation_id}": _json(200, _ALLOCATION, 404),
    "POST /api/memory/renew/{allocation_id}": _json(200, _ALLOCATION, 404, 410, 413, 422, 507),
    "PUT /api/memory/data/{allocation_id}": _SUBMITTED,
    "GET /api/memory/data/{allocation_id}": (
        {200: ("application/octet-stream", _BYTES), 202: ("application/json", _JOB)}, (*SUBMISSION, *RUN)
    ),
    "POST /api/inference/load-model": _SUBMITTED,
    "POST /api/inference/run": _SUBMITTED,
    "DELETE /api/inference/unload-model/{model_id}": _SUBMITTED,
    "POST /api/inference/sessions": _json(201, _SESSION, *SUBMISSION),
    "GET /api/inference/sessions": _json(200, _list("sessions", "session_id", "state"), 422),
    "GET /api/inference/status/{session_id}": _json(200, _SESSION, 404),
    "DELETE /api/inference/sessions/{session_id}": _SUBMITTED,
    "GET /api/inference/models": _json(200, _list("models", "model_id", "name", "state"), 422),
    "GET /api/inference/models/{model_id}": _json(200, _MODEL, 404),
    "POST /api/training/initialize": _SUBMITTED,
    "POST /api/training/step": _SUBMITTED,
    "GET /api/training/status/{session_id}": _json(200, _TRAINING, 404, 422),
    "POST /api/training/checkpoint": _SUBMITTED,
    "GET /api/training/checkpoints": _json(200, _list("checkpoints", "checkpoint_id", "step"), 422),
    "GET /api/training/checkpoints/{checkpoint_id}": _json(200, _CHECKPOINT, 404),
    "DELETE /api/training/checkpoints/{checkpoint_id}": ({204: None}, (404, 409)),
    "POST /api/training/validate": _SUBMITTED,
    "DELETE /api/training/session/{session_id}": _SUBMITTED,
    "POST /api/blobs": _json(201, _BLOB, 413, 422, 507),
    "GET /api/blobs/{blob_id}": (
        {200: ("application/octet-stream", _BYTES), 206: ("application/octet-stream", _BYTES)}, (404, 416)
    ),
    "HEAD /api/blobs/{blob_id}": ({200: None}, (404,)),
    "DELETE /api/blobs/{blob_id}": ({204: None}, (404, 409)),
    "GET /v1/models": _json(200, _object(object={"const": "list"}, data={"type": "array", "items": _OPENAI_MODEL})),
    "GET /v1/models/{model_name}": _json(200, _OPENAI_MODEL, 404),
    "POST /v1/embeddings": _EMBEDDINGS,
    "POST /v1/images/generations": _IMAGES,
    "GET /v2": _json(200, _object("name", "version", "extensions")),
    "GET /v2/health/live": _json(200, _object("live")),
    "GET /v2/health/ready": ({200: ("application/json", _object("ready")), 503: ("application/json", {})}, ()),
    "GET /v2/models/stats": _json(200, _STATISTICS),
    "POST /v2/repository/index": _json(200, {"type": "array", "items": _object("name", "state")}, 413),
    "POST /v2/repository/models/{model_name}/load": _DONE,
    "POST /v2/repository/models/{model_name}/unload": _DONE,
    "GET /v2/models/{model_name}": _json(200, _METADATA, 404),
    "GET /v2/models/{model_name}/ready": _READY_OR_NOT,
    "GET /v2/models/{model_name}/config": _json(200, _CONFIG, 404),
    "GET /v2/models/{model_name}/stats": _json(200, _STATISTICS, 404),
    "POST /v2/models/{model_name}/infer": _INFERRED,
    "GET /v2/models/{model_name}/versions/{model_version}": _json(200, _METADATA, 404),
    "GET /v2/models/{model_name}/versions/{model_version}/ready": _READY_OR_NOT,
    "GET /v2/models/{model_name}/versions/{model_version}/config": _json(200, _CONFIG, 404),
    "GET /v2/models/{model_name}/versions/{model_version}/stats": _json(200, _STATISTICS, 404),
    "POST /v2/models/{model_name}/versions/{model_version}/infer": _INFERRED,
}  # fmt: skip

_OPENAI_ERROR = _object(
    message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]}
)

#: Routes that need no API key.
OPEN_TO_ALL = {"/healthz", "/readyz", "/metrics", "/v2", "/v2/health/live", "/v2/health/ready"}

PROBLEM_SCHEMA: Schema = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "instance"],
    "properties": {
        "type": _TEXT, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT, "code": _TEXT,
        "instance": _TEXT, "errors": {"type": "array", "items": {"type": "object"}}, "context": {"type": "object"},
    },
}  # fmt: skip

SECURITY_SCHEMES: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


_PATHS = {
    path: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)))
    for path in sorted({route.partition(" ")[2] for route in ANSWERS})
}


def methods_at(address: str) -> list[str]:
    """The methods that the routes at this address take."""
    paths = [path for path, pattern in _PATHS.items() if pattern.fullmatch(address)]
    return sorted(method for method, _, path in (route.partition(" ") for route in ANSWERS) if path in paths)


def describe(method: str, path: str, operation: Schema) -> None:
    """Writes a route's answers and its security into its OpenAPI operation."""
    method = method.upper()
    good, refusals = ANSWERS[f"{method} {path}"]
    responses: Schema = {}
    declared = {parameter["name"] for parameter in operation.get("parameters", [])}
    operation.setdefault("parameters", []).extend(
        {"name": name, "in": "path", "required": True, "schema": _TEXT}
        for name in re.findall(r"{(\w+)}", path)
        if name not in declared
    )
    statuses = {*ALWAYS, *refusals} | (set() if path in OPEN_TO_ALL else {401, 403})
    if operation["parameters"] and not path.startswith("/v1"):
        statuses.add(422)
    for status in sorted(statuses - good.keys()):
        responses[str(status)] = _refusal(status, path)
    for status, content in good.items():
        responses[str(status)] = {"description": _phrase(status)}
        if content is not None:
            media_type, schema = content
            responses[str(status)]["content"] = {media_type: {"schema": schema}}
            if status == 503:
                refused = _refusal(503, path)["content"]
                same = refused.pop(media_type, {"schema": schema})["schema"]
                responses["503"]["content"] = {media_type: {"schema": {"anyOf": [schema, same]}}, **refused}
    operation["responses"] = dict(sorted(responses.items()))
    if path not in OPEN_TO_ALL:
        operation["security"] = [{name: []} for name in SECURITY_SCHEMES]


def _refusal(status: int, path: str) -> Schema:
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    content: Schema = {"application/problem+json": problem}
    if path.startswith(("/v1", "/v2")):
        # What the connection itself refuses is a problem there too.
        own = {"schema": _object(error=_TEXT if path.startswith("/v2") else _OPENAI_ERROR)}
        content = {"application/json": own, **(content if status in ALWAYS else {})}
    refusal: Schema = {"description": _phrase(status), "content": content}
    if status in (429, 503):
        refusal["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
    if status == 401 and not path.startswith(("/v1", "/v2")):
        refusal["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return refusal


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase
