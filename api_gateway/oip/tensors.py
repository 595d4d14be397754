"""Tensors of the Open Inference Protocol: JSON or raw bytes behind the JSON, copied no more than needed.

A body is JSON, or JSON of `Inference-Header-Content-Length` bytes with the binary tensors behind it in their order.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass

import numpy as np
import orjson

from api_gateway.submission.bodies import Raw
from device_operations.errors import failure
from device_operations.tensors import (
    EIGHT_BIT_FLOATS,
    FIXED_DTYPES,
    TEXT_DTYPES,
    check_shape,
    from_numbers,
    numpy_dtype,
    to_bytes,
    word,
)
from device_operations.wire.bounds import parse_json
from device_operations.wire.json_types import FreeJson
from device_operations.wire.texts import pack_texts, unpack_texts
from tasks.blobs.transients import TRANSIENT_BYTES, Transients

#: The protocol's name of each dtype.
DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BF16": "bfloat16", "BYTES": "string",
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
# The protocol has no name for floats of eight bits, which pass as bytes; what is no tensor passes as JSON texts.
NAMES |= {"json": "BYTES"} | dict.fromkeys(EIGHT_BIT_FLOATS, "UINT8")

#: What has words for NaN and infinities. Of BF16 Triton's client alone makes arrays, and only of numbers.
_WORDED = ("FP16", "FP32", "FP64")

_WIRE_DTYPES = {dtype: numpy_dtype(dtype).newbyteorder("<") for dtype in FIXED_DTYPES if dtype not in EIGHT_BIT_FLOATS}
_WIRE_DTYPES |= dict.fromkeys(EIGHT_BIT_FLOATS, np.dtype("uint8"))


@dataclass(slots=True)
class Given:
    """One input: its elements as little-endian bytes in row-major order, text as each string behind its length."""

    dtype: str
    shape: list[int]
    raw: Raw


@dataclass(slots=True)
class RequestedOutput:
    """One output that the request names, and whether as raw bytes behind the JSON."""

    name: str
    binary: bool


@dataclass(slots=True)
class InferRequest:
    """One inference request of the protocol, its tensors as bytes."""

    request_id: str | None
    parameters: FreeJson
    inputs: dict[str, Given]
    outputs: list[RequestedOutput]
    #: Whether outputs that were not named come as raw bytes.
    binary: bool
    #: The bytes of the only input, where the request is nothing else; `oip.raw` says which input and what shape.
    raw: Raw | None = None
    #: Whether NaN or an infinity stood bare in it, which clients write that read such answers too.
    bare: bool = False


def read(body: Raw, header_length: int | None) -> InferRequest:
    """The request in a body. Raises `malformed_request` and `input_mismatch`, which name the input."""
    view = memoryview(body)
    if header_length == 0:
        return InferRequest(None, {}, {}, [], binary=True, raw=view)
    if header_length is None:
        header_length = len(view)
    if not 0 <= header_length <= len(view):
        raise failure(
            "malformed_request", f"Inference-Header-Content-Length is {header_length}, and the body has {len(view)}"
        )
    header, bare = _json(view[:header_length])
    parameters = _parameters(header, "parameters")
    inputs: dict[str, Given] = {}
    at = header_length
    for entry in _list(header.get("inputs"), "inputs"):
        name, given, at = _given(_object(entry, "an input"), view, at)
        if name in inputs:
            raise failure("input_mismatch", f"input {name!r} is given twice")
        inputs[name] = given
    if at != len(view):
        raise failure("input_mismatch", f"{len(view) - at} bytes follow the last input's own")
    binary = bool(parameters.get("binary_data_output", False))
    outputs = [_wanted(_object(entry, "an output"), binary) for entry in _list(header.get("outputs") or [], "outputs")]
    if len(outputs) > 1 and len({output.name for output in outputs}) != len(outputs):
        raise failure("input_mismatch", "an output is named twice")
    request_id = header.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise failure("malformed_request", "id is not a string")
    return InferRequest(request_id, parameters, inputs, outputs, binary, bare=bare)


def stash(inference: InferRequest, transients: Transients) -> tuple[dict[str, FreeJson], list[str]]:
    """The inputs as a job's request holds them, and the transients made: what is small stays in the request."""
    described: dict[str, FreeJson] = {}
    parts: list[Raw] = []
    apart: list[FreeJson] = []
    offset = 0
    for name, given in inference.inputs.items():
        tensor: FreeJson = {"dtype": given.dtype, "shape": given.shape}
        size = len(given.raw)
        if size <= TRANSIENT_BYTES:
            tensor["base64"] = base64.b64encode(given.raw).decode("ascii")
        else:
            tensor |= {"offset": offset, "size_bytes": size}
            parts.append(given.raw)
            apart.append(tensor)
            offset += size
        described[name] = tensor
    if not parts:
        return described, []
    transient_id = transients.put(parts)
    for tensor in apart:
        tensor["transient_id"] = transient_id
    return described, [transient_id]


def stashed(tensors: dict[str, FreeJson]) -> list[str]:
    """The transients that a job's tensors name."""
    return list({tensor["transient_id"] for tensor in tensors.values() if "transient_id" in tensor})


def answer(
    inference: InferRequest, produced: dict[str, FreeJson], transients: Transients, header: FreeJson
) -> tuple[list[Raw], int | None]:
    """The body of the answer in parts, and the length of its JSON where raw bytes follow."""
    wanted = inference.outputs or [RequestedOutput(name, inference.binary) for name in produced]
    described = []
    parts: list[Raw] = []
    for output in wanted:
        tensor = produced.get(output.name)
        if tensor is None:
            continue  # an optional output that this run had no value for
        dtype, shape = tensor["dtype"], tensor["shape"]
        raw = _elements(tensor, transients)
        entry: FreeJson = {"name": output.name, "datatype": NAMES[dtype], "shape": shape}
        if output.binary:
            entry["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        elif dtype in TEXT_DTYPES:
            entry["data"] = unpack_texts(raw, math.prod(shape), output.name)
        elif dtype == "bfloat16":
            entry["data"] = np.frombuffer(raw, _WIRE_DTYPES[dtype]).astype(np.float32).tolist()
        else:
            entry["data"] = np.frombuffer(raw, _WIRE_DTYPES[dtype]).tolist()
        described.append(entry)
    header["outputs"] = described
    packed = orjson.dumps(header)
    if b"null" in packed:
        # orjson's word for what JSON has no number for: NaN, Infinity. Strict parsers, KServe's client among them, read
        # these as strings; a client that sent them bare, as Triton writes them, is answered so.
        packed = json.dumps(header).encode() if inference.bare else _with_words(header)
    return [packed, *parts], len(packed) if parts else None


def _with_words(header: FreeJson) -> bytes:
    for entry in header["outputs"]:
        if entry["datatype"] in _WORDED and "data" in entry:
            entry["data"] = [number if math.isfinite(number) else word(number) for number in entry["data"]]
    return json.dumps(header).encode()


def _elements(tensor: FreeJson, transients: Transients) -> Raw:
    if "base64" in tensor:
        return base64.b64decode(tensor["base64"])
    raw = transients.read(tensor["transient_id"], tensor["offset"], tensor["size_bytes"])
    # What is mapped is copied, since the file is deleted before the answer is sent.
    return raw if isinstance(raw.obj, bytes) else bytes(raw)


def _given(entry: FreeJson, view: memoryview, at: int) -> tuple[str, Given, int]:
    """One input, and where the next one's bytes begin."""
    name, shape = entry.get("name"), entry.get("shape")
    if not isinstance(name, str):
        raise failure("malformed_request", "an input has no name")
    what = f"input {name!r}"
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise failure("input_mismatch", f"{what}: shape is not a list of whole numbers, 0 or more")
    dtype = _dtype(entry.get("datatype"), what)
    try:
        check_shape(shape, dtype)
    except ValueError as error:
        raise failure("input_mismatch", f"{what}: {error}") from error
    parameters = _parameters(entry, f"parameters of {what}")
    if "shared_memory_region" in parameters:
        raise failure("validation_failed", f"{what}: shared memory is not supported; send the elements")
    size, data = parameters.get("binary_data_size"), entry.get("data")
    if size is None:
        if data is None and 0 not in shape:
            raise failure("input_mismatch", f"{what} has neither data nor binary_data_size")
        # No elements need no data.
        return name, Given(dtype, shape, _from_json([] if data is None else data, dtype, shape, what)), at
    if data is not None and not (size == 0 and data == [] and 0 in shape):
        raise failure("input_mismatch", f"{what} has both data and binary_data_size")
    if type(size) is not int or size < 0 or at + size > len(view):
        raise failure("input_mismatch", f"{what}: binary_data_size is {size}, and {len(view) - at} bytes are left")
    raw = view[at : at + size]
    if dtype == "string":
        unpack_texts(raw, math.prod(shape), what)
    elif math.prod(shape) * FIXED_DTYPES[dtype] != size:
        needed = math.prod(shape) * FIXED_DTYPES[dtype]
        raise failure(
            "input_mismatch", f"{what}: shape {shape} of {NAMES[dtype]} takes {needed} bytes, {size} were given"
        )
    return name, Given(dtype, shape, raw), at + size


def _from_json(data: object, dtype: str, shape: list[int], what: str) -> bytes:
    array = from_numbers(data, dtype, shape, what)
    return pack_texts(array.reshape(-1)) if dtype == "string" else to_bytes(array)


def _dtype(datatype: object, what: str) -> str:
    dtype = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        known = ", ".join(DATATYPES)
        raise failure("dtype_unsupported", f"{what}: there is no datatype {str(datatype)[:40]!r}; there are {known}")
    return dtype


def _wanted(entry: FreeJson, binary: bool) -> RequestedOutput:
    name = entry.get("name")
    if not isinstance(name, str):
        raise failure("malformed_request", "an output has no name")
    parameters = _parameters(entry, f"parameters of output {name!r}")
    for refused in ("classification", "shared_memory_region"):
        if parameters.get(refused):
            raise failure("validation_failed", f"output {name!r}: {refused} is not supported")
    return RequestedOutput(name, bool(parameters.get("binary_data", binary)))


def _json(text: memoryview) -> tuple[FreeJson, bool]:
    """The object, and whether it is JSON but for NaN or an infinity."""
    value, strict = parse_json(text, "the request")
    return _object(value, "the body"), not strict


def _parameters(holder: FreeJson, what: str) -> FreeJson:
    """The parameters in the request, an input or an output; none where there are none, or null."""
    parameters = holder.get("parameters")
    return {} if parameters is None else _object(parameters, what)


def _object(value: object, what: str) -> FreeJson:
    if not isinstance(value, dict):
        raise failure("malformed_request", f"{what} is not a JSON object")
    return value


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise failure("malformed_request", f"{what} is not a JSON list")
    return value
