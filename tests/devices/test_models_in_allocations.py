"""A model's tensors in allocations and kept on the device: inputs at any offset, outputs where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from tests.devices.tensors import floats, placed, seen
from workers.devices import BufferView, Device
from workers.devices.onnx.runtime import Kept, LoadedGraph

Opened = Callable[[str], LoadedGraph]


@pytest.mark.parametrize("offset", [0, 4, 64, 1, 6])
def test_an_input_may_lie_in_an_allocation_at_any_offset(device: Device, opened: Opened, offset: int) -> None:
    x = floats(3, 16)
    model = opened("linear")
    got = model.run({"x": placed(device, x, offset)})["y"]
    np.testing.assert_allclose(got, model.run({"x": x})["y"], atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [0, 4, 64, 1, 6])
def test_an_output_is_written_into_an_allocation_and_nowhere_else(device: Device, opened: Opened, offset: int) -> None:
    x = floats(3, 16)
    model = opened("linear")
    expected = model.run({"x": x})["y"]
    assert isinstance(expected, np.ndarray)
    buffer = device.allocate(offset + expected.nbytes + 40)
    device.fill(buffer, 0xEE)
    view = model.run({"x": x}, into={"y": BufferView(buffer, offset)})["y"]
    assert isinstance(view, BufferView)
    assert (view.offset, view.dtype, view.shape) == (offset, "float32", (3, 8))
    np.testing.assert_allclose(seen(device, view), expected, atol=1e-6)
    around = bytes(device.read(buffer, 0, offset)) + bytes(device.read(buffer, offset + expected.nbytes))
    assert around == b"\xee" * (offset + 40)


def test_nothing_passes_through_the_host_where_the_device_says_so(device: Device, opened: Opened) -> None:
    model = opened("linear")
    x = placed(device, floats(3, 16))
    model.run({"x": x}, into={"y": BufferView(device.allocate(96))})
    zero_copy = device.describe().capabilities["zero_copy"]
    assert model.staged_bytes == (0 if zero_copy else 3 * 16 * 4 + 3 * 8 * 4)


def test_an_output_may_take_the_place_of_the_input_it_came_from(device: Device, opened: Opened) -> None:
    x = floats(4, 16)
    model = opened("linear")
    expected = model.run({"x": x})["y"]
    view = placed(device, x)
    got = model.run({"x": view}, into={"y": BufferView(view.buffer, 32)})["y"]
    assert isinstance(got, BufferView)
    np.testing.assert_allclose(seen(device, got), expected, atol=1e-6)  # type: ignore[arg-type]


def test_an_output_that_does_not_fit_its_allocation_is_refused_before_anything_is_written(
    device: Device, opened: Opened
) -> None:
    buffer = device.allocate(95)
    with pytest.raises(OperationError) as refused:
        opened("linear").run({"x": floats(3, 16)}, into={"y": BufferView(buffer)})
    assert refused.value.code == "out_of_range"
    assert "96 bytes" in refused.value.message
    assert bytes(device.read(buffer)) == bytes(95)


def test_an_output_whose_shape_only_the_run_tells_is_written_too(device: Device, save: Callable[..., Path]) -> None:
    model = device.open_model(save(graphs.chosen()))
    x, mask = floats(5, 4), np.array([True, False, True, True, False])
    buffer = device.allocate(48)
    view = model.run({"x": x, "mask": mask}, into={"y": BufferView(buffer)})["y"]
    assert isinstance(view, BufferView)
    assert np.array_equal(seen(device, view), x[mask])
    with pytest.raises(OperationError) as refused:
        model.run({"x": x, "mask": np.ones(5, bool)}, into={"y": BufferView(buffer)})
    assert refused.value.code == "out_of_range"


def test_a_model_that_breaks_its_shapes_promise_is_still_written_right(
    device: Device, save: Callable[..., Path]
) -> None:
    model = device.open_model(save(graphs.promise_breaker()))
    x = floats(2, 4)
    view = model.run({"x": x}, into={"y": BufferView(device.allocate(64))})["y"]
    assert isinstance(view, BufferView)
    assert np.array_equal(seen(device, view), np.concatenate([x, x]))
    model.close()


def test_a_symbol_that_two_inputs_give_two_sizes_promises_nothing(device: Device, save: Callable[..., Path]) -> None:
    model = device.open_model(save(graphs.same_symbol_twice()))
    view = model.run({"x": floats(5, 4), "z": floats(1, 4)}, ["y"], into={"y": BufferView(device.allocate(16))})["y"]
    assert view.shape == (1, 4)
    model.close()


def test_state_kept_on_the_device_equals_the_same_sequence_by_hand(device: Device, opened: Opened) -> None:
    model = opened("recurrent")
    inputs = [floats(1, 3) for _ in range(50)]
    by_hand = np.zeros((1, 5), np.float32)
    state: np.ndarray | Kept = by_hand
    for x in inputs:
        by_hand = model.run({"x": x, "h": by_hand})["next"]  # type: ignore[assignment]
        got = model.run({"x": x, "h": state}, ["y"], keep={"next"})
        state = got["next"]  # type: ignore[assignment]
        assert isinstance(state, Kept)
        assert (state.dtype, state.shape, state.size_bytes) == ("float32", (1, 5), 20)
        np.testing.assert_allclose(got["y"], by_hand, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(state.numpy(), by_hand, atol=1e-6)  # type: ignore[union-attr]


def test_two_states_of_one_model_do_not_see_each_other(opened: Opened) -> None:
    model = opened("recurrent")
    x, zero = floats(1, 3), np.zeros((1, 5), np.float32)
    one = model.run({"x": x, "h": zero}, keep={"next"})["next"]
    before = one.numpy().copy()  # type: ignore[union-attr]
    model.run({"x": floats(1, 3), "h": zero}, keep={"next"})
    assert np.array_equal(one.numpy(), before)  # type: ignore[union-attr]
