"""Low-rank adapters: nothing changes at first, only they are trained, and export merges them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from device_operations.errors import OperationError
from tests.training.sessions import OPTIMIZERS, batch, carried_over, digest, start, train
from tests.training.test_onnx_models import open_model, small_graph
from workers.training.model.ports import Batch
from workers.training.onnx.export import onnx_bytes
from workers.training.outcomes import StepOptions

LORA = {"rank": 2, "alpha": 8.0}


def test_a_new_adapter_changes_nothing_and_training_moves_nothing_else() -> None:
    plain, adapted = start(), start(lora=LORA)
    x = batch(1).inputs
    assert torch.equal(plain.outputs(x)["output"], adapted.outputs(x)["output"])
    before = adapted.snapshot().part("parameter/")
    train(adapted, 5)
    after = adapted.snapshot().part("parameter/")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    layers = ("fc1", "block.mix", "fc2")
    assert moved == {f"{layer}.lora_{factor}" for layer in layers for factor in "ab"}
    assert before["fc1.lora_a"].shape == (2, 6)
    assert before["fc1.lora_b"].shape == (12, 2)
    assert adapted.memory_bytes() < plain.memory_bytes()


def test_the_export_is_the_model_without_adapters_and_gives_the_same_outputs() -> None:
    session = start(lora=LORA)
    train(session, 10)
    exported = onnx_bytes(session.definition, session.spec, session.snapshot())
    served = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    x = batch(3).inputs
    np.testing.assert_allclose(served.run(None, dict(x))[0], session.outputs(x)["output"].numpy(), atol=1e-5)
    assert b"lora" not in exported


def test_targets_and_trainable_patterns_choose_together() -> None:
    session = start(lora=LORA | {"targets": ["fc*"]}, trainable=["norm.*"])
    names = {name.rsplit("/", 1)[1] for name in session.snapshot().tensors if name.startswith("optimizer/exp_avg/")}
    adapters = {f"{layer}.lora_{factor}" for layer in ("fc1", "fc2") for factor in "ab"}
    assert names == adapters | {"norm.weight", "norm.bias"}


def test_adapters_are_carried_over_to_the_bit(tmp_path: Path) -> None:
    whole, session = start(lora=LORA), start(lora=LORA)
    train(whole, 6)
    train(session, 3)
    session = carried_over(session, tmp_path, lora=LORA)
    train(session, 3, first=4)
    assert digest(session) == digest(whole)


def test_a_model_without_linear_layers_and_a_target_that_fits_none_are_refused() -> None:
    normal = {"kind": "layers", "layers": [{"type": "layer_norm", "normalized_shape": 6}]}
    with pytest.raises(OperationError, match="lora needs linear layers"):
        start(model=normal, lora=LORA)
    with pytest.raises(OperationError, match="'fc9' fits none"):
        start(lora=LORA | {"targets": ["fc9"]})


def test_attention_is_no_target_as_torch_would_read_past_the_adapter() -> None:
    layers = [{"type": "multihead_attention", "embed_dim": 6, "num_heads": 2}, {"type": "flatten"}]
    with pytest.raises(OperationError, match="the model has none"):
        start(model={"kind": "layers", "layers": layers}, lora=LORA)


def test_the_products_of_a_graph_take_adapters_and_are_written_back_merged(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    weights = {
        "first.weight": random.randn(6, 5).astype(np.float32),
        "second": random.randn(3, 5).astype(np.float32),
        "bias": np.zeros(3, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "second", "bias"], ["y"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])
    path = small_graph(tmp_path / "m.onnx", nodes, weights, [x], "y")
    session = open_model(path, lora=LORA, optimizer=OPTIMIZERS["adam"])
    inputs = {"x": batch(1).inputs["input"]}
    targets = np.ones((8, 3), np.float32)
    losses = [session.perform(Batch(inputs, targets), StepOptions(), number).loss for number in range(1, 30)]
    assert losses[-1] < 0.5 * losses[0]
    after = session.snapshot().part("parameter/")
    for name, weight in weights.items():
        np.testing.assert_array_equal(after[name].numpy(), weight)
    exported = onnx_bytes(session.definition, session.spec, session.snapshot())
    served = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(served.run(None, inputs)[0], session.outputs(inputs)["y"].numpy(), atol=1e-5)
