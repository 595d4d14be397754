"""How a run or a load is stopped from another thread, and that the model stays usable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from tests.devices.tensors import floats, placed
from workers.devices import BufferView, Device, ModelOptions
from workers.devices.onnx import Cancel, OnnxModel
from workers.devices.onnx_tensors import Feed

Opened = Callable[[str], OnnxModel]


def ends_by_itself(device: Device, save: Callable[..., Path], feed: Callable[[np.ndarray], Feed] = lambda x: x) -> None:
    """DirectML may have queued a whole graph when it is told to stop: then the run goes to its end, and is right."""
    model = device.open_model(save(graphs.slow(60, 256)))
    x = floats(256, 256)
    expected = model.run({"x": x})["y"]
    cancel = Cancel()
    threading.Timer(0.05, cancel.trip).start()
    told = "cancelled"
    try:
        got = model.run({"x": feed(x)}, cancel=cancel)["y"]
        np.testing.assert_allclose(got, expected, atol=1e-4)  # type: ignore[arg-type]
    except OperationError as error:
        told = error.code
    assert told == "cancelled"
    np.testing.assert_allclose(model.run({"x": feed(x)}, cancel=Cancel())["y"], expected, atol=1e-4)  # type: ignore[arg-type]


def test_a_run_of_seconds_stops_within_a_tenth_of_a_second_and_the_model_stays_usable(
    device: Device, save: Callable[..., Path]
) -> None:
    if device.backend == "directml":
        ends_by_itself(device, save)
        return
    model = device.open_model(save(graphs.slow()), ModelOptions(intra_op_threads=1))
    x = floats(512, 512)
    cancel = Cancel()
    ended: dict[str, float | str] = {}

    def run() -> None:
        try:
            model.run({"x": x}, cancel=cancel)
        except OperationError as error:
            ended["code"] = error.code
        ended["at"] = time.perf_counter()

    started = time.perf_counter()
    runner = threading.Thread(target=run)
    runner.start()
    runner.join(0.3)
    assert runner.is_alive(), "the model must run for longer than this test waits before it cancels"
    tripped = time.perf_counter()
    cancel.trip()
    runner.join(30)
    assert ended["code"] == "cancelled"
    assert float(ended["at"]) - tripped < 0.1
    assert tripped - started >= 0.3
    small = device.open_model(save(graphs.slow(rounds=3), "small.onnx"))
    assert small.run({"x": x}, cancel=Cancel())["y"].shape == (512, 512)
    with pytest.raises(OperationError):
        model.run({"x": x}, cancel=cancel)
    again = Cancel()
    threading.Timer(0.05, again.trip, ["timeout"]).start()
    with pytest.raises(OperationError) as timed_out:
        model.run({"x": x}, cancel=again)
    assert timed_out.value.code == "timeout"


def test_a_run_with_allocations_stops_too(device: Device, save: Callable[..., Path]) -> None:
    if device.backend == "directml":
        ends_by_itself(device, save, lambda x: placed(device, x))
        return
    model = device.open_model(save(graphs.slow()), ModelOptions(intra_op_threads=1))
    x = placed(device, floats(512, 512))
    out = BufferView(device.allocate(1 << 20))
    cancel = Cancel()
    threading.Timer(0.05, cancel.trip).start()
    started = time.perf_counter()
    with pytest.raises(OperationError) as stopped:
        model.run({"x": x}, into={"y": out}, cancel=cancel)
    assert stopped.value.code == "cancelled"
    assert time.perf_counter() - started < 0.5


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
