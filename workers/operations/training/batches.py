"""What a step is made of: its options, its plan through a dataset, and its tensors as torch takes them.

Tensors in allocations are used where they lie, and spooled to blobs, so that the step can be made again after a death.
"""

from __future__ import annotations

import torch

from tasks.jobs.model import StoredRequest
from workers.devices.arrays import BufferView, flat_bytes
from workers.operations.tensors import feed, keep
from workers.operations.training.files import local_file
from workers.resident.residents import Resident
from workers.stored_tensors import InAllocation, StoredTensor, decode_tensor
from workers.training.dataset import BatchPlan, Samples
from workers.training.model.ports import Array, Batch
from workers.training.outcomes import StepOptions


def options_of(request: StoredRequest) -> StepOptions:
    """The options that a recorded request asks for."""
    return StepOptions(
        request.get("mode", "train"),
        request.get("learning_rate"),
        request.get("gradient_clip_norm"),
        request.get("accumulate", True),
        request.get("form") == "blob",
    )


def plan_of(request: StoredRequest) -> BatchPlan | None:
    """How a recorded request goes through its dataset; None where it has none."""
    given = request.get("dataset")
    if given is None:
        return None
    return BatchPlan(
        given["batch_size"], given.get("steps"), given.get("epochs"), given.get("shuffle", True),
        given.get("drop_last", False), given.get("grad_accumulation") or 1,
    )  # fmt: skip


def data_of(resident: Resident, session_id: str, request: StoredRequest) -> Batch | Samples | None:
    """The batch or dataset of a recorded request; None for mode `apply`."""
    given = request.get("dataset")
    if given is not None and given.get("blob_id"):
        return Samples.from_file(local_file(resident, given["blob_id"], session_id))
    place = request if given is None else given
    if place.get("inputs") is None:
        return None
    inputs, targets = batch_of(resident, place)
    return Batch(inputs, targets) if given is None else Samples(inputs, targets)


def batch_of(resident: Resident, stored: StoredRequest) -> tuple[dict[str, Array], Array]:
    """The inputs and the targets that part of a recorded request names."""
    inputs = {name: _array(resident, name, decode_tensor(tensor)) for name, tensor in stored["inputs"].items()}
    return inputs, _array(resident, "targets", decode_tensor(stored["targets"]))


def _array(resident: Resident, name: str, tensor: StoredTensor) -> Array:
    """One tensor: a NumPy array, or a torch tensor over its bytes if it is in an allocation of this device."""
    found = feed(resident, name, tensor)
    if not isinstance(found, BufferView):
        return found
    assert found.dtype is not None
    assert found.shape is not None
    view: torch.Tensor = resident.device.tensor_view(found.buffer, found.dtype, found.shape, found.offset)
    return view


def resident_tensors(request: StoredRequest) -> dict[str, StoredTensor]:
    """The tensors of a request that lie in allocations: `inputs.<name>` and `targets`."""
    part = request.get("dataset") or request
    stored = {f"inputs.{name}": tensor for name, tensor in (part.get("inputs") or {}).items()}
    if part.get("targets"):
        stored["targets"] = part["targets"]
    decoded = {name: decode_tensor(tensor) for name, tensor in stored.items()}
    return {name: tensor for name, tensor in decoded.items() if isinstance(tensor.place, InAllocation)}


def spooled(resident: Resident, request: StoredRequest, owner: str) -> dict[str, StoredRequest]:
    """Copies of a request's resident tensors as blobs, by name."""
    return {name: _spool(resident, name, tensor, owner) for name, tensor in resident_tensors(request).items()}


def _spool(resident: Resident, name: str, tensor: StoredTensor, owner: str) -> StoredRequest:
    found = feed(resident, name, tensor)
    if isinstance(found, BufferView):
        raw = resident.device.read(found.buffer, found.offset, tensor.size_bytes)
    else:
        raw = flat_bytes(found)
    return {"dtype": tensor.dtype, "shape": tensor.shape, "blob_id": keep(resident, raw, owner)}
