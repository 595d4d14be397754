"""Everything a step may change, in one place: what a checkpoint holds, and what a failed step puts back."""

from __future__ import annotations

import torch
from torch import Tensor

from device_operations.errors import failure
from device_operations.requests.training import Initialize
from device_operations.wire.json_types import JsonObject
from workers.training.checkpoints import FORMAT, Snapshot
from workers.training.memory import count_bytes
from workers.training.model.definition import Definition
from workers.training.model.on_device import DeviceModel
from workers.training.optimization.optimizers import Lists, Updater
from workers.training.optimization.precision import LossScale
from workers.training.optimization.schedules import Observed

#: Gradients in the order of the trained parameters; None for one that the loss does not use.
Gradients = list[Tensor | None]


class SessionState:
    """Parameters, buffers, optimizer, accumulated gradients and counters of one session, on its device."""

    def __init__(self, spec: Initialize, definition: Definition, model: DeviceModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.lists = Lists(device)
        self.trained = list(model.trained.values())
        self.updater = Updater(spec.optimizer, self.trained, self.lists)
        self.seed = spec.seed
        #: Number of the last request applied.
        self.sequence = 0
        #: Samples that gradients were taken of.
        self.samples_seen = 0
        self.accumulated: Gradients | None = None
        self.accumulated_batches = 0
        #: The sum of the accumulated batches' losses.
        self.accumulated_loss = 0.0
        #: What a schedule of type `plateau` has seen.
        self.observed = Observed()
        #: Only in float16.
        self.loss_scale = LossScale() if spec.precision == "float16" else None
        #: Sequence and batches done of a dataset job that has not ended.
        self.unfinished_run: tuple[int, int] | None = None
        #: Dtype and shape of one sample of the inputs last taken, by name: what an export is traced with.
        self.last_inputs: dict[str, tuple[str, list[int]]] | None = None
        self._fingerprint = model.fingerprint(definition, spec)
        self._changing = list(model.buffers.values())
        self._kept = [torch.empty_like(buffer) for buffer in self._changing]

    @property
    def step(self) -> int:
        """How many updates the parameters have had."""
        return self.updater.steps

    def memory_bytes(self) -> int:
        """Bytes of parameters, buffers, gradients, optimizer state and accumulated gradients."""
        gradients = self.trained  # as large as their parameters, and there during every step
        model = [*self.model.parameters.values(), *self.model.module.buffers()]
        held = [*model, *gradients, *self.updater.tensors(), *self._kept]
        return count_bytes(held) + count_bytes(g for g in self.accumulated or () if g is not None)

    def keep_buffers(self) -> None:
        """Remembers the buffers as they are, before a forward pass changes them."""
        if self._changing:
            self.lists.copy_(self._kept, self._changing)

    def put_back_buffers(self) -> None:
        """The buffers as they were when last kept."""
        if self._changing:
            self.lists.copy_(self._changing, self._kept)

    def back_off(self) -> bool:
        """Lowers the scale of the loss after an overflow; False where there is no scale that could be at fault."""
        if self.loss_scale is None or self.loss_scale.scale <= 1:
            return False
        self.loss_scale.back_off()
        return True

    def accumulate(self, gradients: Gradients, loss: float) -> None:
        """Adds one batch's gradients, whose memory it takes over, and its loss."""
        total = self.accumulated
        self.accumulated = gradients if total is None else self.add(total, gradients)
        self.accumulated_batches += 1
        self.accumulated_loss += loss

    def drop_accumulated(self) -> None:
        """Forgets the accumulated gradients: they have been applied."""
        self.accumulated, self.accumulated_batches, self.accumulated_loss = None, 0, 0.0

    def add(self, gradients: Gradients, others: Gradients) -> Gradients:
        """`others` added to `gradients`, in the memory of the first where both are there."""
        pairs = [(g, o) for g, o in zip(gradients, others, strict=True) if g is not None and o is not None]
        if pairs:
            self.lists.add_([gradient for gradient, _ in pairs], [other for _, other in pairs])
        return [other if gradient is None else gradient for gradient, other in zip(gradients, others, strict=True)]

    def snapshot(self, *, model_only: bool = False) -> Snapshot:
        """The whole state, or the model's alone, copied to the host; training may go on at once."""
        tensors: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in (self._model_tensors() if model_only else self._live_tensors()).items():
                # .cpu() is no copy where the device is the CPU.
                tensors[name] = tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
        return Snapshot(tensors, self._counters())

    def restore(self, snapshot: Snapshot) -> None:
        """Puts everything where `snapshot` has it, the seed included; changes nothing where it does not fit.

        Raises `model_invalid` for a checkpoint of another model.
        """
        live = self._live_tensors(accumulated=False)
        self._check_same_model(snapshot, live)
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(snapshot.tensors[name])
        state, gradients = snapshot.state, snapshot.part("accumulated/")
        moved = {name: tensor.to(self.device, copy=True) for name, tensor in gradients.items()}
        self.accumulated = [moved.get(name) for name in self.model.trained] if moved else None
        self.accumulated_batches = state["accumulated_batches"]
        # A checkpoint of an earlier version has none of these.
        self.accumulated_loss = state.get("accumulated_loss", 0.0)
        self.observed = Observed(**(state.get("observed") or {}))
        if self.loss_scale is not None:
            self.loss_scale = LossScale(**(state.get("loss_scale") or {}))
        self.updater.steps, self.seed = state["step"], state["seed"]
        self.sequence, self.samples_seen = state["sequence"], state["samples_seen"]
        run, inputs = state["unfinished_run"], state["last_inputs"]
        self.unfinished_run = None if run is None else (run[0], run[1])
        self.last_inputs = None if inputs is None else {name: (dtype, shape) for name, (dtype, shape) in inputs.items()}

    def _check_same_model(self, snapshot: Snapshot, live: dict[str, Tensor]) -> None:
        theirs = snapshot.state["fingerprint"]
        differing = [part for part, value in self._fingerprint.items() if theirs.get(part) != value]
        fitting = {name for name in snapshot.tensors if not name.startswith("accumulated/")} == set(live)
        if differing or not fitting:
            raise failure(
                "model_invalid",
                f"the checkpoint is of another model: it differs in {', '.join(differing) or 'its tensors'}; "
                "give the session the checkpoint's own model and optimizer",
                detail={"differs_in": differing},
            )

    def _live_tensors(self, *, accumulated: bool = True) -> dict[str, Tensor]:
        """Every tensor of the state where it lies, by its name in a checkpoint."""
        live = self._model_tensors()
        for slot, tensors in self.updater.state.items():
            live.update({f"optimizer/{slot}/{n}": t for n, t in zip(self.model.trained, tensors, strict=True)})
        if accumulated and self.accumulated is not None:
            gradients = zip(self.model.trained, self.accumulated, strict=True)
            live.update({f"accumulated/{name}": gradient for name, gradient in gradients if gradient is not None})
        return live

    def _model_tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {f"parameter/{name}": p for name, p in self.model.parameters.items()}
        return named | {f"buffer/{name}": buffer for name, buffer in self.model.buffers.items()}

    def _counters(self) -> JsonObject:
        """What is not a tensor, as JSON.

        The learning rate follows from the step and what was observed, random numbers from seed and step.
        """
        return {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "step": self.step,
            "sequence": self.sequence,
            "unfinished_run": self.unfinished_run,
            "accumulated_batches": self.accumulated_batches,
            "accumulated_loss": self.accumulated_loss,
            "observed": self.observed.as_json(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.as_json(),
            "samples_seen": self.samples_seen,
            "seed": self.seed,
            "last_inputs": self.last_inputs,
            "torch": torch.__version__,
            "backend": self.device.type,
        }
