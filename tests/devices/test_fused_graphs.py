"""Graphs of diffusion models after their operators were joined: the same results, and what was joined is what was meant.

Three of ONNX Runtime's own operators run on CUDA only; here they are spelled out again by operators that the CPU has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from tests.support import pipelines
from workers.devices.onnx.fusions.diffusion import SUFFIX, fused, joined


def _constant(name: str, values: np.ndarray[Any, Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))


def _spelled(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """What the operator computes, as ONNX Runtime documents it."""
    said = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    x, y = next(iter(node.input), ""), node.output[0]
    if node.op_type == "NhwcConv":
        said.pop("group")
        yield helper.make_node("Transpose", [x], [f"{y}/x"], perm=[0, 3, 1, 2])
        yield helper.make_node("Transpose", [node.input[1]], [f"{y}/w"], perm=[0, 3, 1, 2])
        yield helper.make_node("Conv", [f"{y}/x", f"{y}/w", *node.input[2:]], [f"{y}/y"], **said)
        yield helper.make_node("Transpose", [f"{y}/y"], [y], perm=[0, 2, 3, 1])
    elif node.op_type == "GroupNorm":
        groups = said["groups"]
        yield helper.make_node("Transpose", [x], [f"{y}/x"], perm=[0, 3, 1, 2])
        yield helper.make_node("Shape", [f"{y}/x"], [f"{y}/s"])
        yield _constant(f"{y}/cut", np.array([0, groups, -1]))
        yield helper.make_node("Reshape", [f"{y}/x", f"{y}/cut"], [f"{y}/g"])
        yield _constant(f"{y}/1", np.ones(groups, np.float32))
        yield _constant(f"{y}/0", np.zeros(groups, np.float32))
        norm = [f"{y}/g", f"{y}/1", f"{y}/0"]
        yield helper.make_node("InstanceNormalization", norm, [f"{y}/n"], epsilon=said["epsilon"])
        yield helper.make_node("Reshape", [f"{y}/n", f"{y}/s"], [f"{y}/r"])
        yield helper.make_node("Transpose", [f"{y}/r"], [f"{y}/t"], perm=[0, 2, 3, 1])
        yield helper.make_node("Mul", [f"{y}/t", node.input[1]], [f"{y}/m"])
        last = f"{y}/a" if said["activation"] else y
        yield helper.make_node("Add", [f"{y}/m", node.input[2]], [last])
        if said["activation"]:
            yield helper.make_node("Sigmoid", [last], [f"{y}/i"])
            yield helper.make_node("Mul", [last, f"{y}/i"], [y])
    elif node.op_type == "BiasSplitGelu":
        yield helper.make_node("Add", [x, node.input[1]], [f"{y}/b"])
        yield helper.make_node("Split", [f"{y}/b"], [f"{y}/h", f"{y}/g"], axis=-1)
        yield helper.make_node("Gelu", [f"{y}/g"], [f"{y}/e"], domain="com.microsoft")
        yield helper.make_node("Mul", [f"{y}/h", f"{y}/e"], [y])
    else:
        yield node


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    nodes = [one for node in model.graph.node for one in _spelled(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    made: np.ndarray[Any, Any] = session.run(None, feeds)[0]
    return made


def _both(file: Path, feeds: dict[str, np.ndarray[Any, Any]]) -> tuple[Counter[str], float]:
    """The operators of the joined graph, and how far its result is from that of the graph as exported, in its spread."""
    made = joined(file.read_bytes(), file)
    assert made is not None
    model = onnx.load_from_string(made)
    onnx.checker.check_model(onnx.load(file))
    kinds = Counter(node.op_type for node in model.graph.node)
    wanted = _run(onnx.load(file), feeds)
    got = _run(model, feeds)
    assert got.shape == wanted.shape
    return kinds, float(np.abs(got - wanted).max() / wanted.std())


def _randomised(module: torch.nn.Module) -> Any:
    """With scales and shifts of norms that are not 1 and 0: a lost one shows."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def _unet_feeds(batch: int, height: int, width: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "sample": draw(batch, 4, height, width), "timestep": np.array(501), "encoder_hidden_states": draw(batch, 77, 64),
        "text_embeds": draw(batch, 32), "time_ids": draw(batch, 6),
    }  # fmt: skip


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    # At this width the halves of the feed-forward layers have a size that BiasSplitGelu has a kernel for.
    pipelines.export_unet(_randomised(pipelines.tiny_sdxl(1, width=160)["unet"]), folder)
    return folder / "model.onnx"


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 16), (1, 8, 24)])
def test_a_joined_unet_predicts_the_same(unet: Path, batch: int, height: int, width: int) -> None:
    kinds, off = _both(unet, _unet_feeds(batch, height, width))
    assert off < 1e-4
    # Four transformer blocks: attention to itself and to the text, three norms, one feed-forward each.
    assert kinds["MultiHeadAttention"] == 8
    assert kinds["SkipLayerNormalization"] == 8
    assert kinds["BiasSplitGelu"] == 4
    assert kinds["GroupNorm"] == 21
    assert kinds["NhwcConv"] == 23
    assert kinds["Softmax"] == kinds["InstanceNormalization"] == kinds["Erf"] == 0


def test_nothing_goes_back_and_forth_between_layouts(unet: Path) -> None:
    made = joined(unet.read_bytes(), unet)
    assert made is not None
    graph = onnx.load_from_string(made).graph
    weights = {one.name for one in graph.initializer}
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] not in weights]
    # Once in, once out, and the time embedding of each of the six residual blocks, which is one number for a channel.
    small = {node.output[0] for node in graph.node if node.op_type == "Unsqueeze"}
    assert len([node for node in turned if node.input[0] not in small]) == 2


def test_a_joined_decoder_gives_the_same_image(tmp_path: Path) -> None:
    pipelines.export_vae(_randomised(pipelines.tiny_vae(2)), tmp_path, encoder=False)
    latents = np.random.default_rng(4).standard_normal((1, 4, 12, 8)).astype(np.float32)
    kinds, off = _both(tmp_path / "vae_decoder" / "model.onnx", {"latent_sample": latents})
    assert off < 1e-4
    assert kinds["GroupNorm"] == 13
    assert kinds["NhwcConv"] == 14
    assert kinds["MultiHeadAttention"] == 1


def test_what_a_graph_gives_stays_among_its_results(tmp_path: Path) -> None:
    """Text encoders give every layer's hidden states: sums that the norms behind them would take along."""
    modules = pipelines.tiny_sdxl(1)
    pipelines.export_text_encoders(modules, tmp_path)
    for name in ("text_encoder", "text_encoder_2"):
        file = tmp_path / name / "model.onnx"
        made = joined(file.read_bytes(), file)
        model = onnx.load(file) if made is None else onnx.load_from_string(made)
        whole = [one.name for one in onnx.load(file).graph.output]
        assert [one.name for one in model.graph.output] == whole
        kind = np.int64 if name.endswith("2") else np.int32
        ids = np.arange(77, dtype=kind)[None]
        sessions = [ort.InferenceSession(one.SerializeToString()) for one in (onnx.load(file), model)]
        wanted, got = (session.run(whole, {"input_ids": ids}) for session in sessions)
        for one, other in zip(wanted, got, strict=True):
            assert np.abs(one - other).max() < 1e-4


def test_what_is_used_elsewhere_is_not_joined(tmp_path: Path) -> None:
    """A result that lies between the operators of a pattern is still there."""

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q = x.reshape(x.shape[0], -1, 4, 8).transpose(1, 2)
            weights = (q @ q.transpose(2, 3)).softmax(-1)
            return (weights @ q).transpose(1, 2).reshape(x.shape[0], -1, 32), weights

    sides = {0: "batch", 1: "length"}
    file = pipelines.export(Attention(), tmp_path, {"x": (torch.randn(2, 6, 32), sides)}, {"y": sides, "weights": {}})
    assert joined(file.read_bytes(), file) is None


def test_the_joined_graph_is_kept_by_content(unet: Path) -> None:
    first = fused(unet)
    assert isinstance(first, Path)
    assert first.name.startswith(f".{unet.name}.")
    written = first.stat().st_mtime_ns
    assert fused(unet) == first
    assert first.stat().st_mtime_ns == written
    model = onnx.load(unet)
    model.doc_string = "another content"
    unet.write_bytes(model.SerializeToString())
    second = fused(unet)
    assert isinstance(second, Path)
    assert second != first
    assert [one.name for one in unet.parent.glob(f".*{SUFFIX}")] == [second.name]


def test_a_graph_with_nothing_to_join_stays(tmp_path: Path) -> None:
    file = pipelines.export(torch.nn.Linear(4, 4), tmp_path, {"x": (torch.randn(1, 4), {0: "batch"})}, {"y": {}})
    assert fused(file) == file
    assert fused(file) == file  # by what was kept of it
