"""What training requests hold: checked against the settings, measured, and as it is stored."""

from __future__ import annotations

from device_operations.errors import failure
from device_operations.requests.training import Initialize, LayersModel, OnnxModel, Step, TorchScriptModel
from device_operations.tensors import ML_DTYPES, NUMPY_DTYPES, Tensor
from device_operations.wire.json_types import FreeJson
from tasks.blobs import records as blob_store
from tasks.inference.content import file_hash, model_file
from tasks.planning.context import Context
from tasks.planning.plan import body_hash
from tasks.training.parameters import count_parameters

#: Tensors of a parameter's size that each optimizer keeps in addition to the parameter and its gradient.
_SLOTS = {"sgd": 1, "adam": 2, "adamw": 2}


def check_model(context: Context, request: Initialize, payload: FreeJson) -> None:
    """Refuses programs that are not trusted, and pins a file below the model folder to its content."""
    model = request.model
    if isinstance(model, TorchScriptModel) and not context.settings.training.trust_programs:
        raise failure(
            "untrusted_program",
            "a model of kind torchscript brings code of its own, and TRAINING__TRUST_PROGRAMS is not set here; "
            "send layers or an ONNX file",
        )
    if isinstance(model, OnnxModel) and model.path is not None:
        found = file_hash(model_file(context.settings.model_cache_path, model.path))
        if model.sha256 is not None and model.sha256 != found:
            raise failure("checksum_mismatch", f"the model's sha256 is {found}, not {model.sha256}")
        payload["model"]["sha256"] = found


def estimate(request: Initialize, sizes: dict[str, int]) -> int:
    """Bytes of parameters, gradients and optimizer state, as far as the request says without building anything."""
    model = request.model
    if isinstance(model, LayersModel):
        parameters = 4 * count_parameters(model.layers)
    else:
        parameters = sizes.get(model.blob_id or "", 0)
    trained = 0 if request.lora is not None or request.trainable is not None else parameters
    slots = _SLOTS[request.optimizer.type] if getattr(request.optimizer, "momentum", 1) else 0
    # Sizes are signed 64-bit integers in the records; a model beyond them is refused for want of memory just as well.
    return min(parameters + trained * (1 + slots), 2**62)


def check_dtypes(tensors: dict[str, Tensor]) -> None:
    """Refuses what only models take: training is given NumPy's dtypes."""
    for name, tensor in tensors.items():
        if tensor.dtype in ML_DTYPES or tensor.dtype == "json":
            known = ", ".join(NUMPY_DTYPES)
            raise failure("dtype_unsupported", f"{name}: training takes no {tensor.dtype}; use one of {known}")


def check_batch(context: Context, request: Step) -> None:
    size, most = request.batch_size, context.settings.training.max_batch_size
    if size is not None and size > most:
        raise failure(
            "batch_too_large",
            f"a batch of {size} samples was sent, and TRAINING__MAX_BATCH_SIZE is {most}; "
            "send smaller batches and accumulate their gradients",
            detail={"batch_size": size, "max_batch_size": most},
        )


def with_tensors(request: Step, tensors: dict[str, Tensor], staged: dict[str, str]) -> FreeJson:
    """The request as it is stored, with its tensors as they were kept."""
    inner = {"inputs", "targets"}
    payload = request.model_dump(
        mode="json", exclude={"job": True, "inputs": True, "targets": True, "dataset": inner}, exclude_none=True
    )
    place = payload if request.dataset is None else payload["dataset"]
    for name, tensor in tensors.items():
        stored = stored_tensor(tensor, staged.get(name))
        if name == "targets":
            place["targets"] = stored
        else:
            place.setdefault("inputs", {})[name.removeprefix("inputs.")] = stored
    return payload


def stored_tensor(tensor: Tensor, device_id: str | None) -> FreeJson:
    stored = tensor.model_dump(mode="json", exclude_unset=True)
    return stored if device_id is None else stored | {"device_id": device_id}


def content_hash(context: Context, payload: FreeJson, blob_ids: list[str]) -> str:
    """The hash by which two bodies of a step count as the same: the same bytes may come as another blob."""
    if not blob_ids:
        return body_hash(payload)
    with context.engine.connect() as connection:
        known = blob_store.get_many(connection, blob_ids)
    return body_hash(_by_content(payload, {blob_id: row["sha256"] for blob_id, row in known.items()}))


def _by_content(value: object, hashes: dict[str, str | None]) -> object:
    if isinstance(value, dict):
        return {
            key: hashes.get(inner, inner) if key == "blob_id" else _by_content(inner, hashes)
            for key, inner in value.items()
        }
    return value
