"""Models whose inputs or outputs are no plain tensors: sequences, maps, optional values, floats that NumPy has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.support import value_graphs as graphs
from workers.devices import Device
from workers.devices.arrays import BufferView
from workers.devices.onnx.values import Values, parse_type

Save = Callable[..., Path]


def texts(*values: str) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize(
    ("text", "given", "told"),
    [
        ("seq(tensor(float))", [np.ones(2, np.float32), np.float32(3)], [[1, 1], 3]),
        ("seq(tensor(string))", [np.array(["a", "ü"], object)], [["a", "ü"]]),
        ("seq(tensor(bool))", [np.array([True])], [[True]]),
        ("seq(map(int64,tensor(float)))", [{0: 0.25, -1: 0.75}], [{"0": 0.25, "-1": 0.75}]),
        ("map(string,tensor(int64))", {"cat": 3}, [{"cat": 3}]),
        ("optional(seq(tensor(int64)))", [np.arange(2)], [[0, 1]]),
    ],
)
def test_what_is_no_tensor_becomes_json_values(text: str, given: Any, told: list[Any]) -> None:
    kind = parse_type(text)
    assert kind is not None
    assert kind.given(given) == Values(told)
    # And back again, by each value's own text.
    again = kind.given(kind.read(Values(told).texts(), "x"))
    assert again == Values(told)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (2, 0, 0), (0, 0)])
def test_the_shape_of_a_tensor_without_elements_is_kept(shape: tuple[int, ...]) -> None:
    kind = parse_type("seq(tensor(float))")
    assert kind is not None
    told = kind.given([np.zeros(shape, np.float32)])
    assert told is not None
    (back,) = kind.read(told.texts(), "x")
    assert (back.shape, back.dtype) == (shape, np.float32)


def test_nan_and_infinities_are_bare_in_texts_and_strings_in_strict_json() -> None:
    kind = parse_type("seq(map(string,tensor(float)))")
    assert kind is not None
    told = kind.given([{"a": float("nan"), "b": float("-inf"), "c": 1.0}])
    assert told is not None
    assert told.texts() == ['{"a": NaN, "b": -Infinity, "c": 1.0}']
    assert told.strict() == [{"a": "NaN", "b": "-Infinity", "c": 1.0}]
    for text in (told.texts()[0], '{"a": "NaN", "b": "-Infinity", "c": 1}'):
        (back,) = kind.read([text], "x")
        assert np.isnan(back["a"]) and back["b"] == -np.inf and back["c"] == 1


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("seq(tensor(float))", ["{"]),
        ("seq(tensor(float))", ['["a"]']),
        ("seq(tensor(float))", ["[[1], [1, 2]]"]),
        ("seq(tensor(float))", ['{"shape": [2], "data": [1]}']),
        ("seq(tensor(float))", ['{"shape": [-1], "data": [1]}']),
        ("seq(tensor(float))", ['{"shape": [true], "data": [1]}']),
        ("seq(tensor(float))", ['{"data": [1]}']),
        ("seq(tensor(int64))", ["[1.5]"]),
        ("seq(tensor(int8))", ["[300]"]),
        ("map(int64,tensor(float))", ['{"a": 1}']),
        ("map(int64,tensor(float))", ['{"9223372036854775808": 1}']),
        ("map(string,tensor(float))", ['{"a": "b"}']),
        ("map(string,tensor(float))", ["[]"]),
        ("map(string,tensor(float))", ["{}", "{}"]),
        ("seq(map(string,tensor(float)))", ["1"]),
    ],
)
def test_json_that_does_not_fit_is_an_input_mismatch(kind: str, given: list[str]) -> None:
    parsed = parse_type(kind)
    assert parsed is not None
    with pytest.raises(OperationError) as error:
        parsed.read(given, "input 'x'")
    assert error.value.code == "input_mismatch"
    assert "input 'x'" in error.value.message


@pytest.mark.parametrize("text", ["sparse_tensor(float)", "tensor(int4)", "seq(tensor(uint4))", "opaque(a,b)", "what"])
def test_types_without_a_form_are_none(text: str) -> None:
    assert parse_type(text) is None


def test_sequences_go_in_and_out(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.sequence_alone()))
    assert [spec.as_json() for spec in model.inputs] == [
        {"name": "s", "dtype": "json", "shape": [None], "type": "seq(tensor(float))"}
    ]
    got = model.run({"s": texts("[1, 2]", "[[3]]")})
    assert got["same"] == Values([[1, 2], [[3]]])
    assert got["length"].tolist() == 2  # type: ignore[union-attr]
    assert model.run({"s": texts()}, ["same"])["same"] == Values([])


def test_a_map_goes_in(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.of_a_map()))
    assert model.run({"m": texts('{"b": 2.5}')})["y"].tolist() == [[0, 2.5]]  # type: ignore[union-attr]


def test_an_optional_tensor_may_be_left_out_and_may_not_come(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.of_an_optional()))
    assert model.inputs == ()
    assert [spec.as_json() for spec in model.optional_inputs] == [
        {"name": "x", "dtype": "float32", "shape": [None], "optional": True}
    ]
    without = model.run({})
    assert without["same"] is None
    assert not without["there"]
    got = model.run({"x": np.array([1, 2], np.float32)})
    assert got["there"]
    assert got["same"].tolist() == [1, 2]  # type: ignore[union-attr]


def test_an_initializer_that_is_an_input_is_overridden_by_whoever_gives_it(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.with_default()))
    assert [spec.name for spec in model.inputs] == ["x"]
    assert [spec.as_json() for spec in model.optional_inputs] == [
        {"name": "w", "dtype": "float32", "shape": [4], "optional": True}
    ]
    x = np.ones((1, 4), np.float32)
    assert model.run({"x": x})["y"].tolist() == [[1, 2, 3, 4]]  # type: ignore[union-attr]
    w = np.full(4, 5, np.float32)
    assert model.run({"x": x, "w": w})["y"].tolist() == [[5, 5, 5, 5]]  # type: ignore[union-attr]
    assert model.run({"x": x})["y"].tolist() == [[1, 2, 3, 4]]  # type: ignore[union-attr]
    buffer = device.allocate(64)
    device.write(buffer, 0, w.data.cast("B"))
    placed = model.run({"x": x, "w": BufferView(buffer, 0, "float32", (4,))}, into={"y": BufferView(buffer, 32)})["y"]
    assert isinstance(placed, BufferView)
    assert np.frombuffer(device.read(buffer, 32, 16), np.float32).tolist() == [5, 5, 5, 5]
    model.run({"x": x, "w": w * 2}, into={"y": BufferView(buffer, 32)})
    assert np.frombuffer(device.read(buffer, 32, 16), np.float32).tolist() == [10, 10, 10, 10]
    device.release(buffer)
    with pytest.raises(OperationError, match="'w' has shape"):
        model.run({"x": x, "w": w[:2]})


@pytest.mark.parametrize("count", [0, 3])
def test_bfloat16_goes_in_and_out(device: Device, save: Save, count: int) -> None:
    x = np.array([1.5, -np.inf, np.nan][:count], np.float32)
    there = device.open_model(save(graphs.cast(graphs.FLOAT, graphs.BFLOAT16)))
    half = there.run({"x": x})["y"]
    assert half.dtype == ml_dtypes.bfloat16  # type: ignore[union-attr]
    back = device.open_model(save(graphs.cast(graphs.BFLOAT16, graphs.FLOAT)))
    assert np.array_equal(back.run({"x": half})["y"], x, equal_nan=True)  # type: ignore[dict-item, arg-type]
    with pytest.raises(OperationError, match="is float16 and must be bfloat16"):
        back.run({"x": x.astype(np.float16)})


def test_bfloat16_lies_in_allocations(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.cast(graphs.FLOAT, graphs.BFLOAT16)))
    buffer = device.allocate(64)
    x = np.array([1, 2.5, -4], np.float32)
    placed = model.run({"x": x}, into={"y": BufferView(buffer, 2)})["y"]
    assert isinstance(placed, BufferView)
    assert (placed.dtype, placed.shape, placed.size_bytes) == ("bfloat16", (3,), 6)
    back = device.open_model(save(graphs.cast(graphs.BFLOAT16, graphs.FLOAT)))
    assert back.run({"x": placed})["y"].tolist() == x.tolist()  # type: ignore[union-attr]
    device.release(buffer)


def test_a_float_of_eight_bits_is_taken_as_its_byte_too(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.cast(graphs.FLOAT8, graphs.FLOAT)))
    x = np.array([1, -2, 448], np.float32).astype(ml_dtypes.float8_e4m3fn)
    for given in (x, x.view(np.uint8)):
        assert model.run({"x": given})["y"].tolist() == [1, -2, 448]  # type: ignore[union-attr]


def test_an_output_without_a_form_is_not_offered_and_says_why(device: Device, save: Save) -> None:
    model = device.open_model(save(graphs.beside(graphs.INT4)))
    assert [spec.name for spec in model.outputs] == ["plain"]
    (lost,) = model.not_offered
    assert (lost.name, lost.side) == ("odd", "output")
    assert "tensor(int4)" in lost.reason
    assert list(model.run({"x": np.ones(2, np.float32)})) == ["plain"]


def test_a_model_that_can_take_or_give_nothing_is_refused_with_the_reason(device: Device, save: Save) -> None:
    for source, target in ((graphs.INT4, graphs.FLOAT), (graphs.FLOAT, graphs.INT4)):
        with pytest.raises(OperationError) as error:
            device.open_model(save(graphs.cast(source, target)))
        assert error.value.code == "model_invalid"
        assert "tensor(int4)" in error.value.message
