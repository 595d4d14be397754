"""A loaded ONNX model: one ONNX Runtime session on one device, run with arrays, buffers, or values kept on the device.

all feeds are arrays ─ Transfers ──▶ I/O binding, through pinned memory on the run's own stream
                     └ else ───────▶ InferenceSession.run                 the shortest way
buffers, `into`, `keep` ─ on cpu ──▶ arrays over the buffers' own memory
                        ├ bindable ▶ I/O binding, nothing passes through the host
                        └ else ────▶ staged through the host, counted in `staged_bytes`
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from device_operations.errors import OperationError, failure
from device_operations.tensors import ML_DTYPES, TEXT_DTYPES, numpy_dtype
from workers.devices.arrays import Array, BufferView, flat_bytes
from workers.devices.libraries import tidy
from workers.devices.onnx.bound import BoundRun, BoundRuns, only_arrays
from workers.devices.onnx.file import inspect
from workers.devices.onnx.fusions.diffusion import fused
from workers.devices.onnx.graph import read_graph
from workers.devices.onnx.offer import offer_of
from workers.devices.onnx.rewrite import EXTERNAL_FOLDER, rewritten
from workers.devices.onnx.session import (
    FUSED,
    REWRITE,
    Cancel,
    Stoppable,
    cpu_fallbacks,
    load_session,
    resolve_provider,
    session_settings,
)
from workers.devices.onnx.tensors import (
    Feed,
    Fetched,
    Kept,
    RuntimeValue,
    TensorSpec,
    drawn,
    is_aligned,
    kind,
    overlap,
    unfit,
)
from workers.devices.onnx.values import ELEMENT_TYPES, Values
from workers.devices.values import SessionOptions
from workers.rows.proof import Proof, Verdict, prove

if TYPE_CHECKING:
    from workers.devices.base import Device

__all__ = ["Cancel", "Kept", "LoadedGraph", "TensorSpec", "resolve_provider"]


#: Models whose memory is worth handing back to the system: that of a smaller one is soon taken again.
TRIM_BYTES = 1 << 20


class LoadedGraph:
    """One model on one device. Runs are made from one thread at a time; `Cancel.trip` comes from any."""

    def __init__(
        self, device: Device, source: Path | bytes, options: SessionOptions, cancel: Cancel | None = None
    ) -> None:
        """Loads a file, or the bytes of one that refers to no other.

        Raises `model_invalid`, `out_of_memory`, `device_unavailable`, `device_lost`, `cancelled`.
        """
        self.device = device
        self._provider = device.provider()
        self.provider = self._provider.name
        resolve_provider(self.provider)
        name = source.name if isinstance(source, Path) else "the model"
        about = inspect(source, options.root)
        settings = session_settings(options, self._provider, about.symbols, name)
        started = time.perf_counter()
        if options.graph_optimization == REWRITE:
            if isinstance(source, Path):
                settings.add_session_config_entry(EXTERNAL_FOLDER, str(source.parent))
            source = rewritten(source, name)
            device.trim()  # what writing took is none of the model's memory
        elif options.graph_optimization == FUSED and isinstance(source, Path):
            settings.add_session_config_entry(EXTERNAL_FOLDER, str(source.parent))
            source = fused(source)
            device.trim()
        held = device.held_bytes()
        # ONNX Runtime lets other threads run while it loads.
        with ThreadPoolExecutor(1, thread_name_prefix="proof") as prover:
            proof = prover.submit(_proven, source, options.free_dimensions)
            self._session: ort.InferenceSession | None = load_session(
                device, source, name, settings, self._provider, cancel
            )
        #: Milliseconds that loading took.
        self.load_ms = (time.perf_counter() - started) * 1e3
        #: Whether rows of a batch leave each other alone, as the graph that is run has it.
        self.rows: Verdict = proof.result()
        #: Bytes that the process holds more on the device since the load, as measured; None if it cannot be measured.
        self.memory_bytes = _grown(held, device.held_bytes())
        #: Bytes of the model's files, external data included.
        self.file_bytes = about.size_bytes
        #: Bytes that the last run moved through the host for the sake of buffers.
        self.staged_bytes = 0
        self.cpu_fallback_ops = cpu_fallbacks(self._session, self.provider)
        offer = offer_of(self._session, name)
        #: What every run is given, what it may be given, what it gives, and what of the model has no form here.
        self.inputs, self.optional_inputs, self.outputs = offer.inputs, offer.optional_inputs, offer.outputs
        self.not_offered = offer.not_offered
        #: What `rows` was proven for: the inputs that every run gives. An initializer that a run overrides is none.
        self.row_inputs = frozenset(found.name for found in self._session.get_inputs())
        self._input_specs = {spec.name: spec for spec in (*self.inputs, *self.optional_inputs)}
        self._output_specs = {spec.name: spec for spec in self.outputs}
        self._output_names = [spec.name for spec in self.outputs]
        every = (*self._input_specs.values(), *self.outputs)
        #: Whether some input or output is no tensor, or is one that NumPy has not: those pass one by one.
        self._has_values = any(spec.values is not None for spec in every)
        self._has_ml_dtypes = any(spec.dtype in ML_DTYPES for spec in every)
        self._only_numpy = not (self._has_values or self._has_ml_dtypes)
        # Of a bound optional output that a run gives no value for, ONNX Runtime reads memory that is not there.
        arguments = (*self._session.get_inputs(), *self._session.get_outputs())
        all_tensors = all(argument.type.startswith("tensor(") for argument in arguments)
        bindable = self._provider.binding is not None and self._only_numpy and all_tensors
        ins = tuple(self._input_specs.values())
        self._bound = BoundRuns(device, self._session, self._provider, ins, self.outputs) if bindable else None

    @property
    def graph_ms(self) -> float | None:
        """Milliseconds of the last run's graph on the device's clock; None if transfers are part of it."""
        return None if self._bound is None else self._bound.graph_ms

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str] | None = None,
        *,
        into: Mapping[str, BufferView] | None = None,
        keep: Collection[str] = (),
        cancel: Stoppable | None = None,
        queued: bool = False,
    ) -> dict[str, Fetched]:
        """Runs the model once and gives each of `outputs` (all unless said) by name.

        `queued` says that every buffer is written and read in `Device.queue`: where the backend has one, the run is
        left in it, and `into` is filled when the queue has come by.

        An output named in `into` is written to that buffer and comes back as a BufferView with its dtype and shape; one
        named in `keep` stays on the device as a `Kept`; every other is a NumPy array, `Values` where it is no tensor,
        None where it is optional and there is none. Raises `input_mismatch`,
        `out_of_range` (an `into` too small), `cancelled`, `timeout`, `out_of_memory`, `device_lost`, `run_failed`.
        """
        names = self._output_names if outputs is None else list(outputs)
        self.staged_bytes = 0
        if self._bound is not None:
            self._bound.graph_ms = None
        try:
            if into or keep or not only_arrays(feeds):
                return self._run_with_buffers(feeds, names, into or {}, keep, cancel, queued=queued)
            if self._bound is not None and self._bound.carries:
                return self._bound.run(BoundRun(feeds, names), self._on_host, cancel)
            return dict(zip(names, self._call(names, feeds, cancel), strict=True))
        except OperationError:
            raise
        except Exception as error:
            self.check(feeds, names)
            raise self._named(error) from error

    def check(self, feeds: Mapping[str, Feed], outputs: Sequence[str] | None = None) -> None:
        """Raises `input_mismatch` where names, dtypes or shapes do not fit the model; says all that is wrong."""
        wrong = [f"unknown input {name!r}" for name in feeds if name not in self._input_specs]
        wrong += [f"missing input {spec.name!r}" for spec in self.inputs if spec.name not in feeds]
        wrong += [f"unknown output {name!r}" for name in outputs or () if name not in self._output_specs]
        sizes: dict[str, int] = {}
        for name, feed in feeds.items():
            if name in self._input_specs:
                wrong += unfit(self._input_specs[name], *kind(feed), sizes)
        if wrong:
            takes = ", ".join(f"{s.name}: {s.dtype}{drawn(s.shape)}" for s in self.inputs)
            raise failure("input_mismatch", f"{'; '.join(wrong)}. The model takes {takes}.", detail={"errors": wrong})

    def close(self) -> int | None:
        """Unloads the model; the bytes that the process holds less since; None if they cannot be measured."""
        held = self.device.held_bytes()
        self._session = None
        if self._bound is not None:
            self._bound.close()
            self._bound = None
        if self.file_bytes >= TRIM_BYTES:
            self.device.trim()
        return _grown(self.device.held_bytes(), held)

    # ---- the ways to run

    def _call(
        self, names: list[str], feeds: Mapping[str, RuntimeValue], cancel: Stoppable | None
    ) -> Sequence[RuntimeValue]:
        session = self._live()
        if not self._only_numpy:
            return self._call_with_values(session, names, feeds, cancel)
        lock = self._provider.lock
        outputs: Sequence[RuntimeValue]
        if cancel is None and lock is None:
            outputs = session.run(names, feeds)
            return outputs
        options = ort.RunOptions()
        with lock or contextlib.nullcontext(), (cancel or Cancel()).over(options):
            outputs = session.run(names, feeds, options)
        return outputs

    def _call_with_values(
        self,
        session: ort.InferenceSession,
        names: list[str],
        feeds: Mapping[str, RuntimeValue],
        cancel: Stoppable | None,
    ) -> list[RuntimeValue]:
        """The same where something is no tensor, or one that NumPy has not: what goes in and comes out is converted."""
        self.check(feeds, names)
        taken = {name: self._taken(self._input_specs[name], feed) for name, feed in feeds.items()}
        call = session.run_with_ort_values if self._has_ml_dtypes else session.run
        options = ort.RunOptions()
        with self._provider.lock or contextlib.nullcontext(), (cancel or Cancel()).over(options):
            given = call(names, taken, options)
        return [self._given(self._output_specs[name], value) for name, value in zip(names, given, strict=True)]

    def _taken(self, spec: TensorSpec, feed: Array) -> RuntimeValue:
        """An input as ONNX Runtime's Python interface takes it."""
        if spec.values is not None:
            return spec.values.read(feed.reshape(-1).tolist(), f"input {spec.name!r}")
        if not self._has_ml_dtypes:
            return feed
        array = np.ascontiguousarray(feed).reshape(feed.shape)
        number = ELEMENT_TYPES.get(spec.dtype)
        if number is None:
            return ort.OrtValue.ortvalue_from_numpy(array)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)

    def _given(self, spec: TensorSpec, value: RuntimeValue) -> RuntimeValue:
        """An output as `run` gives it."""
        if spec.values is not None:
            return spec.values.given(value)
        if not isinstance(value, ort.OrtValue):
            return value
        if spec.dtype not in ML_DTYPES:
            return value.numpy()
        if value.device_name().lower() != "cpu":
            raise failure("run_failed", f"ONNX Runtime left output {spec.name!r} on {value.device_name()}.")
        shape, dtype = tuple(value.shape()), numpy_dtype(spec.dtype)
        # ONNX Runtime gives no array of a dtype that NumPy has not. The memory is the host's, and goes with `value`.
        raw = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize) if math.prod(shape) else b""
        return np.frombuffer(raw, dtype).reshape(shape)

    def _run_with_buffers(
        self,
        feeds: Mapping[str, Feed],
        names: list[str],
        into: Mapping[str, BufferView],
        keep: Collection[str],
        cancel: Stoppable | None,
        *,
        queued: bool = False,
    ) -> dict[str, Fetched]:
        self.check(feeds, [*names, *into, *keep])
        names = [*names, *(name for name in [*into, *keep] if name not in names)]
        wanted = BoundRun(feeds, names, self._places(feeds, into), {*keep, *into}, queued)
        try:
            got = self._run_placed(wanted, cancel)
        except Exception as error:
            if not wanted.places or isinstance(error, OperationError) or "shape" not in str(error):
                raise
            # The model gave an output another shape than its own dimension names promise: let it say, then copy.
            wanted = replace(wanted, places={})
            got = self._run_placed(wanted, cancel)
        fetched: dict[str, Fetched] = {}
        for name in names:
            if name in wanted.places:
                fetched[name] = wanted.places[name]
            elif name in into:
                fetched[name] = self._store(name, got[name], into[name])
            elif name in keep:
                fetched[name] = self._kept(name, got[name])
            else:
                fetched[name] = got[name]
        return fetched

    def _run_placed(self, wanted: BoundRun, cancel: Stoppable | None) -> dict[str, RuntimeValue]:
        self._live()
        if self._bound is None or (self.device.host_memory and not wanted.places):
            arrays = {name: self._on_host(feed) for name, feed in wanted.feeds.items()}
            return dict(zip(wanted.names, self._call(list(wanted.names), arrays, cancel), strict=True))
        return self._bound.run(wanted, self._on_host, cancel)

    # ---- outputs into buffers

    def _places(self, feeds: Mapping[str, Feed], into: Mapping[str, BufferView]) -> dict[str, BufferView]:
        """The `into` views that can be bound before the run: shape known, aligned, and apart from every input.

        Raises `out_of_range` where an output is already known not to fit.
        """
        sizes: dict[str, int] = {}
        for name, feed in feeds.items():
            unfit(self._input_specs[name], *kind(feed), sizes)
        # ONNX Runtime binds no text.
        bindable = self._bound is not None and all(s.dtype != "string" for s in self._input_specs.values())
        read = [feed for feed in feeds.values() if isinstance(feed, BufferView)]
        places: dict[str, BufferView] = {}
        for name, place in into.items():
            spec = self._output_specs[name]
            shape = tuple(d if isinstance(d, int) else sizes.get(d or "", -1) for d in spec.shape)
            if spec.dtype in TEXT_DTYPES:
                raise failure(
                    "dtype_unsupported", f"Output {name!r} is {spec.dtype}, which has no place in an allocation."
                )
            if -1 in shape:
                continue
            view = self._fitting(name, place, spec.dtype, shape)
            apart = not any(overlap(view, other) for other in [*read, *places.values()])
            if apart and bindable and is_aligned(view) and view.size_bytes:
                places[name] = view
        return places

    def _store(self, name: str, value: RuntimeValue, place: BufferView) -> BufferView:
        """Copies an output to its place, when it could not be bound there."""
        spec = self._output_specs[name]
        if value is None:
            raise failure("run_failed", f"Output {name!r} is optional, and this run gave none to write.")
        if not isinstance(value, np.ndarray):
            shape = tuple(value.shape())
            view = self._fitting(name, place, spec.dtype, shape)
            if view.size_bytes:
                self.device.take(view, value)
            return view
        view = self._fitting(name, place, spec.dtype, value.shape)
        self._staged(view.size_bytes)
        self.device.write(view.buffer, view.offset, flat_bytes(value))
        return view

    def _fitting(self, name: str, place: BufferView, dtype: str, shape: tuple[int, ...]) -> BufferView:
        view = BufferView(place.buffer, place.offset, dtype, shape)
        if place.offset < 0 or place.offset + view.size_bytes > place.buffer.size_bytes:
            raise failure(
                "out_of_range",
                f"Output {name!r} has {view.size_bytes} bytes ({dtype}{drawn(shape)}); at offset {place.offset} the "
                f"allocation has room for {max(0, place.buffer.size_bytes - place.offset)}.",
            )
        return view

    def _kept(self, name: str, value: RuntimeValue) -> Kept:
        if value is None or isinstance(value, Values):
            raise failure("run_failed", f"Output {name!r} is no tensor in this run, and only tensors are kept.")
        shape = value.shape if isinstance(value, np.ndarray) else tuple(value.shape())
        return Kept(value, self._output_specs[name].dtype, tuple(shape))

    # ---- inputs from buffers

    def _on_host(self, feed: Feed) -> Array:
        """The feed as an array: the buffer's own memory where the host can address it, else a staged copy."""
        if isinstance(feed, np.ndarray):
            return feed
        if isinstance(feed, Kept):
            return feed.numpy()
        flat = self.device.host_view(feed.buffer, feed.offset, feed.size_bytes)
        if flat is None:
            self._staged(feed.size_bytes)
            flat = self.device.read(feed.buffer, feed.offset, feed.size_bytes)
        array = np.frombuffer(flat, np.uint8)
        if not is_aligned(feed):
            array = array.copy()
        return array.view(numpy_dtype(feed.dtype or "")).reshape(feed.shape or ())

    def _staged(self, size_bytes: int) -> None:
        if not self.device.host_memory:
            self.staged_bytes += size_bytes

    def _live(self) -> ort.InferenceSession:
        if self._session is None:
            raise failure("model_not_found", "The model was unloaded.")
        return self._session

    def _named(self, error: Exception) -> OperationError:
        """ONNX Runtime's complaint about inputs is the caller's; anything else is the device's to name."""
        text = tidy(error)
        # A node in the middle of the graph says InvalidArgument too, and then names itself.
        if (type(error).__name__ == "InvalidArgument" and "while running" not in text) or isinstance(error, ValueError):
            return failure("input_mismatch", text)
        named = self.device.classify(error)
        # A bound run says the same as a RuntimeError that any other says in an exception of ONNX Runtime's own.
        if named.code == "internal_error" and text.startswith("Error in execution"):
            return failure("run_failed", f"ONNX Runtime failed on {self.device}: {text}")
        return named


def _proven(source: Path | bytes, sizes: Mapping[str, int]) -> Verdict:
    """The verdict on a model whose open sides `sizes` fixes; `unknown` where the graph cannot be read."""
    try:
        return prove(read_graph(source), sizes)
    except Exception as error:  # noqa: BLE001 - what ONNX Runtime loads is served, whether or not it can be followed
        return Verdict(Proof.UNKNOWN, f"the graph cannot be read: {tidy(error)}")


def _grown(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)
