"""Runs by I/O binding: inputs where they lie, outputs where they are wanted, the host's arrays by `Transfers`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from workers.devices.arrays import Array, BufferView
from workers.devices.onnx.session import Cancel, Stoppable
from workers.devices.onnx.tensors import Feed, Kept, RuntimeValue, TensorSpec, is_aligned
from workers.devices.values import Provider

if TYPE_CHECKING:
    from workers.devices.base import Device


@dataclass(frozen=True, slots=True)
class BoundRun:
    """One run: what goes in, and which outputs come out, some in `places`, some to `stay` on the device."""

    feeds: Mapping[str, Feed]
    names: Sequence[str]
    places: Mapping[str, BufferView] = field(default_factory=dict)
    stay: Collection[str] = ()
    #: Whether all that lies on the device belongs to `Device.queue`: the run is left there without a wait.
    queued: bool = False

    @property
    def only_arrays(self) -> bool:
        """Whether the host's arrays go in and nothing else comes out."""
        return not self.places and not self.stay and only_arrays(self.feeds)


class BoundRuns:
    """The bound runs of one session, on a backend that names a binding."""

    def __init__(
        self,
        device: Device,
        session: ort.InferenceSession,
        provider: Provider,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self._device = device
        self._session = session
        self._provider = provider
        self._dtypes = {spec.name: spec.dtype for spec in outputs}
        self._defaults = frozenset(argument.name for argument in session.get_overridable_initializers())
        # ONNX Runtime binds no text; and before 1.23 it does not say where it wants its tensors.
        textual = any(spec.dtype == "string" for spec in (*inputs, *outputs))
        says_where = hasattr(session, "get_input_memory_infos")
        self._transfers = None if textual or not says_where else device.transfers()
        # Only what the session takes or gives on the device is worth a transfer of ours: the rest is the processor's,
        # and bringing it to the device would only have it brought back.
        self._takes: frozenset[str] = frozenset()
        self._gives: frozenset[str] = frozenset()
        if self._transfers is not None:
            self._takes = self._there(session.get_inputs(), session.get_input_memory_infos())
            self._gives = self._there(session.get_outputs(), session.get_output_memory_infos()) & set(self._dtypes)
        #: Milliseconds of the last run's graph on the device's clock; None if transfers are part of it.
        self.graph_ms: float | None = None

    @property
    def carries(self) -> bool:
        """Whether the host's arrays go a faster way here than ONNX Runtime's own."""
        return bool(self._takes or self._gives)

    def run(
        self, wanted: BoundRun, on_host: Callable[[Feed], Array], cancel: Stoppable | None
    ) -> dict[str, RuntimeValue]:
        """The outputs by name: OrtValues where they are to stay on the device, arrays elsewhere."""
        binding = self._session.io_binding()
        held = self._bind_inputs(binding, wanted, on_host)
        coming = [
            name
            for name in wanted.names
            if name in self._gives and name not in wanted.places and name not in wanted.stay
        ]
        self._bind_outputs(binding, wanted, coming)
        carried = wanted.only_arrays and self._transfers is not None
        queued = wanted.queued and self._transfers is not None and len(wanted.places) == len(wanted.names)
        fetches = carried and len(coming) == len(wanted.names)
        self._run(binding, cancel, in_order=carried or queued, fetched=fetches or queued)
        if queued:
            return dict(zip(wanted.names, binding.get_outputs(), strict=True))
        values: dict[str, RuntimeValue] = dict(zip(wanted.names, binding.get_outputs(), strict=True))
        fetched: dict[str, Array] = {}
        if self._transfers is not None:
            arrays = self._transfers.fetch([(values[name], self._dtypes[name]) for name in coming])
            fetched = dict(zip(coming, arrays, strict=True))
            self.graph_ms = self._transfers.graph_ms()
        held.clear()  # until here the binding pointed into them
        for name, value in values.items():
            if name not in wanted.places and name not in wanted.stay:
                values[name] = fetched[name] if name in fetched else value.numpy()
        return values

    def close(self) -> None:
        """Lets go of what lies on the device."""
        if self._transfers is not None:
            self._transfers.close()

    def _bind_inputs(self, binding: ort.IOBinding, wanted: BoundRun, on_host: Callable[[Feed], Array]) -> list[Array]:
        """Binds the inputs; the arrays that must live until the run is over, bound or on their way."""
        where, number = self._provider.binding, self._provider.device_id
        held = []
        for name, feed in wanted.feeds.items():
            if isinstance(feed, BufferView) and is_aligned(feed):
                address = self._pointer(feed)
                binding.bind_input(name, where, number, np.dtype(feed.dtype), feed.shape, address)
                continue
            if isinstance(feed, Kept) and not isinstance(feed.value, np.ndarray):
                binding.bind_ortvalue_input(name, feed.value)
                continue
            array = np.asarray(on_host(feed), order="C")  # ascontiguousarray would give a scalar an axis
            held.append(array)
            if name in self._defaults:
                # Binding an array looks for its name among the graph's own inputs only.
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            elif self._transfers is not None and name in self._takes and array.nbytes:
                address = self._transfers.put(name, array)
                binding.bind_input(name, where, number, array.dtype, array.shape, address)
            else:
                binding.bind_cpu_input(name, array)
        return held

    def _bind_outputs(self, binding: ort.IOBinding, wanted: BoundRun, coming: Sequence[str]) -> None:
        where, number = self._provider.binding, self._provider.device_id
        for name in wanted.names:
            if name in wanted.places:
                view = wanted.places[name]
                binding.bind_output(name, where, number, np.dtype(view.dtype), view.shape, self._pointer(view))
            elif name in wanted.stay or name in coming:
                binding.bind_output(name, where, number)
            else:
                binding.bind_output(name, "cpu")

    def _run(self, binding: ort.IOBinding, cancel: Stoppable | None, *, in_order: bool, fetched: bool) -> None:
        """The run itself.

        `in_order` says that only `Transfers` brought tensors, whose stream is the run's own; `fetched` that it fetches
        all outputs too, and so waits for the device: ONNX Runtime need not wait before, with the host idle meanwhile.
        """
        options = ort.RunOptions()
        if fetched:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if not in_order:
            self._device.synchronize()
            binding.synchronize_inputs()
        with self._provider.lock or contextlib.nullcontext(), (cancel or Cancel()).over(options):
            if self._transfers is not None:
                self._transfers.begin()
            self._session.run_with_iobinding(binding, options)
            if self._transfers is not None:
                self._transfers.end()
            if not in_order:
                binding.synchronize_outputs()

    def _there(self, arguments: Sequence[ort.NodeArg], places: Sequence[ort.OrtMemoryInfo]) -> frozenset[str]:
        """The names of the arguments whose place is the device's own memory."""
        pairs = zip(arguments, places, strict=True)
        return frozenset(argument.name for argument, place in pairs if place.name.lower() == self._provider.binding)

    def _pointer(self, view: BufferView) -> int:
        address = self._device.address(view)
        assert address is not None, "a backend that names a binding has addresses"
        return address


def only_arrays(feeds: Mapping[str, Feed]) -> bool:
    """Whether all of them are the host's arrays."""
    return all(feed.__class__ is np.ndarray for feed in feeds.values())
