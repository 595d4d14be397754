"""A body of nothing but bytes: which input it is, and its shape, follow from the model."""

from __future__ import annotations

from typing import Any

import pytest

from api_gateway.oip.raw import only_input
from device_operations.errors import OperationError
from device_operations.wire.texts import unpack_texts


def model(*inputs: tuple[str, str, list[Any]]) -> dict[str, Any]:
    """A model's record with these inputs."""
    return {"name": "m", "inputs": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in inputs]}


@pytest.mark.parametrize(
    ("wanted", "size", "shape"),
    [([2, 3], 24, [2, 3]), (["n", 3], 36, [3, 3]), (["n", 3], 0, [0, 3]), ([None], 8, [2]), ([], 4, [])],
)
def test_the_open_side_follows_from_the_bytes(wanted: list[Any], size: int, shape: list[int]) -> None:
    (given,) = only_input(model(("x", "float32", wanted)), memoryview(bytes(size))).values()
    assert (given.dtype, list(given.shape)) == ("float32", shape)


def test_text_is_one_string() -> None:
    (given,) = only_input(model(("x", "string", ["n", 1])), memoryview("äb".encode())).values()
    assert (given.dtype, list(given.shape)) == ("string", [1, 1])
    assert unpack_texts(given.raw, 1) == ["äb"]


@pytest.mark.parametrize(
    ("record", "size", "message"),
    [
        ({"name": "m", "inputs": None}, 4, "still loading"),
        (model(("x", "float32", [1]), ("y", "float32", [1])), 4, "has 2"),
        (model(("x", "float32", ["n", "m"])), 4, "leaves 2 sides open"),
        (model(("x", "float32", [2])), 4, "takes 8 bytes, 4 came"),
        (model(("x", "float32", ["n", 2])), 12, "takes multiples of 8 bytes, 12 came"),
        (model(("x", "float32", ["n", 0])), 4, "takes multiples of 0 bytes"),
        (model(("x", "string", [2])), 4, "are one string"),
    ],
)
def test_what_the_model_leaves_open_is_refused(record: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(OperationError, match=message) as raised:
        only_input(record, memoryview(bytes(size)))
    assert raised.value.code == "input_mismatch"
