"""The Open Inference Protocol, version 2: health, metadata, statistics and inference, as Triton's clients expect them.

Errors are `{"error": …}` below /v2, FastAPI's own among them (`problems`).
"""

from __future__ import annotations

from collections import Counter

from fastapi import APIRouter, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.oip import repository as oip_repository
from api_gateway.oip.infer import infer
from api_gateway.oip.tensors import DATATYPES, NAMES
from api_gateway.submission.answer import json_response
from device_operations.wire.json_types import FreeJson
from tasks.inference import models as store
from tasks.inference.residents import nothing_named
from tasks.statements import Row

router = APIRouter(tags=["open inference protocol"])
router.include_router(oip_repository.router)

_INFER: dict[str, object] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "example": {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]}
            }
        },
    }
}
# `InferMiddleware` answers these before they are routed; here they stand for the API's description.
for _path in ("/v2/models/{model_name}/infer", "/v2/models/{model_name}/versions/{model_version}/infer"):
    router.add_api_route(_path, infer, methods=["POST"], openapi_extra=_INFER)


def install(app: FastAPI) -> None:
    """Adds the protocol's routes."""
    app.include_router(router)


@router.get("/v2")
async def describe_server(request: Request) -> Response:
    """The server's name, version and extensions."""
    extensions = ["binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters"]
    return json_response({"name": "device-operations", "version": request.app.version, "extensions": extensions})


@router.get("/v2/health/live")
async def live() -> Response:
    """The process answers."""
    return json_response({"live": True})


@router.get("/v2/health/ready")
async def ready(request: Request) -> Response:
    """200 where at least one device takes jobs, else 503."""
    snapshot = await run_in_threadpool(of(request).directory.snapshot)
    online = any(device["state"] == "online" for device in snapshot.devices.values())
    return json_response({"ready": online}, 200 if online else 503)


@router.get("/v2/models/stats")
async def all_statistics(request: Request, caller: Known) -> Response:
    """Statistics of every model that the caller can run."""
    return json_response({"model_stats": await run_in_threadpool(_statistics, of(request), caller, None, None)})


@router.get("/v2/models/{model_name}")
@router.get("/v2/models/{model_name}/versions/{model_version}")
async def describe_model(
    request: Request, caller: Known, model_name: str, model_version: str | None = None
) -> Response:
    """A model's inputs and outputs; -1 stands for an open dimension."""
    gateway = of(request)
    model, *_ = await run_in_threadpool(_find, gateway, caller, model_name, model_version)
    versions = sorted({known["version"] for known in gateway.directory.snapshot().named(caller, model_name)})
    return json_response(
        {
            "name": model_name,
            "versions": versions,
            "platform": "onnxruntime_onnx",
            "inputs": [_specification(spec) for spec in model["inputs"] or []],
            "outputs": [_specification(spec) for spec in model["outputs"] or []],
        }
    )


@router.get("/v2/models/{model_name}/ready")
@router.get("/v2/models/{model_name}/versions/{model_version}/ready")
async def model_ready(request: Request, caller: Known, model_name: str, model_version: str | None = None) -> Response:
    """200 where the model can be run, 503 where it is still loading."""
    gateway = of(request)
    models = await run_in_threadpool(_find, gateway, caller, model_name, model_version)
    devices = gateway.directory.snapshot().devices
    online = {device_id for device_id, device in devices.items() if device["state"] == "online"}
    can_run = any(model["state"] == "loaded" and model["device_id"] in online for model in models)
    return json_response({"name": model_name, "ready": can_run}, 200 if can_run else 503)


@router.get("/v2/models/{model_name}/config")
@router.get("/v2/models/{model_name}/versions/{model_version}/config")
async def model_config(request: Request, caller: Known, model_name: str, model_version: str | None = None) -> Response:
    """The model's configuration, as far as there is one."""
    model, *_ = await run_in_threadpool(_find, of(request), caller, model_name, model_version)
    options = model["options"]
    return json_response(
        {
            "name": model_name,
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            # 0, since shapes are given whole, with their batch axis.
            "max_batch_size": 0,
            "input": [_configuration(spec) for spec in model["inputs"] or []],
            "output": [_configuration(spec) for spec in model["outputs"] or []],
            "dynamic_batching": {"max_queue_delay_microseconds": int(options.get("max_delay_ms", 0) * 1000)},
            "parameters": {"device_operations": {"string_value": model["model_id"]}},
        }
    )


@router.get("/v2/models/{model_name}/stats")
@router.get("/v2/models/{model_name}/versions/{model_version}/stats")
async def model_statistics(
    request: Request, caller: Known, model_name: str, model_version: str | None = None
) -> Response:
    """How often the model ran, for how long, and in which batches."""
    found = await run_in_threadpool(_statistics, of(request), caller, model_name, model_version)
    return json_response({"model_stats": found})


def _find(gateway: Gateway, caller: Caller, name: str, version: str | None) -> list[Row]:
    """The model that the name stands for, on each device that holds it, the loaded ones first."""
    models = gateway.directory.meant(caller, name, version)
    if not models:
        raise nothing_named(name, version)
    return sorted(models, key=lambda model: model["state"] != "loaded")


def _statistics(gateway: Gateway, caller: Caller, name: str | None, version: str | None) -> list[dict[str, object]]:
    """The statistics of each name and version: what its models on all devices have counted."""
    if name is not None:
        _find(gateway, caller, name, version)
    snapshot = gateway.directory.refresh() if name is None else gateway.directory.snapshot()
    wanted = [
        snapshot.meant(caller, *known)
        for known in snapshot.names(caller)
        if name in (None, known[0]) and version in (None, known[1])
    ]
    with gateway.engine.connect() as connection:
        rows = store.get_many(connection, [model["model_id"] for models in wanted for model in models])
    return [_counted([rows[model["model_id"]] for model in models]) for models in wanted]


def _counted(models: list[Row]) -> dict[str, object]:
    counts: Counter[str] = Counter()
    for model in models:
        counts.update(model["statistics"])

    def duration(count: int, ns: float) -> dict[str, int]:
        return {"count": int(count), "ns": int(ns)}

    won, failed = (sum(model[count] for model in models) for count in ("run_count", "failed_count"))
    device_ns, queue_ns = counts["device_ns"], counts["queue_ns"]
    last_used = max((model["last_used_at"] for model in models if model["last_used_at"]), default=None)
    sizes = sorted(int(name[6:]) for name in counts if name.startswith("batch_") and name[6:].isdigit())
    return {
        "name": models[0]["name"],
        "version": models[0]["version"],
        "last_inference": int(last_used.timestamp() * 1000) if won and last_used else 0,
        "inference_count": won,
        "execution_count": int(counts["executions"]),
        "inference_stats": {
            "success": duration(won, device_ns + queue_ns),
            "fail": duration(failed, counts["failed_ns"]),
            "queue": duration(won + failed, queue_ns),
            "compute_input": duration(won, 0),
            "compute_infer": duration(won, device_ns),
            "compute_output": duration(won, 0),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_infer": duration(counts[f"batch_{size}"], counts[f"batch_{size}_ns"]),
            }
            for size in sizes
        ],
    }


def _specification(spec: FreeJson) -> FreeJson:
    described: FreeJson = {"name": spec["name"], "datatype": NAMES[spec["dtype"]], "shape": _sides(spec)}
    parameters: FreeJson = {}
    if spec.get("optional"):
        parameters["optional"] = True
    if DATATYPES.get(described["datatype"]) != spec["dtype"]:
        parameters["dtype"] = spec.get("type", spec["dtype"])
    return described | {"parameters": parameters} if parameters else described


def _configuration(spec: FreeJson) -> FreeJson:
    name = NAMES[spec["dtype"]]
    described = {
        "name": spec["name"],
        "data_type": f"TYPE_{'STRING' if name == 'BYTES' else name}",
        "dims": _sides(spec),
    }
    return described | {"optional": True} if spec.get("optional") else described


def _sides(spec: FreeJson) -> list[int]:
    return [side if isinstance(side, int) else -1 for side in spec["shape"]]
