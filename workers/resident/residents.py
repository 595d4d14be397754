"""What lies on the device between jobs: allocations, models, sessions. Only the executor's thread changes it."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine

from device_operations.settings import Settings
from tasks.blobs.store import BlobStore
from tasks.blobs.transients import Transients
from tasks.database import until_reachable
from tasks.jobs.model import StoredRequest
from tasks.statements import Row
from workers.devices.arrays import Buffer
from workers.devices.base import Device
from workers.devices.onnx.runtime import LoadedGraph
from workers.devices.onnx.tensors import Feed
from workers.resident.batching import Batching
from workers.stored_tensors import InAllocation, decode_place

if TYPE_CHECKING:
    from workers.operations.training.sessions import HeldSession
    from workers.operations.transfers import Transfers
    from workers.pipelines.base import Pipeline
    from workers.training.model.definition import Learned

P = ParamSpec("P")
T = TypeVar("T")

#: How long a load that holds the interpreter may take: so much, and as long as reading the file this fast would take.
LOAD_SECONDS, LOAD_BYTES_PER_SECOND, LONGEST_LOAD_SECONDS = 30.0, 32 << 20, 600.0

#: Until a model was asked, its runs go alone.
ALONE = Batching(False, "not found out")


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """What lies on the device for models of equal content and session options; it goes with the last of them."""

    content_key: str
    loaded: LoadedGraph | Pipeline
    memory_bytes: int

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline, where it is one and not a single graph."""
        return None if isinstance(self.loaded, LoadedGraph) else self.loaded

    @property
    def cpu_fallback_ops(self) -> int | None:
        """How many of its operators run on the CPU instead of the device; None if that cannot be counted."""
        loaded = self.loaded
        return loaded.cpu_fallback_ops if isinstance(loaded, LoadedGraph) else loaded.parts.cpu_fallback_ops


@dataclass(slots=True, eq=False)
class ResidentModel:
    """A loaded model. Runs are joined where `batching` says that they may be, and go alone otherwise."""

    model_id: str
    name: str
    graph: Graph
    pinned: bool = False
    max_batch_size: int = 1
    max_delay_ms: float = 0.0
    batching: Batching = ALONE
    last_used: float = 0.0
    #: How long the last run had the device.
    device_ms: float = 0.0

    @property
    def onnx(self) -> LoadedGraph:
        """The session that runs it, maybe shared with other models; a pipeline has several."""
        loaded = self.graph.loaded
        assert isinstance(loaded, LoadedGraph), f"{self.name} is a pipeline"
        return loaded

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline that runs it, where it is one and not a single graph."""
        return self.graph.pipeline

    def batch_of_request(self, request: StoredRequest) -> tuple[Hashable, int] | None:
        """The key under which a run may be joined with others, and how many; a pipeline says so itself."""
        pipeline = self.pipeline
        if pipeline is None:
            return self.batch_of(request["inputs"], request.get("outputs"))
        batch = pipeline.batch_of(request, self.max_batch_size)
        return None if batch is None else ((self.model_id, batch[0]), batch[1])

    def batch_of(self, inputs: Mapping[str, StoredRequest], outputs: list[str] | None) -> tuple[Hashable, int] | None:
        """The key under which runs may be joined, and how many; None for a run that goes alone.

        Joined runs have the same inputs, dtypes and shapes, at least one row, and equal scalars.
        """
        if not self.batching.enabled:
            return None
        onnx = self.onnx
        # What stands for one of the model's own weights holds for a whole run.
        if any(spec.name in inputs for spec in onnx.optional_inputs):
            return None
        rows = None
        key: list[Hashable] = [self.model_id, tuple(outputs) if outputs else None]
        for name in sorted(inputs):
            tensor = inputs[name]
            shape = tensor["shape"]
            place = decode_place(tensor)
            if isinstance(place, InAllocation) or name not in onnx.row_inputs:
                return None
            if not shape:
                # As text: the elements themselves may be lists, which no key may hold.
                key.append((name, tensor["dtype"], repr(place)))
                continue
            rows = shape[0] if rows is None else rows
            if shape[0] != rows or math.prod(shape) == 0:
                return None
            key.append((name, tensor["dtype"], tuple(shape)))
        if not rows or rows * 2 > self.max_batch_size:
            return None
        return tuple(key), self.max_batch_size // rows


@dataclass(slots=True, eq=False)
class ResidentSession:
    """A session's state tensors on the device, by the input that each feeds next; `state_map` is output to input."""

    session_id: str
    model_id: str
    state_map: dict[str, str]
    state: dict[str, Feed] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Resident:
    """Everything that one epoch of one device holds, and what operations need to reach beyond it."""

    device_id: str
    epoch: int
    device: Device
    engine: Engine
    settings: Settings
    blobs: BlobStore
    allocations: dict[str, Buffer] = field(default_factory=dict)
    #: The sha256 of all bytes of an allocation, where it is known; an operation that changes any of them removes it.
    hashes: dict[str, str] = field(default_factory=dict)
    #: What brings bytes from other devices; None where there are no others to ask.
    transfers: Transfers | None = None
    models: dict[str, ResidentModel] = field(default_factory=dict)
    #: The graphs of `models`, by their content key.
    graphs: dict[str, Graph] = field(default_factory=dict)
    sessions: dict[str, ResidentSession] = field(default_factory=dict)
    training: dict[str, HeldSession] = field(default_factory=dict)
    #: What training sessions have learned of their networks, by structure.
    networks: OrderedDict[str, Learned] = field(default_factory=OrderedDict)
    #: What the device's thread does, one at a time, while no job waits in its scheduler, between a long job's steps
    #: too: nothing that keeps the next one long.
    spare: deque[Callable[[], None]] = field(default_factory=deque)
    #: Pinned host memory in which a batch is gathered, by the input's name, where the device has such.
    pinned: dict[str, memoryview] = field(default_factory=dict)
    #: Whether the process is to end once it is idle, because its backend gives memory back in no other way.
    recycle: bool = False
    #: Threads for what a job, or the device, need not wait for: writing checkpoints.
    background: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="background")
    )
    #: Writes something to the records on the completer's thread, after what was handed over to be recorded before.
    record: Callable[[Callable[[], None]], None] = lambda step: step()
    #: Announces jobs that this worker ended without having run them.
    announce: Callable[[list[Row]], None] = lambda rows: None
    #: Keeps the device ours for so many seconds more while no other thread of this process can run.
    extend_lease: Callable[[float], AbstractContextManager[None]] = lambda seconds: nullcontext()
    transients: Transients = field(init=False)
    _load_holds_interpreter: bool = field(init=False)

    def __post_init__(self) -> None:
        self.transients = Transients(self.blobs)
        self._load_holds_interpreter = bool(self.device.describe().capabilities.get("load_holds_interpreter"))

    @property
    def spool(self) -> Path:
        """The folder in which this device's training files are written before they become blobs."""
        return self.settings.training.checkpoint_path / self.device_id

    def read(self, statement: Callable[Concatenate[Connection, P], T], *given: P.args, **more: P.kwargs) -> T:
        """What one of the store's statements reads; while the database is away a job waits, and does not fail."""

        def once() -> T:
            with self.engine.connect() as connection:
                return statement(connection, *given, **more)

        return until_reachable(once)

    def device_ms(self, model_id: str | None) -> float:
        """Milliseconds for which the model's last batch had the device; 0 where there was none."""
        model = self.models.get(model_id or "")
        return model.device_ms if model is not None else 0.0

    def loading(self, size_bytes: int) -> AbstractContextManager[None]:
        """What a model of so many bytes is loaded inside: the lease outlasts it if no thread can renew it meanwhile."""
        if not self._load_holds_interpreter:
            return nullcontext()
        return self.extend_lease(min(LONGEST_LOAD_SECONDS, LOAD_SECONDS + size_bytes / LOAD_BYTES_PER_SECOND))

    def cpu_fallback_ops(self) -> int:
        """How many operators of the resident graphs run on the CPU instead of the device."""
        return sum(graph.cpu_fallback_ops or 0 for graph in list(self.graphs.values()))
