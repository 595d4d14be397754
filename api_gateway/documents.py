"""What `/openapi.json` says: the requests' own schemas with an example that works, and each route's `answers`."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

from api_gateway import answers
from api_gateway.openai import requests as openai
from device_operations.jobs import Kind
from device_operations.requests import inference, memory, training
from device_operations.requests.kinds import REQUESTS, requests_of

_TENSOR = {"dtype": "float32", "shape": [1, 2], "data": [[1.0, 2.0]]}

#: For each body: the request's model, and an example.
BODIES: dict[str, tuple[type[BaseModel], dict[str, object]]] = {
    "load_model": (
        inference.LoadModel,
        {"name": "minilm", "source": {"path": "minilm/model.onnx"}, "options": {"max_batch_size": 16}},
    ),
    "run": (inference.Run, {"model_name": "minilm", "inputs": {"x": _TENSOR}, "job": {"priority": 7}}),
    "open_session": (inference.OpenSession, {"model_name": "counter", "state": {"hidden_out": "hidden_in"}}),
    "allocate": (memory.Allocate, {"size_bytes": 1048576, "fill": 0, "label": "scratch"}),
    "copy": (
        memory.Copy,
        {"source": {"allocation_id": "a"}, "destination": {"allocation_id": "b", "offset": 0}, "size_bytes": 4096},
    ),
    "clear": (memory.Clear, {"value": 255, "offset": 0, "size_bytes": 4096}),
    "renew": (memory.Renew, {"ttl_seconds": 3600}),
    "initialize": (
        training.Initialize,
        {
            "model": {"kind": "layers", "layers": [{"type": "linear", "in_features": 2, "out_features": 1}]},
            "loss": "mse",
            "optimizer": {"type": "adam", "learning_rate": 0.01},
        },
    ),
    "step": (
        training.Step,
        {
            "session_id": "…",
            "sequence": 1,
            "inputs": {"input": _TENSOR},
            "targets": {"dtype": "float32", "shape": [1, 1], "data": [[1.0]]},
        },
    ),
    "checkpoint": (training.Checkpoint, {"session_id": "…", "name": "after-warm-up"}),
    "validate": (
        training.Validate,
        {
            "session_id": "…",
            "inputs": {"input": _TENSOR},
            "targets": {"dtype": "float32", "shape": [1, 1], "data": [[1.0]]},
        },
    ),
    "embeddings": (openai.EmbeddingsRequest, {"model": "minilm", "input": ["a first text", "a second one"]}),
    "images": (
        openai.ImagesRequest,
        {"model": "sdxl", "prompt": "a lighthouse at dusk", "size": "1024x1024", "seed": 7},
    ),
}

_BULK_SCHEMA: dict[str, object] = {
    "type": "object",
    "required": ["jobs"],
    "properties": {
        "jobs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1000,
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "required": ["kind", "request"],
                        "properties": {
                            "kind": {"const": kind.value},
                            "request": {"$ref": f"#/components/schemas/{model.__name__}"},
                        },
                        "additionalProperties": False,
                    }
                    for kind in REQUESTS
                    for model in requests_of(kind)
                ],
            },
        }
    },
}


_RETRY_SCHEMA = {
    "type": "object",
    "description": "fields of the first request to replace; null leaves one out",
    "properties": {"job": {"type": "object"}},
    "additionalProperties": True,
}


def body_schema(name: str, *, required: bool = True) -> dict[str, object]:
    """The `openapi_extra` of a route that takes the body `name`."""
    schema: dict[str, object]
    example: dict[str, object]
    if name == "retry":
        schema, example = _RETRY_SCHEMA, {"inputs": {"x": _TENSOR}, "job": {"priority": 9}}
    elif name == "bulk":
        schema = _BULK_SCHEMA
        example = {"jobs": [{"kind": "memory.allocate", "request": {"size_bytes": 4096}}]}
    else:
        model, example = BODIES[name]
        schema = _reference(model)
        if model is inference.Run:
            schema = {"anyOf": [_reference(one) for one in requests_of(Kind.INFERENCE_RUN)]}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": required, "content": content}}


def _reference(model: type[BaseModel]) -> dict[str, object]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def install(app: FastAPI) -> None:
    """Adds the requests' schemas to the application's document."""
    made = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            document = made()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            of_kinds = [model for kind in REQUESTS for model in requests_of(kind)]
            for model in (*(model for model, _ in BODIES.values()), *of_kinds):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            schemas["Problem"] = answers.PROBLEM_SCHEMA
            document["components"]["securitySchemes"] = answers.SECURITY_SCHEMES
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    answers.describe(method, path, operation)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
