"""What a step is made of: its options, its plan through a dataset, and its tensors as torch takes them.

Tensors in allocations are used where they lie, and spooled to blobs, so that the step can be made again after a death.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from device_operations.tensors import FIXED_DTYPES
from workers.devices.arrays import BufferView, flat_bytes
from workers.operations.tensors import feed, keep
from workers.operations.training.files import local_file
from workers.resident.residents import Resident
from workers.training.dataset import BatchPlan, Samples
from workers.training.model.ports import Array, Batch
from workers.training.outcomes import StepOptions


def options_of(request: dict[str, Any]) -> StepOptions:
    """The options that a recorded request asks for."""
    return StepOptions(
        request.get("mode", "train"),
        request.get("learning_rate"),
        request.get("gradient_clip_norm"),
        request.get("accumulate", True),
        request.get("form") == "blob",
    )


def plan_of(request: dict[str, Any]) -> BatchPlan | None:
    """How a recorded request goes through its dataset; None where it has none."""
    given = request.get("dataset")
    if given is None:
        return None
    return BatchPlan(
        given["batch_size"], given.get("steps"), given.get("epochs"), given.get("shuffle", True),
        given.get("drop_last", False), given.get("grad_accumulation") or 1,
    )  # fmt: skip


def data_of(resident: Resident, session_id: str, request: dict[str, Any]) -> Batch | Samples | None:
    """The batch or dataset of a recorded request; None for mode `apply`."""
    given = request.get("dataset")
    if given is not None and given.get("blob_id"):
        return Samples.from_file(local_file(resident, given["blob_id"], session_id))
    place = request if given is None else given
    if place.get("inputs") is None:
        return None
    inputs = {name: taken(resident, name, tensor) for name, tensor in place["inputs"].items()}
    targets = taken(resident, "targets", place["targets"])
    return Batch(inputs, targets) if given is None else Samples(inputs, targets)


def taken(resident: Resident, name: str, tensor: dict[str, Any]) -> Array:
    """One tensor: a NumPy array, or where it lies in an allocation, a torch tensor over those bytes."""
    found = feed(resident, name, tensor)
    if not isinstance(found, BufferView):
        return found
    assert found.dtype is not None
    assert found.shape is not None
    view: torch.Tensor = resident.device.tensor_view(found.buffer, found.dtype, found.shape, found.offset)
    return view


def resident_tensors(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of a request that lie in allocations: `inputs.<name>` and `targets`."""
    place = request.get("dataset") or request
    named = {f"inputs.{name}": tensor for name, tensor in (place.get("inputs") or {}).items()}
    if place.get("targets"):
        named["targets"] = place["targets"]
    return {name: tensor for name, tensor in named.items() if tensor.get("allocation_id")}


def spooled(resident: Resident, request: dict[str, Any], owner: str) -> dict[str, dict[str, Any]]:
    """Copies of a request's resident tensors as blobs, by name."""
    return {name: _spool(resident, name, tensor, owner) for name, tensor in resident_tensors(request).items()}


def _spool(resident: Resident, name: str, tensor: dict[str, Any], owner: str) -> dict[str, Any]:
    found = feed(resident, name, tensor)
    if isinstance(found, BufferView):
        size = math.prod(tensor["shape"]) * FIXED_DTYPES[tensor["dtype"]]
        raw = resident.device.read(found.buffer, found.offset, size)
    else:
        raw = flat_bytes(found)
    return {"dtype": tensor["dtype"], "shape": tensor["shape"], "blob_id": keep(resident, raw, owner)}
