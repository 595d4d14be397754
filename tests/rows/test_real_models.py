"""Real models: the verdict, that it holds in ONNX Runtime, and what it costs beside the load."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.rows.joined import difference, session_of
from workers.devices.onnx.graph import read_graph
from workers.rows.proof import Proof, prove


def _floats(*shape: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    return {"x": (np.float32, shape)}


TOKENS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (np.int64, (12,)))

MODELS = {
    "minilm/model": TOKENS,
    "rapidocr/ch_PP-OCRv4_det_infer": _floats(3, 64, 96),
    "rapidocr/ch_PP-OCRv4_rec_infer": _floats(3, 48, 96),
    "rapidocr/ch_ppocr_mobile_v2.0_cls_infer": _floats(3, 48, 192),
    "magika/model": {"bytes": (np.int32, (2048,))},
}


#: How many values whole numbers have, by input; two where it is not said.
VALUES = {"input_ids": 1000, "bytes": 256}


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_real_models_are_proven_apart_and_are(models_dir: Path, name: str) -> None:
    path = models_dir / f"{name}.onnx"
    found = prove(read_graph(path))
    assert found.proof is Proof.PROVEN, found
    random = np.random.default_rng(1)
    session = session_of(onnx.load(path))
    callers = [
        {
            given: (
                random.standard_normal((1, *shape)).astype(dtype)
                if dtype is np.float32
                else random.integers(0, VALUES.get(given, 2), (1, *shape)).astype(dtype)
            )
            for given, (dtype, shape) in MODELS[name].items()
        }
        for _ in range(3)
    ]
    if "attention_mask" in MODELS[name]:
        for rows in callers:
            rows["attention_mask"][:, :3] = 1
    assert difference(session, callers) is None


def test_a_state_with_another_first_axis_keeps_a_model_alone(models_dir: Path) -> None:
    found = prove(read_graph(models_dir / "silero" / "silero_vad.onnx"))
    assert (found.proof, found.reason) == (Proof.DISPROVEN, "state has no open first axis")


@pytest.mark.parametrize("name", [*MODELS, "silero/silero_vad"])
def test_a_graph_without_its_weights_is_the_same_graph(models_dir: Path, name: str) -> None:
    path = models_dir / f"{name}.onnx"
    whole, bare = onnx.load(path), read_graph(path)
    assert read_graph(path.read_bytes()) == bare
    assert bare.ByteSize() < whole.ByteSize() / 2
    assert _emptied(whole.graph) == _emptied(bare.graph)
    assert prove(whole) == prove(bare)


def _emptied(graph: onnx.GraphProto) -> onnx.GraphProto:
    """The graph with no numbers in any tensor."""
    for tensor in graph.initializer:
        _empty(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            _empty(attribute.t)
            _emptied(attribute.g)
    return graph


def _empty(tensor: onnx.TensorProto) -> None:
    for numbers in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(numbers)


def test_a_proof_takes_a_few_microseconds_a_node(models_dir: Path) -> None:
    path = models_dir / "minilm" / "model.onnx"
    nodes = len(read_graph(path).graph.node)
    taken = []
    for _ in range(10):
        began = time.process_time()
        prove(read_graph(path))
        taken.append(time.process_time() - began)
    assert min(taken) < nodes * 100e-6
