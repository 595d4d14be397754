"""Models on a device: what they declare, what they compute, where their tensors lie, and how they stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from workers.devices import BufferView, Device, ModelOptions
from workers.devices.onnx import Cancel, Kept, OnnxModel

Opened = Callable[[str], OnnxModel]
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def placed(device: Device, array: np.ndarray, offset: int = 0, room: int = 0) -> BufferView:
    """The array in an allocation of its own, `offset` bytes from the beginning and with `room` bytes behind it."""
    buffer = device.allocate(offset + array.nbytes + room)
    device.write(buffer, offset, np.ascontiguousarray(array).data.cast("B"))
    return BufferView(buffer, offset, array.dtype.name, array.shape)


def seen(device: Device, view: BufferView) -> np.ndarray:
    flat = device.read(view.buffer, view.offset, view.size_bytes)
    return np.frombuffer(flat, view.dtype).reshape(view.shape)


def test_a_model_tells_its_inputs_and_outputs_with_symbols_for_free_dimensions(opened: Opened) -> None:
    model = opened("linear")
    assert [spec.as_json() for spec in model.inputs] == [{"name": "x", "dtype": "float32", "shape": ["n", 16]}]
    assert [spec.as_json() for spec in model.outputs] == [{"name": "y", "dtype": "float32", "shape": ["n", 8]}]


def test_a_model_runs_on_the_devices_own_provider_and_says_how_many_operators_did_not(
    device: Device, opened: Opened
) -> None:
    model = opened("convnet")
    assert model.provider == device.describe().providers[0]
    assert model.cpu_fallback_ops == 0
    assert model.load_ms > 0


@pytest.mark.parametrize("name", ["convnet", "attention", "linear"])
def test_outputs_equal_those_of_the_cpu(device: Device, cpu: Device, opened: Opened, name: str, tmp_path: Path) -> None:
    path = tmp_path / "same.onnx"
    path.write_bytes(getattr(graphs, name)())
    reference = cpu.open_model(path)
    shape = [3 if isinstance(d, str) else d for d in reference.inputs[0].shape]
    for _ in range(3):
        x = floats(*shape)
        np.testing.assert_allclose(opened(name).run({"x": x})["y"], reference.run({"x": x})["y"], atol=1e-4)
    reference.close()


def test_tensors_of_every_dtype_that_the_device_names_pass_through_unchanged(
    device: Device, save: Callable[..., Path]
) -> None:
    dtypes = device.describe().capabilities["dtypes"]
    model = device.open_model(save(graphs.identity(dtypes)))
    feeds = {name: (RNG.integers(0, 2, (2, 3)) * 3).astype(name) for name in dtypes}
    for name, got in model.run(feeds).items():
        expected = feeds[name.removeprefix("y_")]
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected)
    assert [spec.dtype for spec in model.inputs] == dtypes
    model.close()


def test_only_the_outputs_asked_for_come_back(opened: Opened) -> None:
    x, h = floats(1, 3), floats(1, 5)
    assert list(opened("recurrent").run({"x": x, "h": h}, ["next"])) == ["next"]


# ---- tensors in allocations


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
    if device.backend == "directml":
        pytest.skip("Compress is not DirectML's; the same way is taken there for every output")
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


# ---- bad input


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "missing input 'x'"),
        ({"x": floats(1, 16), "z": floats(1)}, "unknown input 'z'"),
        ({"x": floats(1, 16).astype(np.float64)}, "is float64 and must be float32"),
        ({"x": np.array([["a"] * 16])}, "is string and must be float32"),
        ({"x": floats(1, 15)}, "must have [n, 16]"),
        ({"x": floats(16)}, "must have [n, 16]"),
        ({"x": np.float32(1).reshape(())}, "must have [n, 16]"),
    ],
)
def test_inputs_that_do_not_fit_are_named_and_the_next_run_succeeds(
    opened: Opened, feeds: dict[str, np.ndarray], text: str
) -> None:
    model = opened("linear")
    with pytest.raises(OperationError) as refused:
        model.run(feeds)
    assert refused.value.code == "input_mismatch"
    assert text in refused.value.message
    model.run({"x": floats(1, 16)})


def test_a_buffer_of_the_wrong_shape_or_dtype_is_refused_before_the_device_sees_it(
    device: Device, opened: Opened
) -> None:
    buffer = device.allocate(64)
    for view, code in [
        (BufferView(buffer, 0, "float32", (1, 15)), "input_mismatch"),
        (BufferView(buffer, 0, "int32", (1, 16)), "input_mismatch"),
        (BufferView(buffer, 4, "float32", (1, 16)), "out_of_range"),
        (BufferView(buffer, 0, "float32", (2, 16)), "out_of_range"),
    ]:
        with pytest.raises(OperationError) as refused:
            opened("linear").run({"x": view})
        assert refused.value.code == code


def test_an_unknown_output_is_refused(device: Device, opened: Opened) -> None:
    for ask in (
        lambda: opened("linear").run({"x": floats(1, 16)}, ["nothing"]),
        lambda: opened("linear").run({"x": floats(1, 16)}, keep={"nothing"}),
        lambda: opened("linear").run({"x": floats(1, 16)}, into={"nothing": BufferView(device.allocate(64))}),
    ):
        with pytest.raises(OperationError) as refused:
            ask()
        assert refused.value.code == "input_mismatch"
        assert "unknown output 'nothing'" in refused.value.message


def test_a_batch_of_nothing_gives_nothing(device: Device, opened: Opened) -> None:
    if device.backend == "directml":
        pytest.skip("DirectML has no tensors of no elements")
    empty = np.zeros((0, 16), np.float32)
    assert opened("linear").run({"x": empty})["y"].shape == (0, 8)
    view = opened("linear").run({"x": empty}, into={"y": BufferView(device.allocate(4))})["y"]
    assert view.shape == (0, 8)


def test_an_index_outside_its_table_fails_the_run_or_harms_nothing_and_the_next_run_succeeds(
    device: Device, save: Callable[..., Path]
) -> None:
    model = device.open_model(save(graphs.picky()))
    x = floats(4, 2)
    if model.provider == "CPUExecutionProvider":
        with pytest.raises(OperationError) as failed:
            model.run({"x": x, "i": np.array([0, 9])})
        assert failed.value.code == "run_failed"
        assert "Gather" in failed.value.message
    else:
        # A graphics device has no way to fail in the middle: it clamps the index or gives zeros in its place.
        rows = model.run({"x": x, "i": np.array([0, 9])})["y"]
        assert isinstance(rows, np.ndarray)
        assert np.array_equal(rows[0], np.maximum(x[0], 0))
        harmless = [np.zeros(2, np.float32), *np.maximum(x, 0)]
        assert any(np.array_equal(rows[1], other) for other in harmless)
    for index in range(4):
        assert np.array_equal(model.run({"x": x, "i": np.array([index])})["y"], np.maximum(x[index : index + 1], 0))  # type: ignore[arg-type]
    model.close()


# ---- stopping


def test_a_run_of_seconds_stops_within_a_tenth_of_a_second_and_the_model_stays_usable(
    device: Device, save: Callable[..., Path]
) -> None:
    if device.backend == "directml":
        pytest.skip("DirectML queues a whole graph at once, so a run on it has no node to stop at")
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
        pytest.skip("DirectML queues a whole graph at once, so a run on it has no node to stop at")
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


# ---- options, and giving back


def test_free_dimensions_are_fixed_by_name(device: Device, save: Callable[..., Path]) -> None:
    model = device.open_model(save(graphs.linear()), ModelOptions(free_dimensions={"n": 4}))
    assert model.inputs[0].shape == (4, 16)
    assert model.run({"x": floats(4, 16)})["y"].shape == (4, 8)
    with pytest.raises(OperationError) as refused:
        model.run({"x": floats(3, 16)})
    assert refused.value.code == "input_mismatch"
    model.close()


def test_options_that_mean_nothing_are_refused(device: Device, save: Callable[..., Path]) -> None:
    path = save(graphs.linear())
    with pytest.raises(OperationError, match="has no free dimension batch; it has n"):
        device.open_model(path, ModelOptions(free_dimensions={"batch": 1}))
    with pytest.raises(OperationError, match="graph_optimization is one of"):
        device.open_model(path, ModelOptions(graph_optimization="most"))


@pytest.mark.parametrize("level", ["disable", "basic", "extended", "all"])
def test_every_level_of_optimization_gives_the_same_answer(
    device: Device, opened: Opened, save: Callable[..., Path], level: str
) -> None:
    if device.backend == "directml":
        pytest.skip("each session keeps its memory there until the process ends; the levels are not the backend's")
    model = device.open_model(save(graphs.convnet()), ModelOptions(graph_optimization=level, deterministic=True))
    x = floats(2, 3, 8, 8)
    np.testing.assert_allclose(model.run({"x": x})["y"], opened("convnet").run({"x": x})["y"], atol=1e-5)  # type: ignore[arg-type]


def test_a_models_memory_is_measured_and_given_back_on_close_or_the_device_says_that_it_is_not(
    device: Device, save: Callable[..., Path]
) -> None:
    if not device.describe().capabilities["returns_memory"]:
        model = device.open_model(save(graphs.linear()))
        assert model.file_bytes > 16 * 8 * 4
        assert (model.memory_bytes is None) == (device.memory().process_bytes is None)
        assert (model.close() or 0) < 1 << 20, "what is not given back must not be told as freed"
        return
    path = save(graphs.heavy(64))
    device.open_model(save(graphs.linear(), "first.onnx")).close()  # what the runtime takes once for all sessions
    before = device.memory().process_bytes
    model = device.open_model(path)
    model.run({"x": floats(1, 1024)})
    assert model.memory_bytes is not None
    assert 60 << 20 < model.memory_bytes < 220 << 20
    assert model.file_bytes > 64 << 20
    freed = model.close()
    after = device.memory().process_bytes
    assert freed is not None
    assert freed > 60 << 20
    assert before is not None
    assert after is not None
    assert after - before < 8 << 20


def test_a_closed_model_says_so(device: Device, save: Callable[..., Path]) -> None:
    if device.backend == "directml":
        pytest.skip("each session keeps its memory there until the process ends; closing is not the backend's")
    model = device.open_model(save(graphs.linear()))
    model.close()
    model.close()
    for feed in (floats(1, 16), placed(device, floats(1, 16))):
        with pytest.raises(OperationError) as refused:
            model.run({"x": feed})
        assert refused.value.code == "model_not_found"
