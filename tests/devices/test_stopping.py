"""How a run or a load is stopped from another thread, and that the model stays usable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from tests.devices.tensors import floats, placed
from workers.devices import BufferView, Device, SessionOptions
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.onnx.tensors import Feed

Opened = Callable[[str], LoadedGraph]


def side(device: Device) -> int:
    """How wide the looping graph is: a round must be much shorter than a tenth of a second, also in software."""
    return 64 if device.backend == "directml" else 512


def stopped_once(model: LoadedGraph, feed: Feed) -> None:
    """A first run, stopped as soon as it is under way: some backends compile a graph in it, and hear of nothing."""
    cancel = Cancel()
    threading.Timer(0.05, cancel.trip).start()
    with pytest.raises(OperationError) as stopped:
        model.run({"x": feed}, cancel=cancel)
    assert stopped.value.code == "cancelled"


def test_a_run_of_seconds_stops_within_a_tenth_of_a_second_and_the_model_stays_usable(
    device: Device, save: Callable[..., Path]
) -> None:
    width = side(device)
    model = device.open_model(save(graphs.slow(width=width)), SessionOptions(intra_op_threads=1))
    x = floats(width, width)
    stopped_once(model, x)
    cancel = Cancel()
    ended: dict[str, float | str] = {}

    def run() -> None:
        try:
            model.run({"x": x}, cancel=cancel)
        except OperationError as error:
            ended["code"] = error.code
        ended["at"] = time.perf_counter()

    started = time.perf_counter()
    executor = threading.Thread(target=run)
    executor.start()
    executor.join(0.3)
    assert executor.is_alive(), "the model must run for longer than this test waits before it cancels"
    tripped = time.perf_counter()
    cancel.trip()
    executor.join(30)
    assert ended["code"] == "cancelled"
    # In software DirectML's queue takes its time to run dry; what it takes on a GPU, only a GPU tells.
    assert float(ended["at"]) - tripped < (5.0 if device.backend == "directml" else 0.1)
    assert tripped - started >= 0.3
    small = device.open_model(save(graphs.slow(3, width), "small.onnx"))
    assert small.run({"x": x}, cancel=Cancel())["y"].shape == (width, width)
    with pytest.raises(OperationError):
        model.run({"x": x}, cancel=cancel)
    again = Cancel()
    threading.Timer(0.05, again.trip, ["timeout"]).start()
    with pytest.raises(OperationError) as timed_out:
        model.run({"x": x}, cancel=again)
    assert timed_out.value.code == "timeout"


def test_a_run_with_allocations_stops_too(device: Device, save: Callable[..., Path]) -> None:
    width = side(device)
    model = device.open_model(save(graphs.slow(width=width)), SessionOptions(intra_op_threads=1))
    x = placed(device, floats(width, width))
    stopped_once(model, x)
    out = BufferView(device.allocate(1 << 20))
    cancel = Cancel()
    threading.Timer(0.05, cancel.trip).start()
    started = time.perf_counter()
    with pytest.raises(OperationError) as stopped:
        model.run({"x": x}, into={"y": out}, cancel=cancel)
    assert stopped.value.code == "cancelled"
    assert time.perf_counter() - started < (5.0 if device.backend == "directml" else 0.5)


def test_a_run_cancelled_before_it_began_never_begins(opened: Opened) -> None:
    cancel = Cancel()
    cancel.trip("timeout")
    with pytest.raises(OperationError) as stopped:
        opened("linear").run({"x": floats(1, 16)}, cancel=cancel)
    assert stopped.value.code == "timeout"


def test_a_load_cancelled_before_it_began_never_begins(device: Device, save: Callable[..., Path]) -> None:
    cancel = Cancel()
    cancel.trip()
    with pytest.raises(OperationError) as stopped:
        device.open_model(save(graphs.linear()), cancel=cancel)
    assert stopped.value.code == "cancelled"
