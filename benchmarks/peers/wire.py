"""Requests and answers in the form that is cheapest for each contender over its own HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]

_DATATYPES = {"float32": "FP32", "int64": "INT64"}


class OpenInference:
    """The Open Inference Protocol: raw bytes behind the JSON, or numbers in the JSON where `as_json`."""

    def __init__(self, path: str, outputs: list[str], *, as_json: bool) -> None:
        self._path = path
        self._outputs = outputs
        self._as_json = as_json

    def request(self, row: Arrays) -> bytes:
        """One HTTP request for one row; arrays have a batch axis of 1."""
        inputs: list[dict[str, Any]] = []
        for name, array in row.items():
            told = {"name": name, "shape": list(array.shape), "datatype": _DATATYPES[array.dtype.name]}
            more = {"data": array.ravel().tolist()} if self._as_json else _size(array)
            inputs.append({**told, **more})
        header: dict[str, Any] = {"inputs": inputs}
        if self._as_json:
            return post(self._path, _packed(header))
        header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in self._outputs]
        packed = _packed(header)
        raw = b"".join(array.tobytes() for array in row.values())
        return post(self._path, packed + raw, f"Inference-Header-Content-Length: {len(packed)}\r\n")

    def outputs(self, head: bytes, body: bytes) -> list[Array]:
        """The outputs of an answer, as flat float32 arrays in the order asked for."""
        if self._as_json:
            found = {output["name"]: output["data"] for output in json.loads(body)["outputs"]}
            return [np.array(found[name], np.float32) for name in self._outputs]
        at = int(head.lower().split(b"inference-header-content-length:")[1].split(b"\r\n")[0])
        arrays = {}
        for output in json.loads(body[:at])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            arrays[output["name"]] = np.frombuffer(body, np.float32, size // 4, at)
            at += size
        return [arrays[name] for name in self._outputs]


class MlServer:
    """MLServer: numbers in JSON where they are few, else base64 in a BYTES tensor."""

    def __init__(self, outputs: list[str], *, as_json: bool) -> None:
        self._outputs = outputs
        self._as_json = as_json

    def request(self, row: Arrays) -> bytes:
        """One HTTP request for one row."""
        inputs: list[dict[str, Any]] = []
        for name, array in row.items():
            if self._as_json:
                shape, datatype, data = list(array.shape), _DATATYPES[array.dtype.name], array.ravel().tolist()
            else:
                shape, datatype, data = [1, 1], "BYTES", [base64.b64encode(array.tobytes()).decode()]
            inputs.append({"name": name, "shape": shape, "datatype": datatype, "data": data})
        return post("/v2/models/model/infer", _packed({"inputs": inputs}))

    def outputs(self, head: bytes, body: bytes) -> list[Array]:
        """The outputs of an answer, as flat float32 arrays."""
        told = {output["name"]: output for output in json.loads(body)["outputs"]}
        arrays = []
        for name in self._outputs:
            data = told[name]["data"]
            packed = told[name]["datatype"] == "BYTES"
            arrays.append(
                np.frombuffer(base64.b64decode(data[0]), np.float32) if packed else np.array(data, np.float32)
            )
        return arrays


class Raw:
    """Bytes in, bytes out, for LitServe."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def request(self, row: Arrays) -> bytes:
        """One HTTP request for one row."""
        raw = b"".join(array.tobytes() for array in row.values())
        return post("/predict", raw, "Content-Type: application/octet-stream\r\n")

    def outputs(self, head: bytes, body: bytes) -> list[Array]:
        """The outputs of an answer, as flat float32 arrays."""
        whole = np.frombuffer(body, np.float32)
        return np.split(whole, np.cumsum(self._sizes)[:-1])


def post(path: str, body: bytes, headers: str = "Content-Type: application/json\r\n") -> bytes:
    """A whole HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _size(array: Array) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": array.nbytes}}


def _packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
