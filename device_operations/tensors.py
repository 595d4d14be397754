"""Tensors on the wire: the JSON form, its checks, and NumPy arrays in and out of it.

A tensor is `{"dtype", "shape"}` plus exactly one of `data`, `base64`, `blob_id`, `allocation_id`.
Bytes are little-endian and row-major. NumPy is imported only where arrays are made, so that clients without it work.

`json` stands for values that are no tensor, a sequence or a map: one axis, each element a JSON value. Its array holds
their texts, as one of dtype `string` would.
"""

from __future__ import annotations

import base64 as _base64
import binascii
import math
from typing import TYPE_CHECKING, Any, Literal

import orjson
from pydantic import Field, model_validator

from device_operations.errors import failure
from device_operations.requests.base import Identifier, Offset, Request, Side
from device_operations.wire.json_text import NON_FINITE
from device_operations.wire.json_types import FreeJson

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    #: An array whose dtype is known at run time only.
    Array = NDArray[Any]

#: Bytes of one element of each dtype that NumPy has.
NUMPY_DTYPES: dict[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip

#: The same for floats that NumPy has not; `ml_dtypes` makes its arrays of them, under the same names.
EIGHT_BIT_FLOATS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
ML_DTYPES: dict[str, int] = {"bfloat16": 2, **dict.fromkeys(EIGHT_BIT_FLOATS, 1)}

#: Bytes of one element of each dtype that has a fixed size.
FIXED_DTYPES: dict[str, int] = {**NUMPY_DTYPES, **ML_DTYPES}

#: What travels as text: strings, and JSON values of what is no tensor.
TEXT_DTYPES = ("string", "json")


Dtype = Literal[
    "bool", "int8", "uint8", "int16", "uint16", "float16", "int32", "uint32", "float32", "int64", "uint64", "float64",
    "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "string", "json",
]  # fmt: skip
Form = Literal["data", "base64", "blob", "auto"]

#: Above this many bytes a tensor given back is a blob unless the request names a form, and a payload leaves its row.
INLINE_BYTES = 65_536


class Tensor(Request):
    """A tensor as it is sent: where its elements are, and how to read them."""

    dtype: Dtype
    shape: list[Side] = Field(max_length=32)
    data: object = None
    base64: str | None = None
    blob_id: Identifier | None = None
    allocation_id: Identifier | None = None
    offset: Offset = 0

    @model_validator(mode="before")
    @classmethod
    def _exactly_one_source(cls, value: object) -> object:
        if isinstance(value, dict):
            given = [name for name in ("data", "base64", "blob_id", "allocation_id") if value.get(name) is not None]
            if len(given) != 1:
                raise ValueError("a tensor has exactly one of data, base64, blob_id and allocation_id")
            if value.get("offset") and given[0] in ("data", "base64"):
                raise ValueError("offset goes with blob_id or allocation_id only")
        return value

    @model_validator(mode="after")
    def _shape_and_dtype(self) -> Tensor:
        if self.dtype in TEXT_DTYPES and self.data is None:
            raise ValueError(f"tensors of dtype {self.dtype} are given as data")
        check_shape(self.shape, self.dtype)
        return self

    @property
    def count(self) -> int:
        """How many elements the shape has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """How many bytes the elements take; 0 for text, which has no fixed size."""
        return self.count * FIXED_DTYPES.get(self.dtype, 0)


def carries(dtype: str, wanted: str) -> bool:
    """Whether a tensor of `dtype` may stand for one of `wanted`: JSON values as text, floats of eight bits as bytes."""
    return (wanted == "json" and dtype == "string") or (wanted in EIGHT_BIT_FLOATS and dtype == "uint8")


def check_shape(shape: list[int], dtype: str) -> None:
    """Raises `ValueError` for a shape that no array has.

    The sides other than 0 are multiplied, as NumPy does: `[0, 2**62, 2**62]` is refused although it has no elements.
    """
    spanned = FIXED_DTYPES.get(dtype, 8)
    for side in shape:
        spanned *= side or 1
        if side < 0 or spanned >= 2**63:
            raise ValueError("a side of shape is negative, or the tensor exceeds 2**63 - 1 bytes")


class IntoAllocation(Request):
    """Where on the device an output is to be written."""

    allocation_id: Identifier
    offset: Offset = 0


def decode(tensor: Tensor, name: str = "tensor") -> Array:
    """The NumPy array of a tensor given as `data` or `base64`.

    Raises `input_mismatch` when the elements do not fit shape or dtype.
    """
    if tensor.base64 is not None:
        try:
            raw = _base64.b64decode(tensor.base64, validate=True)
        except (binascii.Error, ValueError) as error:
            raise failure("input_mismatch", f"{name}: base64 does not decode: {error}") from error
        return from_bytes(raw, tensor.dtype, tensor.shape, name)
    return from_numbers(tensor.data, tensor.dtype, tensor.shape, name)


def from_bytes(raw: bytes | bytearray | memoryview, dtype: str, shape: list[int], name: str = "tensor") -> Array:
    """A read-only array over little-endian, row-major bytes; `input_mismatch` when their number does not fit."""
    import numpy as np

    wanted = math.prod(shape) * FIXED_DTYPES[dtype]
    there = len(raw)
    if there != wanted:
        raise failure(
            "input_mismatch", f"{name}: shape {shape} of {dtype} takes {wanted} bytes, but {there} were given"
        )
    array: Array = np.frombuffer(raw, dtype=numpy_dtype(dtype).newbyteorder("<"))
    return array.reshape(shape)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name, NumPy's or `ml_dtypes`'s."""
    import numpy as np

    if name in ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def from_numbers(data: object, dtype: str, shape: list[int], name: str = "tensor") -> Array:
    """An array from nested or flat numbers, bools or strings; `input_mismatch` when they do not fit shape or dtype.

    Among floats, `NaN`, `Infinity` and `-Infinity` are taken as strings too. Of `json`, the texts of a list of values.
    """
    import numpy as np

    if dtype == "json":
        return _json_texts(data, shape, name)
    flat: list[Any] = data if isinstance(data, list) else [data]
    while flat and isinstance(flat[0], list):
        width = len(flat[0])
        if not all(isinstance(row, list) and len(row) == width for row in flat):
            raise failure("input_mismatch", f"{name}: data is ragged")
        flat = [element for row in flat for element in row]
    wanted = math.prod(shape)
    nesting = _shape_of(data)
    if len(flat) != wanted or (len(nesting) > 1 and nesting != list(shape)):
        raise failure("input_mismatch", f"{name}: shape {shape} holds {wanted} elements, but data has shape {nesting}")
    flat = _checked(flat, dtype, name)
    try:
        if dtype == "string":
            array = np.empty(wanted, dtype=object)
            array[:] = flat
        elif dtype in ML_DTYPES:
            array = np.array(flat, dtype=np.float32).astype(numpy_dtype(dtype))
        else:
            array = np.array(flat, dtype=np.dtype(dtype))
    except (OverflowError, TypeError, ValueError) as error:
        raise failure("input_mismatch", f"{name}: data does not fit {dtype}: {error}") from error
    return array.reshape(shape)


def _shape_of(data: object) -> list[int]:
    shape = []
    while isinstance(data, list):
        shape.append(len(data))
        data = data[0] if data else None
    return shape


def _json_texts(data: object, shape: list[int], name: str) -> Array:
    import numpy as np

    if not isinstance(data, list) or shape != [len(data)]:
        raise failure(
            "input_mismatch", f"{name}: json is given as a list of values, with their number as the only side of shape"
        )
    array = np.empty(len(data), dtype=object)
    array[:] = [orjson.dumps(value).decode() for value in data]
    return array


def _checked(flat: list[Any], dtype: str, name: str) -> list[Any]:
    """The elements as numbers, bools or strings.

    Refuses what NumPy would quietly convert: "1" to 1, 1.5 to 1, 2 to True, 300 to a wrapped byte.
    """
    found = {type(element) for element in flat}
    if dtype == "string":
        allowed: set[type] = {str}
    elif dtype == "bool":
        allowed = {bool}
    elif "float" in dtype:
        allowed = {int, float}
        if not found <= allowed:
            flat = [NON_FINITE.get(element, element) if isinstance(element, str) else element for element in flat]
            found = {type(element) for element in flat}
    else:
        allowed = {int}
    wrong = found - allowed
    if wrong:
        names = ", ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in wrong))
        raise failure("input_mismatch", f"{name}: data holds {names} where {dtype} was announced")
    if allowed == {int} and flat:
        bits = FIXED_DTYPES[dtype] * 8
        low, high = (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if min(flat) < low or max(flat) > high:
            raise failure("input_mismatch", f"{name}: data holds numbers outside {dtype}")
    return flat


def encode(array: Array, form: Literal["data", "base64"]) -> FreeJson:
    """The wire form of an array. Among `data`, NaN and infinities are strings: JSON has no numbers for them."""
    if array.dtype == object or array.dtype.kind in "US":
        flat = [e.decode("utf-8", "replace") if isinstance(e, bytes) else str(e) for e in array.reshape(-1)]
        return {"dtype": "string", "shape": list(array.shape), "data": flat}
    described: FreeJson = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if form == "data":
        described["data"] = numbers(array)
    else:
        described["base64"] = _base64.b64encode(to_bytes(array)).decode("ascii")
    return described


def numbers(array: Array) -> list[object]:
    """The elements in row-major order as JSON takes them: `NaN`, `Infinity` and `-Infinity` as strings."""
    import numpy as np

    plain = array.astype(np.float32) if array.dtype.name in ML_DTYPES else array
    flat: list[object] = plain.reshape(-1).tolist()
    if plain.dtype.kind == "f":
        finite = np.isfinite(plain).reshape(-1)
        if not finite.all():
            for index in np.flatnonzero(~finite).tolist():
                flat[index] = word(flat[index])
    return flat


def word(number: float) -> str:
    """How a float that is not finite is written."""
    return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"  # noqa: PLR0124 - NaN differs from itself


def to_bytes(array: Array) -> bytes:
    """The elements as little-endian, row-major bytes."""
    import numpy as np

    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
