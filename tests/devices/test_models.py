"""Models on a device: what they declare, what they compute, what they refuse, and how they are opened and closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from tests.devices.tensors import RNG, floats, placed
from workers.devices import BufferView, Device, SessionOptions
from workers.devices.onnx.runtime import LoadedGraph

Opened = Callable[[str], LoadedGraph]


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
            model.run({"x": x, "i": np.array([0, 9], np.int64)})
        assert failed.value.code == "run_failed"
        assert "Gather" in failed.value.message
    else:
        # A graphics device has no way to fail in the middle: it clamps the index, or each address, or gives zeros.
        rows = model.run({"x": x, "i": np.array([0, 9], np.int64)})["y"]
        assert isinstance(rows, np.ndarray)
        assert np.array_equal(rows[0], np.maximum(x[0], 0))
        assert np.isin(rows[1], [0.0, *np.maximum(x, 0).ravel()]).all(), "nothing but the table's own values comes back"
    for index in range(4):
        assert np.array_equal(
            model.run({"x": x, "i": np.array([index], np.int64)})["y"], np.maximum(x[index : index + 1], 0)
        )  # type: ignore[arg-type]
    model.close()


# ---- options, and giving back


def test_free_dimensions_are_fixed_by_name(device: Device, save: Callable[..., Path]) -> None:
    model = device.open_model(save(graphs.linear()), SessionOptions(free_dimensions={"n": 4}))
    assert model.inputs[0].shape == (4, 16)
    assert model.run({"x": floats(4, 16)})["y"].shape == (4, 8)
    with pytest.raises(OperationError) as refused:
        model.run({"x": floats(3, 16)})
    assert refused.value.code == "input_mismatch"
    model.close()


def test_options_that_mean_nothing_are_refused(device: Device, save: Callable[..., Path]) -> None:
    path = save(graphs.linear())
    with pytest.raises(OperationError, match="has no free dimension batch; it has n"):
        device.open_model(path, SessionOptions(free_dimensions={"batch": 1}))
    with pytest.raises(OperationError, match="graph_optimization is one of"):
        device.open_model(path, SessionOptions(graph_optimization="most"))


@pytest.mark.parametrize("level", ["disable", "basic", "extended", "all"])
def test_every_level_of_optimization_gives_the_same_answer(
    device: Device, opened: Opened, save: Callable[..., Path], level: str
) -> None:
    model = device.open_model(save(graphs.convnet()), SessionOptions(graph_optimization=level, deterministic=True))
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
    model = device.open_model(save(graphs.linear()))
    model.close()
    model.close()
    for feed in (floats(1, 16), placed(device, floats(1, 16))):
        with pytest.raises(OperationError) as refused:
            model.run({"x": feed})
        assert refused.value.code == "model_not_found"
