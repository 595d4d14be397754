"""Arrays of the host as inputs and outputs: how they lie, how long they last, and what the processor wants itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from tests.devices.tensors import floats
from workers.devices import BufferView, Device
from workers.devices.onnx.runtime import LoadedGraph

Opened = Callable[[str], LoadedGraph]


def test_outputs_stay_as_they_are_through_later_runs_of_other_sizes(opened: Opened) -> None:
    model = opened("linear")
    inputs = [floats(rows, 16) for rows in (3, 40, 1, 40, 7)]
    outputs = [model.run({"x": x})["y"] for x in inputs]
    kept = [np.array(y) for y in outputs]  # type: ignore[arg-type]
    for x, y, before in zip(inputs, outputs, kept, strict=True):
        assert np.array_equal(y, before)  # type: ignore[arg-type]
        np.testing.assert_allclose(y, model.run({"x": x})["y"], atol=1e-6)  # type: ignore[arg-type]
    assert len({y.ctypes.data for y in outputs}) == len(outputs)  # type: ignore[union-attr]


def test_arrays_may_be_slices_or_read_only_and_are_not_changed(opened: Opened) -> None:
    whole = floats(12, 32)
    before = whole.copy()
    sliced, locked = whole[::3, ::2], floats(4, 16)
    locked.flags.writeable = False
    for x in (sliced, locked, np.asfortranarray(locked)):
        got = opened("linear").run({"x": x})["y"]
        expected = opened("linear").run({"x": np.array(x, order="C")})["y"]
        np.testing.assert_allclose(got, expected, atol=1e-6)  # type: ignore[arg-type]
    assert np.array_equal(whole, before)


def test_rows_gathered_in_the_devices_own_host_memory_run_as_any_others(device: Device, opened: Opened) -> None:
    place = np.frombuffer(device.host_buffer(6 * 16 * 4), np.float32).reshape(6, 16)
    for _ in range(3):
        rows = [floats(2, 16) for _ in range(3)]
        np.concatenate(rows, out=place)
        got = opened("linear").run({"x": place})["y"]
        expected = opened("linear").run({"x": np.concatenate(rows)})["y"]
        np.testing.assert_allclose(got, expected, atol=1e-6)  # type: ignore[arg-type]


def test_an_array_and_an_allocation_may_feed_one_run(device: Device, opened: Opened) -> None:
    x, h = floats(1, 3), floats(1, 5)
    buffer = device.allocate(h.nbytes)
    device.write(buffer, 0, h.data.cast("B"))
    mixed = opened("recurrent").run({"x": x, "h": BufferView(buffer, 0, "float32", (1, 5))})
    plain = opened("recurrent").run({"x": x, "h": h})
    assert mixed.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(mixed[name], value, atol=1e-6)  # type: ignore[arg-type]


def test_inputs_and_outputs_that_are_the_processors_own_are_right_too(
    device: Device, save: Callable[..., Path]
) -> None:
    model = device.open_model(save(graphs.reshaped()))
    for rows, columns in ((2, 6), (12, 1), (3, 4)):
        x = floats(3, 4)
        got = model.run({"x": x, "shape": np.array([rows, columns], np.int64)})
        assert np.array_equal(got["y"], np.maximum(x, 0).reshape(rows, columns))  # type: ignore[arg-type]
        assert list(got["size"]) == [rows, columns]  # type: ignore[arg-type]
    model.close()


def test_a_scalar_goes_in_and_comes_out_as_a_scalar(device: Device, save: Callable[..., Path]) -> None:
    model = device.open_model(save(graphs.one_row()))
    x, v = floats(4, 2), floats(4)
    for index in range(4):
        got = model.run({"x": x, "v": v, "i": np.array(index, np.int64)})
        assert np.array_equal(got["y"], np.maximum(x[index], 0))  # type: ignore[arg-type]
        assert np.shape(got["z"]) == ()  # type: ignore[arg-type]
        assert got["z"] == max(v[index], 0)
    model.close()


def test_text_goes_in_and_comes_out_and_has_no_place_in_an_allocation(
    device: Device, save: Callable[..., Path]
) -> None:
    model = device.open_model(save(graphs.text()))
    words = np.array(["grün", "", "x" * 1000], object)
    assert model.inputs[0].dtype == "string"
    assert list(model.run({"x": words})["y"]) == list(words)  # type: ignore[arg-type]
    # Text is the processor's on every backend: the node is counted where the provider is another, and never hidden.
    if model.cpu_fallback_ops is not None:
        assert model.cpu_fallback_ops == (0 if model.provider == "CPUExecutionProvider" else 1)
    with pytest.raises(OperationError) as refused:
        model.run({"x": words}, into={"y": BufferView(device.allocate(64))})
    assert refused.value.code == "dtype_unsupported"
    model.close()


def test_the_graphs_own_time_is_told_where_the_device_tells_it_from_the_transfers(
    device: Device, opened: Opened
) -> None:
    model = opened("convnet")
    x = floats(2, 3, 8, 8)
    model.run({"x": x})
    if device.backend in ("cuda", "torch"):
        assert model.graph_ms is not None
        assert 0 < model.graph_ms < 10_000
    else:
        assert device.transfers() is None
        assert model.graph_ms is None
