"""What of a model is trained and why: defaults, patterns, ties, shared constants, dropout and statistics by mode."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from device_operations.errors import OperationError
from tests.training.networks import export, make
from tests.training.sessions import CPU, LAYERS, LIMITS, batch, describe, digest, start
from workers.training.model.definition import Sources
from workers.training.model.listing import ListedTensor, list_tensors
from workers.training.model.ports import Batch
from workers.training.onnx.export import onnx_bytes
from workers.training.optimization.determinism import derive_seed
from workers.training.outcomes import StepOptions
from workers.training.session import Limits, TrainingSession, build_session

SGD = {"type": "sgd", "learning_rate": 0.1}


def open_file(path: Path, **fields: Any) -> TrainingSession:
    fields = {"optimizer": SGD, "model": {"kind": "onnx", "path": path.name}} | fields
    limits = Limits(LIMITS.memory_bytes, LIMITS.max_batch_size, trust_programs=True)
    return build_session(describe(**fields), Sources(model=path), CPU, limits)


def listed(session: TrainingSession) -> dict[str, ListedTensor]:
    found = list_tensors(session.definition, session.spec, session.state.model)
    assert len({tensor.name for tensor in found}) == len(found)
    assert {tensor.name for tensor in found if tensor.trained} >= set(session.state.model.trained)
    return {tensor.name: tensor for tensor in found}


def graph_file(path: Path, nodes: list[Any], weights: dict[str, Any], outputs: list[str], rank: int = 2) -> Path:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


# ---- what is trained


def test_buffers_are_listed_with_what_reads_them_and_are_not_trained(tmp_path: Path) -> None:
    found = listed(open_file(export("norm", "preserve", tmp_path / "m")))
    assert {name for name, tensor in found.items() if tensor.trained} == {"a.weight", "a.bias"}
    assert found["a.weight"] == ListedTensor("a.weight", [4, 6], "float32", True, found["a.weight"].reason)
    assert "Gemm" in found["a.weight"].reason
    assert "only read by Sub" in found["mean"].reason
    assert "only read by Div" in found["std"].reason


def test_the_newer_exporters_record_of_parameters_and_buffers_is_believed(tmp_path: Path) -> None:
    found = listed(open_file(export("causal", "dynamo unoptimized", tmp_path / "m")))
    assert found["mask"].reason == "buffer by the exporter's record"
    assert found["q.weight"].reason == "parameter by the exporter's record"
    assert (found["mask"].trained, found["q.weight"].trained) == (False, True)


def test_a_wildcard_that_fits_parameters_names_no_buffer_and_a_name_may_name_one(tmp_path: Path) -> None:
    path = export("norm", "preserve", tmp_path / "m")
    everything = open_file(path, trainable=["*"])
    assert set(everything.state.model.trained) == {"a.weight", "a.bias"}
    more = open_file(path, trainable=["*", "mean"])
    assert set(more.state.model.trained) == {"a.weight", "a.bias", "mean"}
    assert listed(more)["mean"].reason.startswith("named by trainable")
    fewer = open_file(path, trainable=["*.bias", "st?"])
    assert set(fewer.state.model.trained) == {"a.bias", "std"}
    assert listed(fewer)["a.weight"].reason.startswith("frozen: not named by trainable")


def test_single_numbers_are_trained_only_where_their_whole_name_is_given(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "scale"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    weights = {"w": random(3, 4), "scale": np.float32(2)}
    path = graph_file(tmp_path / "m", nodes, weights, ["y"])
    assert set(open_file(path, trainable=["w", "scale"]).state.model.trained) == {"w", "scale"}
    with pytest.raises(OperationError, match=r"'sc\*' fits none of the names there are: w$"):
        open_file(path, trainable=["sc*"])
    assert "a single number" in listed(open_file(path))["scale"].reason


def test_the_tensors_of_layers_and_adapters_say_why_they_are_trained_or_not() -> None:
    found = listed(start())
    assert {tensor.reason for tensor in found.values() if tensor.trained} == {"parameter of a layer"}
    assert found["norm.running_mean"] == ListedTensor("norm.running_mean", [12], "float32", False, "buffer of a layer")
    assert "norm.num_batches_tracked" not in found
    named = listed(start(trainable=["fc*"]))
    assert named["fc1.weight"].reason == "named by trainable; parameter of a layer"
    assert named["norm.weight"].reason == "frozen: not named by trainable; parameter of a layer"
    adapted = listed(start(lora={"rank": 2, "targets": ["fc2"]}))
    assert adapted["fc2.weight"].reason == "frozen: lora; parameter of a layer"
    assert adapted["fc2.lora_a"] == ListedTensor("fc2.lora_a", [2, 12], "float32", True, "adapter of lora")


def test_adapters_of_a_graph_freeze_its_weights(tmp_path: Path) -> None:
    found = listed(open_file(export("norm", "preserve", tmp_path / "m"), lora={"rank": 2}))
    assert found["a.weight"].reason.startswith("frozen: lora; weight of Gemm")
    assert {name for name, tensor in found.items() if tensor.trained} == {"a.weight.lora_a", "a.weight.lora_b"}


# ---- constants that several nodes read


def test_a_constant_shared_by_a_scale_and_a_statistic_is_split(tmp_path: Path) -> None:
    """Exporters merge equal tensors: at the start a scale, a shift and both statistics are ones and zeros."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("BatchNormalization", ["a", "ones", "zeros", "zeros", "ones"], ["b"], name="first"),
        node("BatchNormalization", ["b", "ones", "zeros", "zeros", "ones"], ["y"], name="second"),
    ]
    weights = {"w": random(4, 2, 3, 3), "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    path = graph_file(tmp_path / "m", nodes, weights, ["y"], rank=4)
    session = open_file(path, loss="mse")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    network[0].weight.data = torch.from_numpy(weights["w"].copy())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    assert sum(parameter.numel() for parameter in session.state.model.trained.values()) == 72 + 4 * 4
    for number in range(1, 6):
        x, targets = random(3, 2, 5, 5, seed=number), random(3, 4, 3, 3, seed=100 + number)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(torch.from_numpy(x)), torch.from_numpy(targets))
        loss.backward()
        optimizer.step()
        outcome = session.perform(Batch({"x": x}, targets), StepOptions(), number)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-6)
    served = onnxruntime.InferenceSession(
        onnx_bytes(session.definition, session.spec, session.snapshot()), providers=["CPUExecutionProvider"]
    ).run(None, {"x": x})[0]
    with torch.no_grad():
        np.testing.assert_allclose(served, network.eval()(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-5)


def test_a_tied_weight_is_listed_once_and_its_copy_says_whom_it_follows(tmp_path: Path) -> None:
    found = listed(open_file(export("gpt2", "eval", tmp_path / "m")))
    follows = [tensor for tensor in found.values() if "has the elements of e.weight and follows it" in tensor.reason]
    assert len(follows) == 1 and follows[0].trained
    assert sorted(follows[0].shape) == sorted(found["e.weight"].shape)


def test_outputs_that_nothing_reads_do_not_refuse_an_operator(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "s", "b"], ["a", "mean", "deviation"], name="norm"),
        node("MatMul", ["a", "w"], ["c"]),
        node("Dropout", ["c"], ["y", "mask"]),
    ]
    weights = {"s": np.ones(3, np.float32), "b": np.zeros(3, np.float32), "w": random(3, 4)}
    session = open_file(graph_file(tmp_path / "m", nodes, weights, ["y"]))
    assert session.perform(Batch({"x": random(2, 3)}, np.array([0, 3])), StepOptions(), 1).loss
    read = [*nodes, node("Identity", ["mean"], ["z"])]
    with pytest.raises(OperationError, match=r"LayerNormalization \(node 'norm'\).*mean and deviation outputs"):
        open_file(graph_file(tmp_path / "m", read, weights, ["y", "z"]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"inputs": ["x", "w", "r", "", "lengths"]}, "length of each sequence"),
        ({"inputs": ["x", "w", "r", "", "", "", "", "p"]}, "peephole"),
        ({"layout": 1}, "layout 1"),
        ({"clip": 1.0}, "clips"),
        ({"input_forget": 1}, "coupled"),
        ({"activations": ["Affine", "Tanh", "Tanh"]}, "activations Affine"),
    ],
)
def test_a_recurrent_operator_in_a_form_that_is_not_known_is_refused_by_node(
    changed: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    inputs = changed.pop("inputs", ["x", "w", "r"])
    node = helper.make_node("LSTM", inputs, ["y"], name="cells", hidden_size=4, **changed)
    weights = {
        "w": random(1, 16, 3), "r": random(1, 16, 4), "p": random(1, 12), "lengths": np.array([2, 2], np.int32),
    }  # fmt: skip
    with pytest.raises(OperationError, match=rf"LSTM \(node 'cells'\).*{reason}") as caught:
        open_file(graph_file(tmp_path / "m", [node], weights, ["y"], rank=3))
    assert caught.value.detail == {"operator": "LSTM", "node": "cells"}


def test_a_refusal_of_an_unknown_operator_names_operator_node_and_remedy(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Det", ["a"], ["y"], name="volume")]
    with pytest.raises(OperationError, match=r"Det \(node 'volume'\).*dynamo=True.*describe it as layers"):
        open_file(graph_file(tmp_path / "m", nodes, {"w": random(3, 3)}, ["y"]))


# ---- modes


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b = nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.d(torch.relu(self.a(x))))


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_network_exported_in_training_mode_drops_while_training_and_comes_out_in_inference_mode(
    dynamo: bool, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    network, x = Dropping().train(), torch.randn(5, 6)
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": dynamo}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            options = {"optimize": False, "external_data": False, "verbose": False}
            axes = {"dynamic_shapes": ({0: torch.export.Dim("b")},)}
        else:
            options = {"training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False}
            axes = {"dynamic_axes": {"x": {0: "b"}, "y": {0: "b"}}}
        torch.onnx.export(network, (x,), str(tmp_path / "m"), **names, **options, **axes)
    assert [len(node.input) for node in onnx.load(tmp_path / "m").graph.node if node.op_type == "Dropout"] == [3]
    session = open_file(tmp_path / "m", seed=9)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for number in range(1, 11):
        one = batch(number)
        torch.manual_seed(derive_seed(9, "step", number - 1, 0))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            network(torch.from_numpy(one.inputs["input"])), torch.from_numpy(one.targets)
        )
        loss.backward()
        optimizer.step()
        outcome = session.perform(Batch({"x": one.inputs["input"]}, one.targets), StepOptions(), number)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-6), f"step {number}"
    content = onnx_bytes(session.definition, session.spec, session.snapshot())
    nodes = onnx.load_from_string(content).graph.node
    # ONNX Runtime passes everything in any case; other runtimes do as the third input says.
    assert [len(node.input) for node in nodes if node.op_type == "Dropout"] == [2]
    served = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = network.eval()(x).numpy()
    for _ in range(2):
        np.testing.assert_allclose(served.run(None, {"x": x.numpy()})[0], wanted, rtol=1e-5, atol=1e-6)


def _program() -> bytes:
    buffer = io.BytesIO()
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    torch.jit.save(torch.jit.script(network), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["layers", "torchscript"])
def test_frozen_statistics_of_layers_and_programs_are_used_in_training_and_stay(kind: str, tmp_path: Path) -> None:
    quiet = [layer for layer in LAYERS if layer["type"] != "dropout"]
    fields: dict[str, Any] = {"optimizer": SGD, "frozen_statistics": True}
    path = None
    if kind == "layers":
        fields["model"] = {"kind": "layers", "layers": quiet}
    else:
        path = tmp_path / "program"
        path.write_bytes(_program())
        fields["model"] = {"kind": "torchscript", "blob_id": "b"}
    limits = Limits(LIMITS.memory_bytes, LIMITS.max_batch_size, trust_programs=True)
    session = build_session(describe(**fields), Sources(model=path), CPU, limits)
    name = session.definition.inputs[0].name
    network = session.definition.build(0).train()
    for module in network.modules():
        if "BatchNorm" in (getattr(module, "original_name", "") or type(module).__name__):
            module.eval()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = {name: tensor.clone() for name, tensor in session.snapshot().part("buffer/").items()}
    # A batch of one, which batch normalization refuses when it takes its statistics from the batch.
    for number, size in enumerate((8, 1, 5), 1):
        one = batch(number, size)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            network(torch.from_numpy(one.inputs["input"])), torch.from_numpy(one.targets)
        )
        loss.backward()
        optimizer.step()
        outcome = session.perform(Batch({name: one.inputs["input"]}, one.targets), StepOptions(), number)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-6)
    after = session.snapshot().part("buffer/")
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_what_frozen_statistics_let_in_does_not_pass_for_sessions_without_them() -> None:
    networks: Any = OrderedDict()
    one = batch(1, 1)
    frozen = build_session(describe(frozen_statistics=True), Sources(), CPU, LIMITS, networks)
    assert frozen.perform(one, StepOptions(), 1).loss
    plain = build_session(describe(), Sources(), CPU, LIMITS, networks)
    before = digest(plain)
    with pytest.raises(OperationError, match="more than 1 value") as caught:
        plain.perform(one, StepOptions(), 1)
    assert caught.value.code == "input_mismatch"
    assert digest(plain) == before


def test_a_network_that_is_named_after_its_normalization_is_not_taken_for_one_that_was_folded(tmp_path: Path) -> None:
    assert "BatchNorm" in type(make("bn")).__name__
    open_file(export("bn", "dynamo unoptimized", tmp_path / "whole"))
    with pytest.raises(OperationError, match=r"folded batch normalization.*into Conv"):
        open_file(export("bn", "dynamo", tmp_path / "folded"))
