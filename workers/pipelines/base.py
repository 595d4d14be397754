"""What every pipeline is made of: its parts on the device, a run's context, and what a run gives."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from device_operations.errors import OperationError, failure
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.onnx.session import FUSED
from workers.devices.values import SessionOptions
from workers.execution.claimed_job import Progress
from workers.pipelines.files import Part
from workers.resident.batching import Batching

if TYPE_CHECKING:
    from workers.devices.base import Device

T = TypeVar("T")

#: What most pipelines say of joining their runs.
OF_PIPELINE = Batching(False, "a pipeline's runs go in steps")

#: Steps whose mean says how long those to come will take.
RECENT_STEPS = 8


class Parts:
    """The graphs of one pipeline on its device; with `low_memory` at most one of them is there at a time.

    A part that was evicted comes back when a run needs it.
    """

    def __init__(self, parts: Sequence[Part], root: Path, options: Mapping[str, Any]) -> None:
        self._parts = {part.name: part for part in parts}
        self._root = root
        self._options = options
        self.low_memory = bool(options.get("low_memory"))
        self._check_free_dimensions()
        #: The parts that are open, the least recently used first.
        self._open: dict[str, LoadedGraph] = {}
        self._evicted: set[str] = set()
        self._device: Device | None = None
        #: What each part took when it was opened first, in bytes, and how long that was, in milliseconds.
        self._memory_bytes: dict[str, int] = {}
        self._load_ms: dict[str, float] = {}
        self._fallbacks: dict[str, int | None] = {}
        self.provider = ""
        #: Makes room on the device when memory runs out while a part is opened; False if there is nothing to evict.
        self.evict: Callable[[], bool] = lambda: False
        #: Records what the parts need now, and makes room for it: called before a part that was evicted is opened.
        self.returning: Callable[[], None] = lambda: None

    @property
    def device(self) -> Device:
        """The device that the parts are opened on."""
        assert self._device is not None, "the parts are opened first"
        return self._device

    @property
    def binds(self) -> bool:
        """Whether torch's tensors on the device are ONNX Runtime's too; elsewhere all passes through the host."""
        return self.device.provider().binding is not None

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Part:
        """What is known of a part from its file, loaded or not."""
        return self._parts[name]

    def open(self, device: Device, cancel: Cancel | None) -> None:
        """Opens each part on the device; with `low_memory` each is closed again, and known to load by then.

        What was opened is closed where one of them fails. Raises what `Device.open_model` does.
        """
        self._device = device
        try:
            for name in self._parts:
                self.get(name, cancel)
        except BaseException:
            self.close()
            raise
        self.rest()

    def get(self, name: str, cancel: Cancel | None = None) -> LoadedGraph:
        """The part as a model that can be run now. Another run may have closed it since the last call."""
        model = self._open.pop(name, None)
        if model is None:
            self.rest()
            model = self._back(name, cancel) if name in self._evicted else self._open_part(self._parts[name], cancel)
        self._open[name] = model
        return model

    def open_apart(self, name: str, content: bytes, cancel: Cancel | None) -> LoadedGraph:
        """A changed graph of a part, out of its bytes, on the device; the caller closes it."""
        self.rest()
        return self._opened(self._parts[name], content, cancel)

    def rest(self) -> None:
        """With `low_memory`, closes what is open: no run needs it for now."""
        if self.low_memory:
            self.close()

    def evict_part(self) -> bool:
        """Closes the part that was used longest ago; False where no more than one is open, as with `low_memory`."""
        if len(self._open) < 2:
            return False
        name = next(iter(self._open))
        self._open.pop(name).close()
        self._evicted.add(name)
        return True

    def close(self) -> int | None:
        """Closes all parts; the bytes freed, as measured, None if that cannot be measured."""
        freed: int | None = 0
        while self._open:
            _, model = self._open.popitem()
            given_back = model.close()
            freed = None if freed is None or given_back is None else freed + given_back
        return freed

    @property
    def memory_bytes(self) -> int:
        """What the parts need: all of them that were not evicted, or with `low_memory` the largest."""
        each = [size for name, size in self._memory_bytes.items() if name not in self._evicted]
        return max(each, default=0) if self.low_memory else sum(each)

    @property
    def file_bytes(self) -> int:
        """Bytes of all parts' files, external data included."""
        return sum(part.file_bytes for part in self._parts.values())

    @property
    def load_ms(self) -> float:
        """Milliseconds that opening all parts took."""
        return sum(self._load_ms.values())

    @property
    def cpu_fallback_ops(self) -> int | None:
        """How many nodes of all parts run on the CPU instead of the device; None if that cannot be counted."""
        known = [count for count in self._fallbacks.values() if count is not None]
        return sum(known) if len(known) == len(self._fallbacks) else None

    def facts(self) -> list[dict[str, Any]]:
        """Each part as the model's record holds it; sizes in bytes, `load_ms` in milliseconds."""
        return [
            {
                "name": name,
                "memory_bytes": self._memory_bytes.get(name),
                "file_bytes": part.file_bytes,
                "dtype": part.dtype,
                "load_ms": round(self._load_ms.get(name, 0.0), 3),
                "evicted": name in self._evicted,
            }
            for name, part in self._parts.items()
        ]

    def _back(self, name: str, cancel: Cancel | None) -> LoadedGraph:
        """A part that was evicted, opened again."""
        self._evicted.discard(name)
        try:
            self.returning()
            return self._open_part(self._parts[name], cancel)
        except BaseException:
            self._evicted.add(name)
            self.returning()
            raise

    def _open_part(self, part: Part, cancel: Cancel | None) -> LoadedGraph:
        part.check_unchanged()
        model = self._opened(part, part.file, cancel)
        self.provider = model.provider
        if part.name not in self._memory_bytes:
            # At least the file's own size: the system's figure is rounded, shared, or not to be had.
            self._memory_bytes[part.name] = max(model.memory_bytes or 0, part.file_bytes)
            self._load_ms[part.name] = model.load_ms
            self._fallbacks[part.name] = model.cpu_fallback_ops
        return model

    def _opened(self, part: Part, source: Path | bytes, cancel: Cancel | None) -> LoadedGraph:
        """Opens a graph with the options of the load; pipelines that are idle make room where memory runs out."""
        wanted = SessionOptions(
            intra_op_threads=self._options.get("intra_op_threads"),
            graph_optimization=self._level(part),
            free_dimensions={name: size for name, size in self._free_dimensions().items() if name in part.symbols},
            root=self._root,
        )
        while True:
            try:
                return self.device.open_model(source, wanted, cancel)
            except OperationError as error:
                if error.code == "model_invalid":
                    raise failure("model_invalid", f"{part.name}: {error.message}", detail=error.detail) from error
                if error.code != "out_of_memory" or not self.evict():
                    raise

    def _level(self, part: Part) -> str:
        """The level asked for; at all of them, halves on CUDA have their operators joined too."""
        level: str = self._options.get("graph_optimization", "all")
        joins = level == "all" and self.device.backend == "cuda" and part.dtype == "float16"
        return FUSED if joins else level

    def _free_dimensions(self) -> Mapping[str, int]:
        return self._options.get("free_dimensions") or {}

    def _check_free_dimensions(self) -> None:
        known = {symbol for part in self._parts.values() for symbol in part.symbols}
        unknown = sorted(set(self._free_dimensions()) - known)
        if unknown:
            raise failure(
                "model_invalid",
                f"no part has a free dimension {', '.join(unknown)}; there are {', '.join(sorted(known)) or 'none'}",
            )


@dataclass(slots=True)
class RunContext:
    """One run of a pipeline: its request as stored, and what it may reach.

    `tensor` gives a field's tensor as an array, `picture` a picture's file as bytes, `keep` stores bytes as a blob of
    the job's owner and gives its id.
    """

    request: Mapping[str, Any]
    cancel: Cancel
    tensor: Callable[[str], Array]
    picture: Callable[[Mapping[str, Any]], bytes]
    keep: Callable[[bytes], str]
    #: Rows that may run together, by the model's load (`Pipeline.batching`).
    max_rows: int = 1


@dataclass(frozen=True, slots=True)
class PixelImage:
    """An image that a run made: `[H, W, 3]` of uint8, which is encoded off the device's thread; `facts` go with it."""

    pixels: Array
    format: Literal["png", "webp"]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gives: tensors by name, images in order, and more fields of the job's result."""

    outputs: Mapping[str, Array] = field(default_factory=dict)
    images: Sequence[PixelImage] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


Steps = Generator[Progress, None, Result]


class Pipeline(ABC):
    """A model made of parts. Its methods are called on the device's thread."""

    model_type: ClassVar[str]

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @classmethod
    @abstractmethod
    def read(cls, source: Path, root: Path, options: Mapping[str, Any]) -> Self:
        """Reads and checks everything that can be checked without loading a graph. Raises `model_invalid`.

        `source` is a folder, or the file of a single graph; nothing outside `root` may be read.
        """

    @abstractmethod
    def run(self, run: RunContext) -> Steps:
        """Runs in steps; what the request has wrong is raised before the first.

        A cancelled or overdue run raises within the step that is under way if that passes `run.cancel` on. What it
        holds on the device it gives back in a `finally`. Between steps other runs of this pipeline may go: it keeps
        nothing of a run in itself.
        """

    def about(self) -> dict[str, Any]:
        """What callers may want to know of it, for the result of its load."""
        return {}

    def batching(self, asked: int | None) -> tuple[int, Batching]:
        """How many rows may run together, of one run or of several, where a load asked for `asked`; and why."""
        return asked or 1, OF_PIPELINE

    def takes_steps(self, request: Mapping[str, Any], max_rows: int) -> bool:
        """Whether a run goes in steps; a short one goes at once, joined with others where `batch_of` says so."""
        return True

    def batch_of(self, request: Mapping[str, Any], max_rows: int) -> tuple[Hashable, int] | None:
        """The key under which runs may be joined, and how many; None for a run that goes alone."""
        return None

    def run_joined(self, runs: Sequence[RunContext]) -> list[Result | OperationError]:
        """Runs what does not take steps, and gives each run's result or failure. Raises what fails them all."""
        raise NotImplementedError(f"{type(self).__name__} takes steps")

    # ---- what it has in common with a single graph

    def open(self, device: Device, cancel: Cancel | None) -> None:
        """Opens the parts on the device."""
        self.parts.open(device, cancel)

    def close(self) -> int | None:
        """Closes the parts; the bytes freed, as measured."""
        return self.parts.close()


class Pace:
    """Counts steps and says how long the rest will take, by the device's own time: pauses between steps do not count.

    Steps of one kind take equally long: `left` multiplies the mean of the last `RECENT_STEPS`.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self._took: list[float] = []
        self._began = time.perf_counter()

    def step(self, *, then_seconds: float = 0.0, always: bool = False, **more: Any) -> Iterator[Progress]:
        """Ends a step and yields its progress. `then_seconds` is what comes after the last step."""
        self._took.append(time.perf_counter() - self._began)
        self.done += 1
        # The first step of a shape takes longer than those after it.
        recent = self._took[1:][-RECENT_STEPS:] or self._took
        left = (self.steps - self.done) * sum(recent) / len(recent) + then_seconds
        yield Progress({"done": self.done, "total": self.steps, "seconds_left": round(left, 3), **more}, always=always)
        self._began = time.perf_counter()

    def pause(self) -> Iterator[Progress]:
        """Yields without ending a step, and without anything to report."""
        yield Progress()
        self._began = time.perf_counter()


def run_to_end(steps: Generator[object, None, T]) -> T:
    """What steps give, one after the other with nothing between: for benchmarks and tests of a pipeline alone."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            made: T = stop.value
            return made
