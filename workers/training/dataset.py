"""Many samples and the order they are drawn in: batch `n` of a job is a pure function of (seed, sequence, n).

A safetensors file is mapped, not read: only the rows of a batch come into memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from device_operations.errors import failure
from device_operations.requests import training as requests
from workers.training.model.ports import Array, Batch, as_tensor
from workers.training.optimization.determinism import derive_seed

#: The name of the targets in a safetensors file; every other tensor is an input.
TARGETS = "targets"


class Samples:
    """Inputs by name and targets, whose first axes count the same samples. Never changed."""

    def __init__(self, inputs: Mapping[str, Array], targets: Array) -> None:
        self.inputs = {name: as_tensor(value, name) for name, value in inputs.items()}
        self.targets = as_tensor(targets, TARGETS)
        counts = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in self.inputs.items()}
        counts[TARGETS] = self.targets.shape[0] if self.targets.dim() else 0
        if len(set(counts.values())) != 1 or not counts[TARGETS]:
            raise failure(
                "input_mismatch", f"a dataset needs as many samples in each tensor, at least one; given {counts}"
            )
        self.count = counts[TARGETS]

    @classmethod
    def from_file(cls, path: Path) -> Samples:
        """The dataset in a safetensors file, mapped. Raises `input_mismatch` where it is none, or has no `targets`."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError) as error:
            raise failure("input_mismatch", f"the dataset is no safetensors file: {error}") from error
        if TARGETS not in tensors or len(tensors) < 2:
            raise failure(
                "input_mismatch",
                f"the dataset must hold a tensor for each input and one named {TARGETS!r}; it holds {sorted(tensors)}",
            )
        targets = tensors.pop(TARGETS)
        return cls(tensors, targets)

    def take(self, rows: Tensor | slice) -> Batch:
        """The samples of these rows."""
        if isinstance(rows, slice):
            return Batch({name: tensor[rows] for name, tensor in self.inputs.items()}, self.targets[rows])
        return Batch({name: _rows(tensor, rows) for name, tensor in self.inputs.items()}, _rows(self.targets, rows))


@dataclass(frozen=True)
class BatchPlan:
    """How a job goes through a dataset: batch size, number of batches, order."""

    batch_size: int
    steps: int | None = None
    epochs: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    #: Batches that one update is made of.
    grad_accumulation: int = 1

    @classmethod
    def of(cls, request: requests.Dataset) -> BatchPlan:
        """The plan that a request's `dataset` describes."""
        return cls(
            request.batch_size,
            request.steps,
            request.epochs,
            request.shuffle,
            request.drop_last,
            request.grad_accumulation or 1,
        )


class Order:
    """The rows of each batch of one job, by its number from 0.

    Each epoch has a permutation of its own, from (seed, sequence, epoch).
    """

    def __init__(self, count: int, plan: BatchPlan, seed: int, sequence: int) -> None:
        self._count, self._plan, self._seed, self._sequence = count, plan, seed, sequence
        self._per_epoch = count // plan.batch_size if plan.drop_last else -(-count // plan.batch_size)
        if self._per_epoch == 0:
            raise failure(
                "input_mismatch", f"with drop_last a dataset of {count} samples has no batch of {plan.batch_size}"
            )
        self.batches = plan.steps if plan.steps is not None else self._per_epoch * (plan.epochs or 1)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def rows(self, batch: int) -> Tensor | slice:
        """Row numbers, int64 (batch,), or a slice where nothing is shuffled."""
        epoch, position = divmod(batch, self._per_epoch)
        chosen = slice(position * self._plan.batch_size, min((position + 1) * self._plan.batch_size, self._count))
        if not self._plan.shuffle:
            return chosen
        if epoch != self._epoch:
            self._permutation, self._epoch = self._permute(epoch), epoch
        return self._permutation[chosen]

    def ends_group(self, batch: int) -> bool:
        """Whether an update follows this batch: it completes a group, its epoch, or the job."""
        position = batch % self._per_epoch + 1
        return position % self._plan.grad_accumulation == 0 or position == self._per_epoch or batch + 1 == self.batches

    def _permute(self, epoch: int) -> Tensor:
        seed = derive_seed(self._seed, "order", self._sequence, epoch)
        # RandomState's stream is frozen by NumPy for good; Generator's may change between versions.
        state = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32])
        return torch.from_numpy(state.permutation(self._count).astype(np.int64, copy=False))


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device))
