"""Tensors on the wire: what is encoded decodes to the same bits, and what does not fit is refused."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from device_operations.errors import OperationError
from device_operations.tensors import FIXED_DTYPES, Tensor, decode, encode, numpy_dtype, to_bytes

FORMS: list[Literal["data", "base64"]] = ["data", "base64"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*FIXED_DTYPES, "string"])
def test_every_dtype_comes_back_as_it_went(dtype: str, form: Literal["data", "base64"]) -> None:
    if dtype == "string":
        array = np.array([["", "ä"], ["\0", "x" * 300]], dtype=object)
    elif dtype == "bool":
        array = np.array([[True, False], [False, True]])
    elif "int" in dtype:
        bounds = np.iinfo(dtype)
        array = np.array([[bounds.min, bounds.max], [0, 1]], dtype)
    else:
        array = np.array([[0.5, 1], [2, 4]], np.float32).astype(numpy_dtype(dtype))
    back = decode(Tensor(**encode(array, form)))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_what_is_not_finite_comes_back_too(dtype: str, form: Literal["data", "base64"]) -> None:
    array = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32).astype(numpy_dtype(dtype))
    back = decode(Tensor(**encode(array, form))).astype(np.float64)
    assert np.isnan(back[0]) and back[1:3].tolist() == [np.inf, -np.inf] and np.signbit(back[3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [[], [0], [2, 0, 3], [1, 1, 1], [2, 3]])
def test_every_shape_comes_back(shape: list[int], form: Literal["data", "base64"]) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)
    back = decode(Tensor(**encode(array, form)))
    assert back.shape == array.shape
    assert np.array_equal(back, array)


def test_bytes_are_little_endian_and_row_major() -> None:
    array = np.array([[1, 2], [3, 4]], ">u2").T
    assert to_bytes(array) == bytes([1, 0, 3, 0, 2, 0, 4, 0])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"dtype": "int8", "shape": [1], "data": [128]}, "outside int8"),
        ({"dtype": "uint8", "shape": [1], "data": [-1]}, "outside uint8"),
        ({"dtype": "int32", "shape": [1], "data": [1.5]}, "holds float where int32"),
        ({"dtype": "int32", "shape": [1], "data": [True]}, "holds bool where int32"),
        ({"dtype": "bool", "shape": [1], "data": [1]}, "holds int where bool"),
        ({"dtype": "float32", "shape": [1], "data": ["1"]}, "holds str where float32"),
        ({"dtype": "float32", "shape": [1], "data": [None]}, "holds null where float32"),
        ({"dtype": "string", "shape": [1], "data": [1]}, "holds int where string"),
        ({"dtype": "float32", "shape": [3], "data": [1, 2]}, "holds 3 elements"),
        ({"dtype": "float32", "shape": [2, 2], "data": [[1, 2, 3, 4]]}, "data has shape"),
        ({"dtype": "float32", "shape": [3], "data": [[1, 2], [3]]}, "ragged"),
        ({"dtype": "float32", "shape": [2], "base64": "AAAA"}, "takes 8 bytes, but 3 were given"),
        ({"dtype": "float32", "shape": [1], "base64": "A"}, "does not decode"),
        ({"dtype": "json", "shape": [2], "data": [1]}, "their number as the only side"),
    ],
)
def test_elements_that_do_not_fit_are_refused(tensor: dict[str, Any], message: str) -> None:
    with pytest.raises(OperationError, match=message) as raised:
        decode(Tensor(**tensor), "x")
    assert raised.value.code == "input_mismatch"
    assert raised.value.message.startswith("x: ")


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "float32", "shape": [1]},
        {"dtype": "float32", "shape": [1], "data": [1], "base64": "AAAAAA=="},
        {"dtype": "float32", "shape": [1], "data": [1], "offset": 4},
        {"dtype": "float32", "shape": [-1], "data": []},
        {"dtype": "float32", "shape": [2**61], "blob_id": "b"},
        {"dtype": "float32", "shape": [0, 2**62, 2**62], "blob_id": "b"},
        {"dtype": "string", "shape": [1], "base64": "AAAA"},
        {"dtype": "complex64", "shape": [1], "data": [1]},
    ],
)
def test_what_no_tensor_is_has_no_request(tensor: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Tensor(**tensor)
