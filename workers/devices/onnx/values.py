"""What a model takes or gives that is no tensor: sequences, maps and optional values, between ONNX Runtime and JSON.

A sequence is one JSON text for each of its elements, anything else is one text. A tensor inside is nested lists, or
`{"shape", "data"}` where lists cannot say its shape; a map is an object, whose keys are its keys' texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from device_operations.errors import failure
from device_operations.tensors import NUMPY_DTYPES, from_numbers, word
from device_operations.wire.json_text import loads
from workers.devices.arrays import Array

#: What ONNX Runtime calls a tensor of each dtype that NumPy has, and those that `ml_dtypes` has.
_NUMPY = {
    "tensor(bool)": "bool", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32",
    "tensor(int64)": "int64", "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64", "tensor(float16)": "float16", "tensor(float)": "float32",
    "tensor(double)": "float64", "tensor(string)": "string",
}  # fmt: skip
_ML_DTYPES = {
    "tensor(bfloat16)": "bfloat16", "tensor(float8e4m3fn)": "float8_e4m3fn",
    "tensor(float8e4m3fnuz)": "float8_e4m3fnuz", "tensor(float8e5m2)": "float8_e5m2",
    "tensor(float8e5m2fnuz)": "float8_e5m2fnuz", "tensor(float8e8m0)": "float8_e8m0fnu",
}  # fmt: skip
DTYPE_OF = _NUMPY | _ML_DTYPES

#: The number that ONNX gives each of them (TensorProto.DataType).
ELEMENT_TYPES = {
    "bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20,
    "float8_e8m0fnu": 24,
}  # fmt: skip

#: Types by which a map's keys may be.
_KEYS = {"string": "string", "int64": "int64"}

_OUTER = re.compile(r"(seq|optional)\((.*)\)")
_MAP = re.compile(r"map\((\w+),(.*)\)")


#: A JSON value, or the value of ONNX Runtime's that it stands for: both are nested lists, maps, numbers and texts.
JsonValue: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Values:
    """A sequence or a map that a model gave: JSON values, NaN and infinities as floats among them."""

    values: list[JsonValue]

    @property
    def shape(self) -> tuple[int]:
        """How many there are, as the only side."""
        return (len(self.values),)

    def strict(self) -> list[JsonValue]:
        """The values as strict JSON has them: NaN and infinities as strings."""
        try:
            json.dumps(self.values, allow_nan=False)
        except ValueError:
            return [_strict(value) for value in self.values]
        return self.values

    def texts(self) -> list[str]:
        """Each value as JSON; NaN and infinities bare, as Python and Triton write them."""
        return [json.dumps(value, ensure_ascii=False) for value in self.values]


@dataclass(frozen=True, slots=True)
class ValueType:
    """A type of ONNX Runtime's: a tensor of `dtype`; a sequence, a map with such keys, or an optional value `of` it."""

    form: Literal["tensor", "seq", "map", "optional"]
    dtype: str = ""
    of: ValueType | None = None

    @property
    def is_optional(self) -> bool:
        """Whether there may be no value."""
        return self.form == "optional"

    @property
    def inner(self) -> ValueType:
        """The type itself, without the optional around it."""
        return self.of if self.form == "optional" and self.of is not None else self

    @property
    def is_sequence(self) -> bool:
        """Whether each element is a text of its own."""
        return self.inner.form == "seq"

    def read(self, texts: Sequence[str], what: str) -> JsonValue:
        """The value that ONNX Runtime takes for JSON texts. Raises `input_mismatch`."""
        values = [_parsed(text, what) for text in texts]
        kind = self.inner
        if kind.form == "seq":
            assert kind.of is not None
            return [_taken(value, kind.of, f"{what}, element {index}") for index, value in enumerate(values)]
        if len(values) != 1:
            raise failure("input_mismatch", f"{what} is one JSON text, {len(values)} were given")
        return None if values[0] is None and self.is_optional else _taken(values[0], kind, what)

    def given(self, value: JsonValue) -> Values | None:
        """What ONNX Runtime gave, as JSON values; None where an optional has none."""
        if value is None:
            return None
        kind = self.inner
        if kind.form == "seq":
            assert kind.of is not None
            return Values([_told(element, kind.of) for element in value])
        return Values([_told(value, kind)])


def parse_type(text: str) -> ValueType | None:
    """The type that ONNX Runtime calls so; None for one that has no form here (sparse, of four bits, opaque)."""
    dtype = DTYPE_OF.get(text)
    if dtype is not None:
        return ValueType("tensor", dtype)
    outer = _OUTER.fullmatch(text)
    if outer is not None:
        inner = parse_type(outer[2])
        return None if inner is None else ValueType("seq" if outer[1] == "seq" else "optional", of=inner)
    mapped = _MAP.fullmatch(text)
    if mapped is not None and mapped[1] in _KEYS:
        inner = parse_type(mapped[2])
        return None if inner is None else ValueType("map", mapped[1], inner)
    return None


def why_not(text: str) -> str:
    """Why a type that `parse_type` does not know, or that holds a tensor that NumPy has not, is not offered."""
    if "sparse" in text:
        return f"{text}: a sparse tensor has no form in JSON or in the Open Inference Protocol"
    if re.search(r"\((u?int[24]|float4\w*)\)", text):
        return f"{text}: ONNX Runtime's Python interface neither takes nor gives elements of fewer than eight bits"
    return f"{text}: ONNX Runtime's Python interface neither takes nor gives such values"


def is_offered(kind: ValueType) -> bool:
    """Whether the values inside are such as ONNX Runtime takes and gives one by one: tensors that NumPy has."""
    if kind.form == "tensor":
        return kind.dtype in NUMPY_DTYPES or kind.dtype == "string"
    return kind.of is not None and is_offered(kind.of)


def _parsed(text: JsonValue, what: str) -> JsonValue:
    try:
        return loads(text if isinstance(text, (str, bytes)) else str(text), anywhere=True)
    except ValueError as error:
        raise failure("input_mismatch", f"{what} is not JSON: {error}") from error


def _taken(value: JsonValue, kind: ValueType, what: str) -> JsonValue:
    if kind.form == "tensor":
        return _tensor(value, kind.dtype, what)
    assert kind.of is not None
    if kind.form == "seq":
        if not isinstance(value, list):
            raise failure("input_mismatch", f"{what} is not a JSON list")
        return [_taken(element, kind.of, f"{what}, element {index}") for index, element in enumerate(value)]
    if not isinstance(value, dict):
        raise failure("input_mismatch", f"{what} is not a JSON object")
    made: dict[JsonValue, JsonValue] = {}
    for key, element in value.items():
        taken = _taken(element, kind.of, f"{what}, {key!r}")
        made[_key(key, kind.dtype, what)] = taken.item() if kind.of.form == "tensor" and taken.ndim == 0 else taken
    return made


def _key(text: str, dtype: str, what: str) -> int | str:
    if dtype == "string":
        return text
    if re.fullmatch(r"-?\d{1,19}", text, re.ASCII) and -(2**63) <= int(text) < 2**63:
        return int(text)
    raise failure("input_mismatch", f"{what}: key {text[:40]!r} is not a whole number of 64 bits")


def _tensor(value: JsonValue, dtype: str, what: str) -> Array:
    if not isinstance(value, dict):
        return from_numbers(value, dtype, _shape_of(value), what)
    shape = value.get("shape")
    if value.keys() != {"shape", "data"} or not isinstance(shape, list):
        raise failure("input_mismatch", f"{what} is an object, which has exactly shape and data")
    if len(shape) > 32 or not all(type(side) is int and 0 <= side < 2**63 for side in shape):
        raise failure("input_mismatch", f"{what}: shape is not a list of whole numbers, 0 or more")
    return from_numbers(value["data"], dtype, shape, what)


def _shape_of(data: JsonValue) -> list[int]:
    shape = []
    while isinstance(data, list):
        shape.append(len(data))
        data = data[0] if data else None
    return shape


def _told(value: JsonValue, kind: ValueType) -> JsonValue:
    if kind.form == "tensor":
        return _listed(np.asarray(value))
    assert kind.of is not None
    if kind.form == "seq":
        return [_told(element, kind.of) for element in value]
    return {str(key): _told(element, kind.of) for key, element in value.items()}


def _strict(value: JsonValue) -> JsonValue:
    if isinstance(value, list):
        return [_strict(element) for element in value]
    if isinstance(value, dict):
        return {key: _strict(element) for key, element in value.items()}
    return word(value) if isinstance(value, float) and not math.isfinite(value) else value


def _listed(array: Array) -> JsonValue:
    if array.ndim > 1 and math.prod(array.shape) == 0 and 0 in array.shape[:-1]:
        return {"shape": list(array.shape), "data": []}
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    return array.tolist()
