"""A training session on one device, and the steps that change its state.

A step is a pure function of (state, inputs, targets, learning rate, clip, mode): its random numbers come from the
session's seed and the step, its kernels are deterministic unless the request says otherwise (`deterministic`), and
nothing else goes in. So a step recorded with its inputs can be replayed, bit for bit, on the same device model, threads
and versions. A step that fails changes nothing, or, where its update broke off half-way, leaves `intact` False.

One thread at a time: the device's scheduler. Only what `snapshot` returns may be used elsewhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from device_operations.errors import OperationError, failure
from device_operations.requests.schedules import PlateauSchedule
from device_operations.requests.training import Initialize
from workers.training.checkpoints import Snapshot
from workers.training.dataset import BatchPlan, Samples
from workers.training.memory import is_nondeterministic, is_out_of_memory
from workers.training.model.definition import Definition, Networks, Sources, define
from workers.training.model.modes import set_mode
from workers.training.model.on_device import DeviceModel, estimate_bytes, make_resident
from workers.training.model.ports import Array, Batch, Taken, name_of, take_inputs
from workers.training.model.shapes import ShapeTrial, as_list, load_meta_kernels
from workers.training.optimization.determinism import derive_seed, seed_device, use_deterministic
from workers.training.optimization.losses import LossFunction
from workers.training.optimization.precision import Autocast
from workers.training.optimization.schedules import add_loss, learning_rate_at, observe
from workers.training.outcomes import StepOptions, StepOutcome, StepRecord
from workers.training.runs import DatasetRun
from workers.training.state import Gradients, SessionState


@dataclass(frozen=True)
class Limits:
    """What the device and the settings allow a session; None for memory whose limit is unknown."""

    memory_bytes: int | None
    max_batch_size: int
    trust_programs: bool = False


def build_session(
    spec: Initialize, sources: Sources, device: torch.device, limits: Limits, networks: Networks | None = None
) -> TrainingSession:
    """A session on `device` at step 0. Memory is counted before any is taken.

    What it learns of its network it shares with the other sessions that were built with the same `networks`.
    Raises `insufficient_memory`, `out_of_memory`, `dtype_unsupported` for a precision that the device lacks, and what
    `define` and `make_resident` raise.
    """
    autocast = Autocast(spec.precision, device)
    definition = define(
        spec.model,
        sources,
        trust_programs=limits.trust_programs,
        networks=networks,
        trainable=spec.trainable,
        frozen_statistics=spec.frozen_statistics,
    )
    needed = estimate_bytes(definition, spec)
    if limits.memory_bytes is not None and needed > limits.memory_bytes:
        raise failure(
            "insufficient_memory",
            f"the model with its gradients and {spec.optimizer.type} state takes {needed} bytes, "
            f"but {limits.memory_bytes} are to be had on the device; make it smaller or free memory",
            detail={"needed_bytes": needed, "free_bytes": limits.memory_bytes},
        )
    try:
        return TrainingSession(
            spec, definition, make_resident(definition, spec, sources, device), device, limits, autocast
        )
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(f"building the model ({needed} bytes)", error) from error
        raise


class TrainingSession:
    """A model under training. Make one with `build_session`."""

    def __init__(
        self,
        spec: Initialize,
        definition: Definition,
        model: DeviceModel,
        device: torch.device,
        limits: Limits,
        autocast: Autocast,
    ) -> None:
        self.spec, self.definition, self.device = spec, definition, device
        self.loss = LossFunction(spec.loss)
        self.state = SessionState(spec, definition, model, device)
        #: False once an update broke off half-way (out of memory, device lost): only a checkpoint brings it back.
        self.intact = True
        self._limits, self._autocast = limits, autocast
        self._module = model.module
        self._training: bool | None = None
        self._trial = ShapeTrial(
            definition.build_meta(), definition.learned.outputs, frozen_statistics=spec.frozen_statistics
        )

    @property
    def step(self) -> int:
        """How many updates the parameters have had."""
        return self.state.step

    @property
    def sequence(self) -> int:
        """The number of the last request applied."""
        return self.state.sequence

    @property
    def learning_rate(self) -> float:
        """What the schedule gives the next update."""
        return learning_rate_at(self.spec.schedule, self.spec.optimizer.learning_rate, self.step, self.state.observed)

    def perform(self, batch: Batch | None, options: StepOptions, sequence: int) -> StepOutcome:
        """One step on `batch` (None in mode `apply`), as request number `sequence`, which must be above the last.

        Raises `sequence_conflict`, `input_mismatch`, `batch_too_large`, `validation_failed`, `model_invalid`,
        `nonfinite_loss`, `run_failed`, `out_of_memory`, `session_lost` (it is not `intact`). While it is `intact`, the
        state is then what it was.
        """
        self.check_sequence(sequence)
        outcome = self.advance(batch, options)
        self.note_evaluation(outcome)
        self.finish(sequence)
        return outcome

    def note_evaluation(self, outcome: StepOutcome) -> None:
        """Takes the loss of an evaluation that has a number into what a schedule of type `plateau` observes."""
        schedule = self.spec.schedule
        if outcome.mode == "evaluate" and isinstance(schedule, PlateauSchedule) and schedule.metric == "evaluate":
            add_loss(self.state.observed, outcome.loss or 0.0, 0 if outcome.loss is None else outcome.samples)

    def finish(self, sequence: int) -> None:
        """Marks the request of this number as applied, however many steps it made."""
        schedule = self.spec.schedule
        if isinstance(schedule, PlateauSchedule) and schedule.metric == "evaluate":
            observe(schedule, self.state.observed)
        self.state.sequence, self.state.unfinished_run = sequence, None

    def abandon_run(self) -> None:
        """Forgets where a job without a number stood: it has ended, and is never taken up again."""
        self.state.unfinished_run = None
        schedule = self.spec.schedule
        if isinstance(schedule, PlateauSchedule) and schedule.metric == "evaluate":
            self.state.observed.total = self.state.observed.weight = 0.0

    def run(self, dataset: Samples, plan: BatchPlan, options: StepOptions, sequence: int) -> DatasetRun:
        """A job of many steps, made one by one as the caller iterates; goes on where a checkpoint cut it off."""
        return DatasetRun(self, dataset, plan, options, sequence)

    def replay(self, record: StepRecord, data: Batch | Samples | None) -> list[StepOutcome]:
        """Applies a recorded step again, on the same inputs; nothing where the state already holds it."""
        if record.sequence <= self.sequence:
            return []
        self._trial.trusting = True
        try:
            return self._replay(record, data)
        finally:
            self._trial.trusting = False

    def _replay(self, record: StepRecord, data: Batch | Samples | None) -> list[StepOutcome]:
        if not isinstance(data, Samples):
            return [self.perform(data, record.options, record.sequence)]
        if record.plan is None:
            raise failure("internal_error", f"the record of step {record.sequence} has a dataset and no plan")
        run = self.run(data, record.plan, record.options, record.sequence)
        end = run.steps_total if record.steps_applied is None else record.steps_applied
        outcomes = []
        while run.steps_done < end:
            outcomes.append(next(run))
        run.finish()
        return outcomes

    def prepare(self) -> None:
        """Does what the first batch of new shapes would else wait for."""
        load_meta_kernels()

    def outputs(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        """All outputs for `inputs` as they would be served: in evaluation mode, on the host."""
        use_deterministic(self.spec.deterministic)
        taken = take_inputs(self.definition.inputs, inputs)
        self._trial.outputs(taken, training=False)
        self._set_mode(training=False)
        with self._unchanged_on_failure(), torch.no_grad():
            results = as_list(self._module(*(tensor.to(self.device) for tensor in taken)))
        return {
            name: result.detach().cpu() for name, result in zip(self.definition.output_names, results, strict=False)
        }

    def memory_bytes(self) -> int:
        """Device memory of parameters, buffers, gradients, optimizer state and accumulated gradients."""
        return self.state.memory_bytes()

    def snapshot(self, *, model_only: bool = False) -> Snapshot:
        """The whole state, copied to the host; training may go on at once. `checkpoints.write` takes it from there.

        With `model_only` parameters and buffers alone: what an export needs.
        """
        return self.state.snapshot(model_only=model_only)

    def restore(self, snapshot: Snapshot) -> None:
        """Puts the session where `snapshot` was taken, seed included; unchanged where it does not fit.

        Raises `model_invalid` for a checkpoint of another model.
        """
        self.state.restore(snapshot)
        self.intact = True

    def check_sequence(self, sequence: int) -> None:
        """Raises `sequence_conflict` for a number that has been applied."""
        if sequence <= self.sequence:
            raise failure(
                "sequence_conflict", f"step {sequence} has been applied; the session is at sequence {self.sequence}"
            )

    def check_batch_size(self, size: int) -> None:
        """Raises `batch_too_large` for more samples than the settings allow."""
        most = self._limits.max_batch_size
        if size > most:
            raise failure(
                "batch_too_large",
                f"a batch of {size} samples was sent, and TRAINING__MAX_BATCH_SIZE is {most}; "
                "send smaller batches and accumulate their gradients",
                detail={"batch_size": size, "max_batch_size": most},
            )

    def expected_output(self, inputs: Mapping[str, Array], training: bool) -> Tensor | None:
        """The trained output's shape for `inputs`, as a meta tensor; None if only a real run shows it."""
        return self._expected(take_inputs(self.definition.inputs, inputs), training)

    def advance(self, batch: Batch | None, options: StepOptions) -> StepOutcome:
        """A step as `perform` makes it, without a number."""
        return self.step_on(None if batch is None else self.take(batch, options), options)

    def step_on(self, taken: Taken | None, options: StepOptions) -> StepOutcome:
        """The step itself, on a batch that `take` has checked."""
        if not self.intact:
            broken = "an update broke off half-way: the session must be restored from a checkpoint"
            raise failure("session_lost", broken)
        use_deterministic(self.spec.deterministic)
        if options.mode == "apply":
            return self._apply(options)
        if taken is None:
            raise failure("validation_failed", f"mode {options.mode} needs inputs and targets")
        outcome = self._evaluate(taken) if options.mode == "evaluate" else self._train(taken, options)
        self.state.last_inputs = taken.shapes
        return outcome

    def take(self, batch: Batch, options: StepOptions, *, values_checked: bool = False) -> Taken:
        """The batch, checked and on the device; `values_checked` where every index and target was looked at before."""
        training = options.mode != "evaluate"
        inputs = take_inputs(self.definition.inputs, batch.inputs, check_rows=not values_checked)
        counts = {port.name: tensor.shape[0] for port, tensor in zip(self.definition.inputs, inputs, strict=True)}
        size = batch.targets.shape[0] if len(batch.targets.shape) else 0
        if {*counts.values(), size} != {size}:
            raise failure("input_mismatch", f"the first axes differ: inputs {counts}, targets {size}")
        self.check_batch_size(size)
        expected, targets = self._expected(inputs, training), batch.targets
        if expected is not None:
            targets = self.loss.take_targets(expected, targets, check_values=not values_checked).to(self.device)
        shapes = [(name_of(tensor.dtype), list(tensor.shape[1:])) for tensor in inputs]
        on_device = [tensor.to(self.device) for tensor in inputs]
        return Taken(on_device, targets, expected is not None, dict(zip(counts, shapes, strict=True)))

    def _expected(self, inputs: list[Tensor], training: bool) -> Tensor | None:
        outputs = self._trial.outputs(inputs, training)
        return None if outputs is None else outputs[self.definition.trained_output]

    def _evaluate(self, taken: Taken) -> StepOutcome:
        self._set_mode(training=False)
        with self._unchanged_on_failure(), torch.no_grad():
            loss, output, targets = self._forward(taken)
            value = loss.item()
            correct, elements = self.loss.count_correct(output, targets)
        if not math.isfinite(value):
            self._refuse_nonfinite("loss", value)
            return StepOutcome(self.step, "evaluate", samples=taken.size, skipped=True)
        return StepOutcome(self.step, "evaluate", value, samples=taken.size, correct=correct, elements=elements)

    def _train(self, taken: Taken, options: StepOptions) -> StepOutcome:
        """Modes `train` and `gradients`. With gradients accumulated, `train` adds its own and applies both.

        In float16 gradients that overflow cost the batch, as with torch's GradScaler: the scale of the loss falls, and
        running statistics keep what they saw.
        """
        state = self.state
        self._set_mode(training=True)
        seed_device(self.device, derive_seed(state.seed, "step", self.step, state.accumulated_batches))
        state.keep_buffers()
        with self._unchanged_on_failure():
            loss, _, _ = self._forward(taken)
            gradients = self._backward(loss, options.group)
            if options.mode == "train" and state.accumulated is not None:
                gradients = state.add(gradients, state.accumulated)
            norms, total = self._measure(gradients)
            # Read together, after everything was asked of the device: each reading waits for it.
            value, norm = _read(loss, total)
            if math.isfinite(value) and not math.isfinite(norm) and state.back_off():
                return StepOutcome(self.step, options.mode, value, samples=taken.size, skipped=True)
            if not math.isfinite(value) or not math.isfinite(norm):
                self._refuse_nonfinite(*(("gradient norm", norm) if math.isfinite(value) else ("loss", value)))
                state.put_back_buffers()
                return StepOutcome(self.step, options.mode, samples=taken.size, skipped=True)
            reported = options.mode == "gradients" and not options.quiet
            by_name, copies = self._report(gradients, norms, options) if reported else (None, None)
        rate = update_loss = None
        if options.mode == "train":
            rate = self._update(gradients, norm, options)
            losses, batches = state.accumulated_loss + value, state.accumulated_batches + 1
            update_loss = losses / batches if options.group > 1 else None
            self._note_update(losses, batches)
        elif options.accumulate:
            state.accumulate(gradients, value)
        else:
            state.put_back_buffers()
        state.samples_seen += taken.size
        return StepOutcome(
            self.step,
            options.mode,
            value,
            norm,
            rate,
            taken.size,
            accumulated_batches=state.accumulated_batches,
            gradient_norms=by_name,
            gradients=copies,
            update_loss=update_loss,
        )

    def _apply(self, options: StepOptions) -> StepOutcome:
        gradients = self.state.accumulated
        if gradients is None:
            raise failure("validation_failed", "mode apply: no gradients are accumulated; send mode gradients first")
        norm = self._measure(gradients)[1].item()
        if not math.isfinite(norm):
            self._refuse_nonfinite("gradient norm", norm)
            self.state.drop_accumulated()
            return StepOutcome(self.step, "apply", skipped=True)
        rate = self._update(gradients, norm, options)
        self._note_update(self.state.accumulated_loss, self.state.accumulated_batches)
        return StepOutcome(self.step, "apply", None, norm, rate)

    def _note_update(self, losses: float, batches: int) -> None:
        """After an update, which was made of so many batches, with this sum of their losses."""
        state, schedule = self.state, self.spec.schedule
        state.drop_accumulated()
        if state.loss_scale is not None:
            state.loss_scale.grow()
        if isinstance(schedule, PlateauSchedule) and schedule.metric == "train":
            add_loss(state.observed, losses / batches)
            if state.observed.weight >= schedule.every_steps:
                observe(schedule, state.observed)

    def _set_mode(self, *, training: bool) -> None:
        if self._training is not training:
            set_mode(self._module, training=training, frozen_statistics=self.spec.frozen_statistics)
            self._training = training

    @contextlib.contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """Puts buffers back and drops gradients when what is inside fails, and names running out of memory."""
        try:
            yield
        except BaseException as error:
            for parameter in self.state.trained:
                parameter.grad = None
            if self._training:
                self.state.put_back_buffers()
            if is_out_of_memory(error):
                raise _out_of_memory("the step", error) from error
            if isinstance(error, IndexError):
                raise failure(
                    "input_mismatch", f"the model computed an index outside what it reads: {error}"
                ) from error
            if is_nondeterministic(error):
                reason = str(error).split(" does not have", 1)[0]
                remedy = 'use another layer, or "deterministic": false at the cost of bitwise resume'
                what = f"{reason} has no deterministic kernel on {self.device.type}; {remedy}"
                raise failure("run_failed", what) from error
            raise

    def _forward(self, taken: Taken) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, output, targets) of the module in its present mode."""
        with self._autocast():
            outputs = as_list(self._module(*taken.inputs))
        outputs = self._autocast.widened(outputs)
        if self._trial.trusting:
            self._trial.learn(taken.inputs, bool(self._training), outputs)
        output = outputs[self.definition.trained_output]
        targets = taken.targets
        if not taken.checked or not isinstance(targets, Tensor):
            targets = self.loss.take_targets(output, targets).to(self.device)
        return self.loss(output, targets), output, targets

    def _backward(self, loss: Tensor, group: int) -> Gradients:
        """Gradients of `loss` / `group` in memory of their own, in the order of the trained parameters."""
        if not loss.requires_grad:
            raise failure("model_invalid", "no trained parameter takes part in the output that the loss is taken of")
        # backward() and not autograd.grad(): it gives each parameter a gradient that shares memory with no other.
        scale = self.state.loss_scale
        loss = loss if group == 1 else loss / group
        (loss if scale is None else loss * scale.scale).backward()
        gradients = [parameter.grad for parameter in self.state.trained]
        for parameter in self.state.trained:
            parameter.grad = None
        if scale is not None:
            self.state.lists.mul_([gradient for gradient in gradients if gradient is not None], 1 / scale.scale)
        return gradients

    def _measure(self, gradients: Gradients) -> tuple[list[Tensor], Tensor]:
        """Each gradient's norm, and the norm of all together, on the device."""
        norms = list(self.state.lists.norm([gradient for gradient in gradients if gradient is not None]))
        return norms, torch.linalg.vector_norm(torch.stack(norms))

    def _report(
        self, gradients: Gradients, norms: list[Tensor], options: StepOptions
    ) -> tuple[dict[str, float], dict[str, Tensor] | None]:
        """The norms by name and, where asked for, copies of the gradients on the host."""
        pairs = zip(self.state.model.trained, gradients, strict=True)
        named = {name: gradient for name, gradient in pairs if gradient is not None}
        by_name = dict(zip(named, torch.stack(norms).tolist(), strict=True))
        if not options.return_gradients:
            return by_name, None
        return by_name, {name: gradient.to("cpu", copy=True) for name, gradient in named.items()}

    def _update(self, gradients: Gradients, norm: float, options: StepOptions) -> float:
        """Clips, then updates the parameters; the learning rate that was used. Uses the gradients up."""
        rate = self.learning_rate if options.learning_rate is None else options.learning_rate
        clip = options.gradient_clip_norm
        self.intact = False
        try:
            if clip is not None and norm > clip:
                self.state.lists.mul_([g for g in gradients if g is not None], clip / (norm + 1e-6))
            self.state.updater.update(gradients, rate)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise _out_of_memory("the update, which broke off half-way,", error) from error
            raise
        self.intact = True
        return rate

    def _refuse_nonfinite(self, what: str, value: float) -> None:
        """Raises `nonfinite_loss` unless the session passes over such batches."""
        if self.spec.on_nonfinite == "stop":
            raise failure(
                "nonfinite_loss",
                f"step {self.step + 1}: the {what} is {value}; the session stays at step {self.step}. "
                "Lower the learning rate, clip the gradients, or look at the batch",
                detail={"step": self.step + 1, "what": what, "value": str(value), "last_good_step": self.step},
            )


def _read(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Both numbers on the host, in one reading where they are of one dtype."""
    if loss.dtype != norm.dtype:
        return loss.item(), norm.item()
    value, total = torch.stack((loss.detach(), norm)).tolist()
    return value, total


def _out_of_memory(what: str, error: BaseException) -> OperationError:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else "no memory"
    return failure("out_of_memory", f"{what} ran out of device memory: {reason}; send smaller batches or free memory")
