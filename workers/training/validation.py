"""Comparing the exported model with the trained one: its loss, and the largest differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from device_operations.errors import failure
from workers.devices.arrays import Array as HostArray
from workers.training.model.ports import Array, as_tensor
from workers.training.optimization.losses import LossFunction
from workers.training.session import TrainingSession


@dataclass(frozen=True, slots=True)
class Validation:
    """`loss` is the served model's, `trained_loss` the session's own; `largest_difference` is over all outputs."""

    loss: float
    trained_loss: float
    largest_difference: float
    accuracy: float | None
    samples: int


def compare(
    session: TrainingSession, inputs: Mapping[str, Array], targets: Array, served: Mapping[str, HostArray]
) -> Validation:
    """Compares `served`, what the exported model gave for `inputs`, with what the session gives.

    Takes as many samples as the caller ran: TRAINING__MAX_BATCH_SIZE is about steps. Raises `input_mismatch`.
    """
    trained = session.outputs(inputs)
    missing = sorted(set(trained) - set(served))
    if missing:
        raise failure("internal_error", f"the exported model gave no output {missing[0]!r}")
    apart = [_largest(trained[name], as_tensor(served[name], name)) for name in trained]
    name = session.definition.output_names[session.definition.trained_output]
    loss, correct, elements = _judge(session, as_tensor(served[name], name), targets)
    own_loss, _, _ = _judge(session, trained[name], targets)
    accuracy = None if correct is None else correct / elements
    return Validation(loss, own_loss, max(apart), accuracy, trained[name].shape[0])


def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise failure("internal_error", f"the exported model gave shape {list(b.shape)} for {list(a.shape)}")
    if a.numel() == 0:
        return 0.0
    return float((a.to(torch.float64) - b.to(torch.float64)).abs().max())


def _judge(session: TrainingSession, output: Tensor, targets: Array) -> tuple[float, int | None, int]:
    """(loss, right answers, of how many) on the host."""
    # A loss of its own: the session's keeps its weights on the device.
    loss = LossFunction(session.spec.loss)
    checked = loss.take_targets(output, targets).cpu()
    return float(loss(output, checked)), *loss.count_correct(output, checked)
