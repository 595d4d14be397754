"""Every place of the API that takes an id or a name of something owned, found in the OpenAPI document.

A place is a parameter of an address, of a query, or a field of a body; `POST /api/jobs` has those of every kind. What is
found and not known here is for the tests to complain of: so a new route, parameter or field is either walked or said to
name nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from device_operations.jobs import Kind
from device_operations.requests.kinds import requests_of

#: What each name of a parameter or field stands for; `session` is a training session's or an inference session's.
NOUNS = {
    "job_id": "job",
    "after": "job",
    "allocation_id": "allocation",
    "blob_id": "blob",
    "blobs": "blob",
    "model_id": "model",
    "model_name": "model name",
    "model": "model name",
    "session_id": "session",
    "sequence_id": "inference session",
    "checkpoint_id": "checkpoint",
    "resume_from": "checkpoint",
}

#: Parameters and fields of text that name nothing owned.
FREE = {
    # devices, and what filters and pages lists, which `test_lists.py` looks at
    "device_id", "owner", "state", "kind", "label", "cursor", "since", "model_version",
    # how a request is carried out
    "limit", "wait", "include", "map", "offset", "size_bytes", "force", "recycle", "history", "checkpoint", "webhook_url", "labels",
    # content, and the caller's own names for what is made
    "prompt", "negative_prompt", "sha256", "dtype", "data", "base64", "shape", "name", "version", "model_type", "path", "outputs", "output",
    # a model's own parts: inputs and outputs, layers, parameters
    "layers", "targets", "trainable",
    # links to a blob, and what OpenAI's clients say of texts and images
    "expires", "signature", "input", "texts", "size", "scheduler", "quality", "style", "moderation", "user",
}  # fmt: skip

#: Routes that name nothing owned: what is on the service as a whole, and what makes or lists things.
NAMES_NOTHING = {
    "GET /healthz", "GET /readyz", "GET /metrics",
    "GET /api/jobs",
    "GET /api/devices", "GET /api/devices/{device_id}", "GET /api/devices/{device_id}/samples",
    "POST /api/devices/{device_id}/drain", "POST /api/devices/{device_id}/resume",
    "GET /api/memory/status", "GET /api/memory/device/{device_id}", "GET /api/memory/allocations",
    "GET /api/inference/sessions", "GET /api/inference/models",
    "POST /api/blobs",
    "GET /v1/models",
    "GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "GET /v2/models/stats", "POST /v2/repository/index",
}  # fmt: skip

#: Bodies that the document does not describe: the places in each that name something owned.
UNDESCRIBED: dict[str, list[tuple[str, ...]]] = {
    "DELETE /api/jobs/{job_id}": [],
    "POST /api/jobs/{job_id}/retry": [],
    "POST /api/devices/{device_id}/drain": [],
    "POST /api/devices/{device_id}/resume": [],
    "DELETE /api/memory/deallocate/{allocation_id}": [("job", "after", "[]")],
    "PUT /api/memory/data/{allocation_id}": [],
    "DELETE /api/inference/unload-model/{model_id}": [],
    "DELETE /api/inference/sessions/{session_id}": [],
    "DELETE /api/training/checkpoints/{checkpoint_id}": [],
    "DELETE /api/training/session/{session_id}": [("job", "after", "[]")],
    "POST /api/blobs": [],
    "DELETE /api/blobs/{blob_id}": [],
    "POST /v2/repository/index": [],
    "POST /v2/repository/models/{model_name}/load": [],
    "POST /v2/repository/models/{model_name}/unload": [],
    "POST /v2/models/{model_name}/infer": [("parameters", "sequence_id")],
    "POST /v2/models/{model_name}/versions/{model_version}/infer": [("parameters", "sequence_id")],
}

#: The bulk form, whose requests are those of every kind.
BULK = "POST /api/jobs"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one id or name goes: `path`, `query` or `body`; `keys` lead to it in a body ("{}" and "[]" for any entry).

    `request` is the name of the body's schema, "" where it has none; `kind` is set in the bulk form.
    """

    route: str
    where: str
    keys: tuple[str, ...]
    noun: str
    request: str = ""
    kind: str | None = None

    def __str__(self) -> str:
        return f"{self.kind or self.route} {self.where} {'.'.join(self.keys)}"


def routes(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each route of the document, as `GET /api/jobs`, with what the document says of it."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"{method.upper()} {path}", operation


def find(document: dict[str, Any]) -> list[Place]:
    """Every place in the document that names something owned."""
    found = []
    for route, operation in routes(document):
        given = _parameters(route, operation)
        own = [Place(route, where, (name,), _noun(route, name)) for where, name in given if name in NOUNS]
        in_address = {name for where, name in given if where == "path"}
        found += own
        # The bulk form's entries are those of every kind, below.
        for request, keys in _bodies(document, route, operation) if route != BULK else ():
            # What the address names too is the same place.
            if _name(keys) in NOUNS and _name(keys) not in in_address:
                found.append(Place(route, "body", keys, _noun(request or route, _name(keys)), request))
    for kind in Kind:
        for request in requests_of(kind):
            schema = request.model_json_schema()
            for keys in _fields(schema, schema.get("$defs", {})):
                if _name(keys) in NOUNS:
                    noun = _noun(kind.value, _name(keys))
                    found.append(Place(BULK, "body", keys, noun, request.__name__, kind.value))
    return list(dict.fromkeys(found))


def complaints(document: dict[str, Any]) -> list[str]:
    """What the document has that is not covered: routes, parameters, fields, bodies without a description."""
    walked = {place.route for place in find(document)}
    known = NOUNS.keys() | FREE
    lines = []
    for route, operation in routes(document):
        if route in walked and route in NAMES_NOTHING:
            lines.append(f"{route} is said to name nothing, and does")
        if route not in walked and route not in NAMES_NOTHING:
            lines.append(f"{route} names nothing that is known: add its parameter to NOUNS, or it to NAMES_NOTHING")
        for _, name in _parameters(route, operation):
            if name not in known:
                lines.append(f"{route}: is the parameter {name} an id? add it to NOUNS or FREE")
        if not route.startswith(("GET ", "HEAD ")) and _schema(operation) is None and route not in UNDESCRIBED:
            lines.append(f"{route}: its body is not described; add it to UNDESCRIBED")
        for _, keys in _bodies(document, route, operation):
            if _name(keys) not in known:
                lines.append(f"{route}: is the field {'.'.join(keys)} an id? add its name to NOUNS or FREE")
    for kind in Kind:
        schemas = [request.model_json_schema() for request in requests_of(kind)]
        lines += [
            f"{kind.value}: is the field {'.'.join(keys)} an id? add its name to NOUNS or FREE"
            for schema in schemas
            for keys in _fields(schema, schema.get("$defs", {}))
            if _name(keys) not in known
        ]
    there = {route for route, _ in routes(document)}
    lines += [f"{route} is gone" for route in sorted((NAMES_NOTHING | UNDESCRIBED.keys()) - there)]
    return lines


def _noun(where: str, name: str) -> str:
    """The noun that a name stands for on a route, in a kind or in a request."""
    noun = NOUNS[name]
    if noun != "session":
        return noun
    trains = re.search(r"training|^(Step|Checkpoint|Validate|EndSession)$", where)
    return "training session" if trains else "inference session"


def _parameters(route: str, operation: dict[str, Any]) -> list[tuple[str, str]]:
    """Where each of a route's parameters is, and its name: those of its address too that it reads without saying so."""
    described = [(one["in"], one["name"]) for one in operation.get("parameters", []) if one["in"] != "header"]
    return described + [("path", name) for name in re.findall(r"{(\w+)}", route) if ("path", name) not in described]


def _schema(operation: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the operation's JSON body, or None."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema: dict[str, Any] | None = content.get("schema")
    return schema


def _bodies(document: dict[str, Any], route: str, operation: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fields of a route's body that may hold text, each with the name of the body's schema."""
    yield from (("", keys) for keys in UNDESCRIBED.get(route, []))
    schema = _schema(operation)
    for way in [] if schema is None else schema.get("anyOf", [schema]) if "$ref" not in schema else [schema]:
        request = way.get("$ref", "").rpartition("/")[2]
        yield from ((request, keys) for keys in _fields(way, document["components"]["schemas"]))


def _fields(schema: dict[str, Any], named: dict[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The ways to every field that may hold text which is not one of a few words."""
    if "$ref" in schema:
        schema = named[schema["$ref"].rpartition("/")[2]]
    ways = [way for word in ("anyOf", "oneOf", "allOf") for way in schema.get(word, [])]
    if ways:
        for way in ways:
            yield from _fields(way, named, keys)
        return
    if "properties" in schema:
        for name, inner in schema["properties"].items():
            yield from _fields(inner, named, (*keys, name))
        return
    kind = schema.get("type")
    if kind == "object":
        if isinstance(schema.get("additionalProperties"), dict):
            yield from _fields(schema["additionalProperties"], named, (*keys, "{}"))
    elif kind == "array":
        for inner in schema.get("prefixItems", [schema.get("items", {})]):
            yield from _fields(inner, named, (*keys, "[]"))
    elif (kind == "string" and "enum" not in schema and "const" not in schema) or kind is None:
        yield keys


def _name(keys: tuple[str, ...]) -> str:
    return next(key for key in reversed(keys) if key not in ("{}", "[]"))
