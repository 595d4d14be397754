"""Sessions of every kind of model over HTTP: trained, validated, and brought back after their worker's death."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save
from torch import nn

from tests.training_service.calls import Training, arrays, batch, tensor

WIDE = [
    {"type": "linear", "name": "fc1", "in_features": 6, "out_features": 16},
    {"type": "relu"},
    {"type": "linear", "name": "fc2", "in_features": 16, "out_features": 4},
]


def weights() -> dict[str, np.ndarray]:
    random = np.random.RandomState(3)
    shapes = {"fc1.weight": (16, 6), "fc1.bias": (16,), "fc2.weight": (4, 16), "fc2.bias": (4,)}
    return {name: random.randn(*shape).astype(np.float32) / 4 for name, shape in shapes.items()}


def graph() -> onnx.ModelProto:
    """The same classifier as an ONNX graph, its input and output named `input` and `scores`."""
    nodes = [
        helper.make_node("Gemm", ["input", "fc1.weight", "fc1.bias"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "fc2.weight", "fc2.bias"], ["scores"], transB=1),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
             for name, size in (("input", 6), ("scores", 4))]  # fmt: skip
    initializers = [numpy_helper.from_array(array, name) for name, array in weights().items()]
    made = helper.make_graph(nodes, "classifier", ports[:1], ports[1:], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def program() -> bytes:
    module, file = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_sessions_of_every_kind_of_model_train_validate_and_come_back_bit_for_bit(mortal: Training) -> None:
    layers = {"kind": "layers", "layers": WIDE}
    given = {"blob_id": mortal.upload(save(weights()))}
    kinds: dict[str, dict[str, Any]] = {
        "onnx": {"model": {"kind": "onnx", "blob_id": mortal.upload(graph().SerializeToString())}},
        "torchscript": {"model": {"kind": "torchscript", "blob_id": mortal.upload(program())}},
        "weights": {"model": layers, "weights": given, "trainable": ["fc2.*"]},
        "lora": {"model": layers, "weights": given, "lora": {"rank": 2, "targets": ["fc1"]}},
    }
    sessions = {name: mortal.initialize(**fields) for name, fields in kinds.items()}
    twins = {name: mortal.initialize(**fields) for name, fields in kinds.items()}
    for session_id in (*sessions.values(), *twins.values()):
        for number in (1, 2):
            mortal.done(mortal.step(session_id, number))
    for session_id in twins.values():
        mortal.done(mortal.step(session_id, 3))
    wanted = {name: (mortal.state(session_id), mortal.losses(session_id)) for name, session_id in twins.items()}

    mortal.stack.kill("cpu_0")
    mortal.stack.start("cpu_0")
    inputs, targets = arrays(9)
    for name, session_id in sessions.items():
        assert mortal.done(mortal.step(session_id, 3))["result"]["step"] == 3
        assert (mortal.state(session_id), mortal.losses(session_id)) == wanted[name], name
        body = {"session_id": session_id, "inputs": {"input": tensor(inputs)}, "targets": tensor(targets)}
        assert mortal.done(mortal.submit("validate", body))["result"]["largest_difference"] < 1e-5, name


def test_a_model_that_came_as_onnx_is_given_back_as_the_file_it_was_with_its_trained_weights(
    training: Training,
) -> None:
    original = graph()
    session_id = training.initialize(model={"kind": "onnx", "blob_id": training.upload(original.SerializeToString())})
    inputs, targets = arrays(9)
    before = onnxruntime.InferenceSession(original.SerializeToString()).run(None, {"input": inputs})[0]
    judged = training.done(training.step(session_id, mode="evaluate", **batch(9)))["result"]
    assert judged["accuracy"] == float((before.argmax(1) == targets).mean())
    for number in range(1, 6):
        training.done(training.step(session_id, number))
    made = training.checkpoint(session_id, export=["onnx"])
    exported = onnx.load_from_string(training.blob(made["onnx_blob_id"]))
    moved = {one.name for one, other in zip(exported.graph.initializer, original.graph.initializer, strict=True)
             if one.raw_data != other.raw_data}  # fmt: skip
    assert moved == set(weights())
    for model in (exported, original):
        for place in model.graph.initializer:
            place.ClearField("raw_data")
    assert exported == original
    training.end(session_id)
