"""Models below /v1: those that the caller can run and that make embeddings or images."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.submission.answer import json_response
from device_operations.errors import OperationError, failure
from tasks.devices.directory import DirectorySnapshot
from tasks.statements import Row

router = APIRouter(tags=["openai"])

#: What each type of model that is served below /v1 makes.
MAKES = {"text_embedding": "embeddings", "sdxl": "images"}


@router.get("/v1/models")
async def list_models(request: Request, caller: Known) -> Response:
    """The models that the caller can use here. A name stands for its last load; `NAME:VERSION` for one of several."""
    snapshot = await run_in_threadpool(of(request).directory.snapshot)
    return json_response({"object": "list", "data": [_view(*entry) for entry in _entries(snapshot, caller)]})


@router.get("/v1/models/{model_name:path}")
async def read_model(request: Request, caller: Known, model_name: str) -> Response:
    """One of them."""
    model = await run_in_threadpool(find, of(request), caller, model_name)
    if model["model_type"] not in MAKES:
        raise no_such(model_name)
    return json_response(_view(model_name, model))


def find(gateway: Gateway, caller: Caller, name: str) -> Row:
    """The model that `name`, or `NAME:VERSION`, stands for; `model_not_found` where the caller can run none."""
    meant = gateway.directory.meant(caller, name)
    head, colon, version = name.rpartition(":")
    if not meant and colon:
        meant = gateway.directory.meant(caller, head, version)
    if not meant:
        raise no_such(name)
    return meant[0]


def find_that_makes(gateway: Gateway, caller: Caller, name: str, what: str) -> Row:
    """The same for a request that wants embeddings or images of it."""
    model = find(gateway, caller, name)
    if MAKES.get(model["model_type"]) != what:
        message = f"the model {name!r} is of type {model['model_type']!r} and makes no {what}"
        raise failure("validation_failed", message, errors=[{"loc": ["model"], "message": message, "type": "model"}])
    return model


def no_such(name: str) -> OperationError:
    """What OpenAI's API says of a model that is not there, or not the caller's."""
    return failure("model_not_found", f"The model {name!r} does not exist or you do not have access to it.")


def _entries(snapshot: DirectorySnapshot, caller: Caller) -> list[tuple[str, Row]]:
    found: list[tuple[str, Row]] = []
    versions: dict[str, list[str]] = {}
    for name, version in snapshot.names(caller):
        versions.setdefault(name, []).append(version)
    for name, known in versions.items():
        ids: list[tuple[str, str | None]] = [(name, None)]
        ids += [(f"{name}:{version}", version) for version in known] if len(known) > 1 else []
        for model_id, wanted in ids:
            meant = snapshot.meant(caller, name, wanted)
            if meant and meant[0]["model_type"] in MAKES:
                found.append((model_id, meant[0]))
    return found


def _view(model_id: str, model: Row) -> dict[str, object]:
    created = int(model["named_at"].timestamp())
    return {"id": model_id, "object": "model", "created": created, "owned_by": model["owner"]}
