"""ONNX's own backend node tests, each run by ONNX Runtime in this process and over `/v2`, and compared.

Every operator has several: a graph of one node or a function of a few, with inputs and the outputs expected.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import OptionalProto, SequenceProto, TensorProto, numpy_helper

#: What `ml_dtypes` calls the types that NumPy has not, with the number that ONNX gives each.
NARROW = {
    "tensor(bfloat16)": (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
    "tensor(float8e4m3fn)": (ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN),
    "tensor(float8e4m3fnuz)": (ml_dtypes.float8_e4m3fnuz, TensorProto.FLOAT8E4M3FNUZ),
    "tensor(float8e5m2)": (ml_dtypes.float8_e5m2, TensorProto.FLOAT8E5M2),
    "tensor(float8e5m2fnuz)": (ml_dtypes.float8_e5m2fnuz, TensorProto.FLOAT8E5M2FNUZ),
    "tensor(float8e8m0)": (ml_dtypes.float8_e8m0fnu, 24),
}

#: The protocol's name of each NumPy dtype.
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "bfloat16": "BF16",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in DATATYPES.items()}


@dataclass(frozen=True)
class NodeTest:
    """One test: its graph, its inputs by name, and what each input and output is called by ONNX Runtime."""

    name: str
    graph: bytes
    feeds: dict[str, Any]
    input_types: dict[str, str]
    output_types: dict[str, str]

    @property
    def unofferable(self) -> str | None:
        """The type that no Python program can pass to ONNX Runtime, or get from it."""
        for text in (*self.input_types.values(), *self.output_types.values()):
            if "int4" in text or "float4" in text or "int2" in text:
                return text
        return None


@dataclass
class Report:
    """What became of the tests: by name, those that agree, differ, were refused, or cannot be offered."""

    agree: list[str] = field(default_factory=list)
    differ: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unofferable: dict[str, str] = field(default_factory=dict)


def collected() -> Iterator[NodeTest]:
    """The node tests of the installed onnx that this ONNX Runtime loads on the CPU, each graph with inputs once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found = sorted(load_model_tests(kind="node"), key=lambda test: test.name)
    for test in found:
        folder = Path(test.model_dir)
        graph = (folder / "model.onnx").read_bytes()
        try:
            session = opened(graph)
        except Exception:  # this ONNX Runtime has no such operator, type or opset
            continue
        ins = {one.name: one.type for one in session.get_inputs()}
        outs = {one.name: one.type for one in session.get_outputs()}
        data = folder / "test_data_set_0"
        feeds = {name: _value(data / f"input_{number}.pb", kind) for number, (name, kind) in enumerate(ins.items())}
        yield NodeTest(test.name, graph, feeds, ins, outs)


def opened(graph: bytes) -> ort.InferenceSession:
    """The graph's session in this process."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run_here(test: NodeTest) -> dict[str, Any]:
    """What ONNX Runtime gives in this process: arrays, lists, dictionaries or None, by output."""
    session = opened(test.graph)
    names = list(test.output_types)
    if not any(text in NARROW for text in (*test.input_types.values(), *test.output_types.values())):
        return dict(zip(names, session.run(names, test.feeds), strict=True))
    feeds = {}
    for name, array in test.feeds.items():
        _, number = NARROW.get(test.input_types[name], (None, None))
        feeds[name] = (
            ort.OrtValue.ortvalue_from_numpy(array)
            if number is None
            else ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), number)
        )
    given = session.run_with_ort_values(names, feeds)
    return {name: _array(value, test.output_types[name]) for name, value in zip(names, given, strict=True)}


def run_there(http: httpx.Client, model: str, test: NodeTest) -> dict[str, Any]:
    """What the product gives over `/v2`, binary both ways. Raises `RefusedError`."""
    described = []
    parts = []
    for name, value in test.feeds.items():
        if value is None:
            continue  # an optional input without a value is left out
        datatype, shape, raw = _packed(value, test.input_types[name])
        described.append(
            {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(raw)}}
        )
        parts.append(raw)
    header = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    answer = http.post(
        f"/v2/models/{model}/infer",
        content=b"".join([header, *parts]),
        headers={"Inference-Header-Content-Length": str(len(header))},
    )
    if answer.status_code != 200:
        raise RefusedError(f"infer: {answer.status_code} {answer.text}")
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    told = json.loads(answer.content[:length])
    at = length
    given: dict[str, Any] = dict.fromkeys(test.output_types)
    for output in told["outputs"]:
        size = output["parameters"]["binary_data_size"]
        given[output["name"]] = _unpacked(output, answer.content[at : at + size], test.output_types[output["name"]])
        at += size
    return given


class RefusedError(Exception):
    """The product refused to load or to run what ONNX Runtime loads and runs."""


def compare(http: httpx.Client, tests: list[NodeTest], *, threads: int = 6) -> Report:
    """Runs every test in this process and over `/v2`. Tests of one graph follow each other on one load."""
    graphs: dict[str, list[NodeTest]] = {}
    for test in tests:
        graphs.setdefault(hashlib.sha256(test.graph).hexdigest()[:20], []).append(test)
    report = Report()
    with ThreadPoolExecutor(threads) as pool:
        for told in pool.map(lambda item: _compared(http, *item), graphs.items()):
            for name, kind, why in told:
                if kind == "agree":
                    report.agree.append(name)
                else:
                    getattr(report, kind)[name] = why
    return report


def _compared(http: httpx.Client, key: str, tests: list[NodeTest]) -> list[tuple[str, str, str]]:
    found = []
    ours = []
    for test in tests:
        if test.unofferable:
            found.append((test.name, "unofferable", test.unofferable))
            continue
        try:
            ours.append((test, run_here(test), run_here(test)))
        except Exception:  # ONNX Runtime loads it and does not run it
            continue
    if not ours:
        return found
    model = f"node-{key}"
    try:
        _load(http, model, tests[0].graph)
    except RefusedError as error:
        return found + [(test.name, "refused", str(error)) for test, _, _ in ours]
    for test, once, again in ours:
        try:
            there = run_there(http, model, test)
        except RefusedError as error:
            found.append((test.name, "refused", str(error)))
            continue
        wrong = _differences(test, once, again, there)
        found.append((test.name, "differ" if wrong else "agree", wrong))
    http.post(f"/v2/repository/models/{model}/unload")
    return found


def _load(http: httpx.Client, model: str, graph: bytes) -> None:
    parameters = {"config": '{"max_batch_size": 1}', "file:1/model.onnx": base64.b64encode(graph).decode()}
    answer = http.post(f"/v2/repository/models/{model}/load", json={"parameters": parameters})
    if answer.status_code != 200:
        raise RefusedError(f"load: {answer.status_code} {answer.text}")


def _differences(test: NodeTest, once: dict[str, Any], again: dict[str, Any], there: dict[str, Any]) -> str:
    """What differs between here and there; of what ONNX Runtime draws by chance, dtype and shape only."""
    for name, mine in once.items():
        theirs = there[name]
        chance = not _same(mine, again[name])
        if chance and np.asarray(mine).shape == np.asarray(theirs).shape:
            continue
        if not _same(mine, theirs):
            return f"{name} ({test.output_types[name]}): {str(mine)[:200]} here, {str(theirs)[:200]} there"
    return ""


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is None and b is None
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or (a.dtype != b.dtype and "O" not in (a.dtype.kind, b.dtype.kind)):
        return False
    if a.dtype.kind in "OUS":
        return a.tolist() == b.tolist()
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


# ---- the protocol's forms, written here once more so that nothing of the product's is its own judge


def _packed(value: Any, kind: str) -> tuple[str, list[int], bytes]:
    """The datatype, shape and bytes of an input."""
    if isinstance(value, list):
        return "BYTES", [len(value)], _texts([json.dumps(_jsonable(element)).encode() for element in value])
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return "BYTES", list(array.shape), _texts([str(text).encode() for text in array.reshape(-1)])
    name = DATATYPES.get(array.dtype.name, "UINT8")  # floats of eight bits go as their bytes
    return name, list(array.shape), np.ascontiguousarray(array).tobytes()


def _unpacked(output: dict[str, Any], raw: bytes, kind: str) -> Any:
    shape = output["shape"]
    if output["datatype"] == "BYTES":
        texts = []
        at = 0
        while at < len(raw):
            (length,) = struct.unpack_from("<I", raw, at)
            texts.append(raw[at + 4 : at + 4 + length].decode())
            at += 4 + length
        assert len(texts) == math.prod(shape)
        if "seq(" in kind:
            dtype = _element(kind)
            return [_from_json(json.loads(text), dtype) for text in texts]
        array = np.empty(len(texts), object)
        array[:] = texts
        return array.reshape(shape)
    dtype = NARROW[kind][0] if kind in NARROW else np.dtype(_DTYPES[output["datatype"]])
    return np.frombuffer(raw, dtype).reshape(shape)


def _element(kind: str) -> Any:
    names = {"float": "float32", "double": "float64", "string": "object"}
    inner = kind.split("tensor(")[1].split(")", maxsplit=1)[0]
    return np.dtype(names.get(inner, inner))


def _jsonable(value: Any) -> Any:
    array = np.asarray(value)
    return {"shape": list(array.shape), "data": array.reshape(-1).tolist()} if array.size == 0 else array.tolist()


def _from_json(value: Any, dtype: Any) -> Any:
    if isinstance(value, dict):
        return np.array(value["data"], dtype).reshape(value["shape"])
    return np.array(value, dtype)


def _texts(items: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def _array(value: Any, kind: str) -> Any:
    if kind not in NARROW:
        return value.numpy()
    dtype = np.dtype(NARROW[kind][0])
    size = math.prod(value.shape())
    raw = ctypes.string_at(value.data_ptr(), size * dtype.itemsize) if size else b""
    return np.frombuffer(raw, dtype).reshape(value.shape())


_READERS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "tensor": (TensorProto, numpy_helper.to_array),
    "seq": (SequenceProto, numpy_helper.to_list),
    "optional": (OptionalProto, numpy_helper.to_optional),
}


def _value(file: Path, kind: str) -> Any:
    proto, convert = _READERS[kind.split("(", maxsplit=1)[0]]
    message = proto()
    message.ParseFromString(file.read_bytes())
    return convert(message)
