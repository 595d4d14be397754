"""A job of many steps over a dataset, one step at a time, so that the scheduler may do other work between any two."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from device_operations.errors import failure
from workers.training.dataset import TARGETS, BatchPlan, Order, Samples
from workers.training.model.ports import Taken, as_tensor, check_row_numbers
from workers.training.outcomes import StepOptions, StepOutcome

if TYPE_CHECKING:
    from workers.training.session import TrainingSession


class DatasetRun:
    """An iterator of outcomes. `finish` ends the job, at its end or wherever it was cut short.

    Where the session was restored from a checkpoint taken within the same job (by its sequence number), the run goes on
    with the batch that follows. A step that fails leaves the session and the run at the step before it.
    """

    def __init__(
        self, session: TrainingSession, dataset: Samples, plan: BatchPlan, options: StepOptions, sequence: int
    ) -> None:
        """Checks the whole dataset against the model. Raises as a step does."""
        if options.mode == "apply":
            raise failure("validation_failed", "mode apply takes no dataset: it uses the accumulated gradients")
        session.check_sequence(sequence)
        session.check_batch_size(plan.batch_size)
        self._session, self._dataset, self._options, self.sequence = session, dataset, options, sequence
        self._order = Order(dataset.count, plan, session.state.seed, sequence)
        self._group = plan.grad_accumulation if options.mode == "train" else 1
        #: How a batch is taken that no update follows.
        self._gathering = StepOptions(mode="gradients", group=self._group, quiet=True)
        #: Batches in the whole job, and those done, skipped ones included.
        self.steps_total = self._order.batches
        unfinished = session.state.unfinished_run
        self.steps_done = unfinished[1] if unfinished is not None and unfinished[0] == sequence else 0
        self._checked = self._check_values()
        #: The first batch of each size, checked in full; others of that size are then of the same shapes and dtypes.
        self._like: dict[int, Taken] = {}

    def __iter__(self) -> DatasetRun:
        return self

    def __next__(self) -> StepOutcome:
        if self.steps_done >= self.steps_total:
            raise StopIteration
        options = self._options
        if self._group > 1:
            ends = self._order.ends_group(self.steps_done)
            options = replace(options, group=self._group) if ends else self._gathering
        outcome = self._session.step_on(self._take(self._order.rows(self.steps_done)), options)
        self._session.note_evaluation(outcome)
        self.steps_done += 1
        self._session.state.unfinished_run = (self.sequence, self.steps_done)
        return outcome

    def finish(self) -> None:
        """Marks the job's sequence number as applied, with as many steps as were done."""
        self._session.finish(self.sequence)

    def _take(self, rows: Tensor | slice) -> Taken:
        batch, session = self._dataset.take(rows), self._session
        size = len(batch.targets)
        like = self._like.get(size)
        if like is None or not isinstance(like.targets, Tensor):
            taken = session.take(batch, self._options, values_checked=self._checked)
            if taken.checked:
                self._like[size] = taken
            return taken
        ports = zip(session.definition.inputs, like.inputs, strict=True)
        inputs = [as_tensor(batch.inputs[port.name], port.name).to(first.device, first.dtype) for port, first in ports]
        targets = as_tensor(batch.targets, TARGETS).to(like.targets.device, like.targets.dtype)
        return Taken(inputs, targets, True, like.shapes)

    def _check_values(self) -> bool:
        """Looks at every index and target once, so that no step needs to; False if only a real run shows the shapes."""
        first = self._dataset.take(self._order.rows(0))
        expected = self._session.expected_output(first.inputs, training=self._options.mode != "evaluate")
        if expected is None:
            return False
        for port in self._session.definition.inputs:
            check_row_numbers(port, self._dataset.inputs[port.name])
        classes = expected.shape[1] if expected.dim() > 1 else 0
        self._session.loss.check_values(self._dataset.targets, classes)
        return True
