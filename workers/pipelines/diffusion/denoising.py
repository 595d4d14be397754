"""The loop of a diffusion model: latents stay on the device from step to step where the backend binds tensors.

    latents ─▶ scaled ─▶ sample (once, or twice for guidance) ─▶ UNet ─▶ predicted ─▶ guided ─▶ scheduler ─▶ latents

`run_to_end` drives it, as any other steps, where there is no executor: in benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array, Buffer, BufferView
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.onnx.tensors import Feed, TensorSpec
from workers.execution.claimed_job import Progress
from workers.pipelines.base import Pace, Parts
from workers.pipelines.diffusion.schedulers import Schedule

if TYPE_CHECKING:
    from workers.devices.base import Device


@dataclass(frozen=True, slots=True)
class Unet:
    """What the loop needs to know of the graph: its name among the parts, and its inputs and output."""

    part: str
    sample: TensorSpec
    timestep: TensorSpec
    predicted: TensorSpec


@dataclass(frozen=True, slots=True)
class Conditions:
    """What goes into each step besides latents and timestep, by the input's name, `[k, …]` each.

    k is 2 with guidance, the negative half first, else 1.
    """

    values: Mapping[str, Array]
    guidance_scale: float

    @property
    def copies(self) -> int:
        """How many copies of the latents each step takes."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True, slots=True)
class Preview:
    """After `every` so many steps, `show` takes the foreseen latents `[1, c, h, w]` and gives what progress says."""

    every: int
    show: Callable[[Array], dict[str, Any]]


class _Bound:
    """Tensors in buffers of the device, which torch and ONNX Runtime share."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[Buffer] = []

    def place(self, dtype: str, shape: tuple[int, ...]) -> tuple[BufferView, torch.Tensor]:
        """A tensor of zeros, as both see it."""
        buffer = self._device.allocate(max(1, numpy_dtype(dtype).itemsize * math.prod(shape)))
        self._buffers.append(buffer)
        return BufferView(buffer, 0, dtype, shape), self._device.tensor_view(buffer, dtype, shape)

    def put(self, values: Array) -> BufferView:
        """The host's values."""
        view, tensor = self.place(values.dtype.name, values.shape)
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        return view

    def release(self) -> None:
        while self._buffers:
            self._device.release(self._buffers.pop())


@contextmanager
def _buffers(device: Device) -> Iterator[_Bound]:
    bound = _Bound(device)
    try:
        yield bound
    finally:
        bound.release()


def denoise(
    parts: Parts,
    unet: Unet,
    schedule: Schedule,
    latents: torch.Tensor,
    conditions: Conditions,
    generator: torch.Generator,
    cancel: Cancel,
    pace: Pace,
    *,
    then_seconds: float = 0.0,
    preview: Preview | None = None,
) -> Generator[Progress, None, Array]:
    """The latents `[1, c, h, w]` of one image after all steps of `schedule`, on the host.

    `latents` are those before the first step, on the host. `then_seconds` is what follows the last step.
    """
    image = _Image(parts, unet, schedule, conditions, generator, cancel)
    steps = (_on_device if parts.binds else _through_host)(image, latents)
    number = 0
    try:
        while True:
            try:
                foreseen = next(steps)
            except StopIteration as stop:
                made: Array = stop.value
                return made
            number += 1
            shown: dict[str, Any] = {}
            if preview is not None and number % preview.every == 0 and number < len(schedule.timesteps):
                shown["preview"] = preview.show(foreseen.float().cpu().numpy())
            yield from pace.step(then_seconds=then_seconds, always=bool(shown), **shown)
    finally:
        steps.close()  # however the run ends, what it held on the device is given back now


#: Yields the foreseen latents after each step, and returns those after the last.
_Loop = Generator[torch.Tensor, None, Array]


@dataclass(frozen=True, slots=True)
class _Image:
    """What each step of one image needs besides its latents."""

    parts: Parts
    unet: Unet
    schedule: Schedule
    conditions: Conditions
    generator: torch.Generator
    cancel: Cancel

    def shape(self, latents: torch.Tensor) -> tuple[int, ...]:
        """The shape of what a step takes and predicts."""
        return (self.conditions.copies, *latents.shape[1:])

    def model(self) -> LoadedGraph:
        """The graph, which another run may have closed since the step before."""
        return self.parts.get(self.unet.part, self.cancel)

    def stepped(
        self, predicted: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents after a step, and what is foreseen of the last ones: by the scheduler, or these."""
        guided = _guided(predicted.float(), self.conditions)
        latents, foreseen = self.schedule.step(guided, timestep, latents, self.generator)
        return latents, latents if foreseen is None else foreseen


def _on_device(image: _Image, latents: torch.Tensor) -> _Loop:
    """Each step is asked for while the one before it is under way, so that the device has no time between them.

    What is yielded is done. With `low_memory` the graph may be closed between two steps, and none is asked for ahead.
    """
    device, unet, shape = image.parts.device, image.unet, image.shape(latents)
    with _buffers(device) as bound:
        sample_view, sample = bound.place(unet.sample.dtype, shape)
        predicted_view, predicted = bound.place(unet.predicted.dtype, shape)
        fixed: dict[str, Feed] = {name: bound.put(values) for name, values in image.conditions.values.items()}
        latents = latents.to(sample.device)
        device.synchronize()  # what was placed until here was in no queue of models
        under_way: list[tuple[Callable[[], None], torch.Tensor]] = []
        try:
            for timestep in image.schedule.timesteps:
                model = image.model()
                with device.queue():
                    sample.copy_(image.schedule.scaled(latents, timestep).expand(shape))
                    time = _time(unet.timestep, timestep, shape)
                    feeds = {**fixed, unet.sample.name: sample_view, unet.timestep.name: time}
                    into = {unet.predicted.name: predicted_view}
                    model.run(feeds, [], into=into, cancel=image.cancel, queued=True)
                    latents, foreseen = image.stepped(predicted, timestep, latents)
                under_way.append((device.queued(), foreseen))
                if image.parts.low_memory or len(under_way) > 1:
                    yield _done(under_way)
            while under_way:
                yield _done(under_way)
            return latents.float().cpu().numpy()
        finally:
            device.queued()()  # nothing is given back that a step still writes to


def _done(under_way: list[tuple[Callable[[], None], torch.Tensor]]) -> torch.Tensor:
    """What the first of the steps under way gave, once it is over."""
    wait, made = under_way.pop(0)
    wait()
    return made


def _through_host(image: _Image, latents: torch.Tensor) -> _Loop:
    unet, shape = image.unet, image.shape(latents)
    dtype = numpy_dtype(unet.sample.dtype)
    for timestep in image.schedule.timesteps:
        scaled = image.schedule.scaled(latents, timestep).expand(shape).numpy().astype(dtype)
        feeds: dict[str, Feed] = {
            **image.conditions.values,
            unet.sample.name: np.ascontiguousarray(scaled),
            unet.timestep.name: _time(unet.timestep, timestep, shape),
        }
        name = unet.predicted.name
        predicted = image.model().run(feeds, [name], cancel=image.cancel)[name]
        latents, foreseen = image.stepped(torch.from_numpy(np.asarray(predicted, np.float32)), timestep, latents)
        yield foreseen
    return latents.float().numpy()


def _guided(predicted: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    if conditions.copies == 1:
        return predicted.clone()  # the next step writes over it, and some schedulers keep it
    negative, positive = predicted.chunk(2)
    return negative + conditions.guidance_scale * (positive - negative)


def _time(spec: TensorSpec, timestep: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """The timestep as the graph takes it: a number, one for the batch, or one for each of it."""
    dtype = numpy_dtype(spec.dtype)
    if not spec.shape:
        return np.asarray(float(timestep)).astype(dtype)
    side = spec.shape[0]
    # A named side may be the batch's own; a graph that takes any length takes that of the batch.
    count = side if isinstance(side, int) else shape[0] if side in _BATCH else 1
    return np.full(count, float(timestep)).astype(dtype)


#: What exporters call the side of a batch.
_BATCH = ("batch_size", "batch", "n", "N", "B")
