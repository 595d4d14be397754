"""The model repository of the Open Inference Protocol: what is there, load it, unload it, each within the request."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.routes.inference import until_recorded
from api_gateway.submission.answer import json_response, make_plan, read_body
from api_gateway.submission.performing import performed_to_the_end
from device_operations.errors import failure
from device_operations.jobs import Kind, new_id
from device_operations.requests.base import JobRequest, invalid
from device_operations.requests.inference import LoadModel, UnloadModel
from device_operations.wire.bounds import load_json, whole_number
from device_operations.wire.json_types import FreeJson
from tasks.inference.content import MAX_NAME_BYTES
from tasks.inference.residents import nothing_named
from tasks.owners import may_see
from tasks.planning.context import keep_bytes
from tasks.statements import Row

router = APIRouter()

#: How the protocol calls the states of models that can be run or soon can, the readiest first.
_READINESS = {"loaded": "READY", "loading": "LOADING", "lost": "LOADING"}


@router.post("/v2/repository/index")
async def index(request: Request, caller: Known) -> Response:
    """The models that are loaded, and those in the model folder that are not; `{"ready": true}`: the former only."""
    wanted = await read_body(request, empty_is={})
    gateway = of(request)

    def read() -> list[dict[str, str]]:
        snapshot = gateway.directory.refresh()
        listed = [_entry(snapshot.meant(caller, name, version)) for name, version in snapshot.names(caller)]
        if wanted.get("ready"):
            return [entry for entry in listed if entry["state"] == "READY"]
        here = {entry["name"] for entry in listed}
        return listed + [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "not loaded"}
            for name in _in_folder(gateway.settings.model_cache_path)
            if name not in here
        ]

    return json_response(await run_in_threadpool(read))


@router.post("/v2/repository/models/{model_name}/load")
async def load(request: Request, caller: Known, model_name: str) -> Response:
    """Loads a model: out of the model folder, or from files sent along as `file:<path>` parameters."""
    gateway = of(request)
    parameters = _parameters(await read_body(request, empty_is={}))
    wanted = await run_in_threadpool(_load_request, gateway, caller, model_name, parameters)
    await until_recorded(lambda: _perform(gateway, caller, Kind.INFERENCE_LOAD_MODEL, wanted))
    await run_in_threadpool(gateway.directory.refresh)
    return json_response({})


@router.post("/v2/repository/models/{model_name}/unload")
async def unload(request: Request, caller: Known, model_name: str) -> Response:
    """Unloads every version of a model of the caller's, on every device that holds it."""
    gateway = of(request)
    await read_body(request, empty_is={})
    known = await run_in_threadpool(lambda: gateway.directory.refresh().named(caller, model_name))
    # What is shared with the caller is not the caller's to unload.
    models = [model for model in known if may_see(caller, model)]
    if not models:
        raise nothing_named(model_name, None)
    for model in models:
        await _perform(gateway, caller, Kind.INFERENCE_UNLOAD_MODEL, UnloadModel(model_id=model["model_id"]))
    await run_in_threadpool(gateway.directory.refresh)
    return json_response({})


async def _perform(gateway: Gateway, caller: Caller, kind: Kind, request: JobRequest) -> None:
    """One job from submission to its end. Raises what it failed with."""
    await performed_to_the_end(gateway, await make_plan(gateway, caller, kind, request, new_id()))


def _load_request(gateway: Gateway, caller: Caller, name: str, parameters: FreeJson) -> LoadModel:
    config = _config(parameters.get("config"))
    files = {path.removeprefix("file:"): content for path, content in parameters.items() if path.startswith("file:")}
    if files:
        blobs = {path: _stored(gateway, caller, path, content) for path, content in files.items()}
        source: FreeJson = {"blobs": blobs}
        version = next(iter(sorted(path.split("/")[0] for path in files if whole_number(path.split("/")[0]))), "1")
    else:
        path, version = _found(gateway.settings.model_cache_path, name)
        source = {"path": path}
    options: FreeJson = {}
    if isinstance(config.get("max_batch_size"), int):
        options["max_batch_size"] = max(1, config["max_batch_size"])
    batching = config.get("dynamic_batching")
    delay = batching.get("max_queue_delay_microseconds") if isinstance(batching, dict) else None
    if isinstance(delay, int):
        options["max_delay_ms"] = delay / 1000
    try:
        return LoadModel.model_validate({"name": name, "version": version, "source": source, "options": options})
    except ValidationError as error:
        raise invalid(error, "The model cannot be loaded") from error


def _stored(gateway: Gateway, caller: Caller, path: str, content: str) -> str:
    try:
        raw = base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise failure("malformed_request", f"file:{path} is not base64: {error}") from error
    return keep_bytes(gateway.context(caller), raw, caller.owner)


def _found(folder: Path, name: str) -> tuple[str, str]:
    """A model's path below the model folder and its version, in Triton's layout or a plain one.

    `name/3/model.onnx` (the highest number), `name/model.onnx` or any one graph in `name/`, `name.onnx`.
    """
    base = folder / name
    # What leaves the folder is refused by the worker that loads it; here it is only skipped.
    inside = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    inside = inside and len(f"{name}.onnx".encode()) <= MAX_NAME_BYTES
    if inside and base.is_dir():
        numbered = sorted(
            whole_number(entry.name) or 0 for entry in base.iterdir() if entry.is_dir() and whole_number(entry.name)
        )
        return (f"{name}/{numbered[-1]}", str(numbered[-1])) if numbered else (name, "1")
    if inside and (folder / f"{name}.onnx").is_file():
        return f"{name}.onnx", "1"
    raise failure(
        "model_not_found",
        f"there is no {name}/ and no {name}.onnx in the model folder (MODEL_CACHE_PATH); put the model there, send "
        "its files along, or load it with POST /api/inference/load-model",
    )


def _in_folder(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = set()
    for entry in folder.iterdir():
        if entry.is_dir() and next(entry.rglob("*.onnx"), None) is not None:
            names.add(entry.name)
        elif entry.suffix == ".onnx":
            names.add(entry.stem)
    return sorted(names)


def _entry(models: list[Row]) -> dict[str, str]:
    """The entry of a name and version, by the model of it that is readiest: each device may hold one."""
    model = min(models, key=lambda one: list(_READINESS).index(one["state"]))
    return {
        "name": model["name"],
        "version": model["version"],
        "state": _READINESS[model["state"]],
        "reason": "" if model["state"] == "loaded" else model["state"],
    }


def _parameters(body: FreeJson) -> FreeJson:
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise failure("malformed_request", "parameters is not a JSON object")
    return parameters


def _config(text: object) -> FreeJson:
    if text is None:
        return {}
    if not isinstance(text, str):
        raise failure("malformed_request", "config is not a string that holds JSON")
    config = load_json(text.encode(), "config")
    if not isinstance(config, dict):
        raise failure("malformed_request", "config is not a JSON object")
    return config
