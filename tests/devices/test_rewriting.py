"""Graphs written anew before they are loaded: fewer operators, the same results, and nothing else of the model changed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from tests.devices.tensors import floats
from tests.support import models
from workers.devices import Device, SessionOptions
from workers.devices.onnx.rewrite import rewritten

REWRITE = SessionOptions(graph_optimization="rewrite")

Save = Callable[..., Path]


def kinds(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


def scalar(name: str, value: float, *shape: int) -> Any:
    return graphs.constant(name, np.full(shape, value), np.float32)


def blocks(*shape: int, opset: int = 17, reverse: bool = False) -> bytes:
    """Conv ─ scalar Mul, Add ─ hard-swish spelled out ─ scalar Mul, Add ─ Conv; constants have `shape`."""

    def pair(one: str, other: str) -> str:
        return f"{other} {one}" if reverse else f"{one} {other}"

    return graphs.build(
        [
            graphs.node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
            graphs.node("Mul", pair("c", "scale"), "m"),
            graphs.node("Add", pair("m", "offset"), "a"),
            graphs.node("Add", pair("a", "three"), "s"),
            graphs.node("Clip", "s zero six", "k"),
            graphs.node("Mul", pair("a", "k"), "h"),
            graphs.node("Div", "h six_", "d"),
            graphs.node("Mul", pair("d", "scale"), "e"),
            graphs.node("Add", pair("e", "offset"), "f"),
            graphs.node("Conv", "f v u", "y", pads=[0, 0, 0, 0]),
        ],
        [("x", graphs.FLOAT, ["n", 3, 8, 8])],
        [("y", graphs.FLOAT, ["n", 5, 8, 8])],
        [
            graphs.weight("w", 4, 3, 3, 3), graphs.weight("b", 4), graphs.weight("v", 5, 4, 1, 1), graphs.weight("u", 5),
            scalar("scale", 1.7, *shape), scalar("offset", -0.4, *shape), scalar("three", 3, *shape),
            scalar("six_", 6, *shape), scalar("zero", 0), scalar("six", 6),
        ],
        opset=opset,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("reverse", [False, True], ids=["constant second", "constant first"])
def test_what_is_joined_computes_the_same(
    cpu: Device, save: Save, shape: tuple[int, ...], opset: int, reverse: bool
) -> None:
    content = blocks(*shape, opset=opset, reverse=reverse)
    swish = {"HardSwish": 1} if opset >= 14 else {"HardSigmoid": 1, "Mul": 1}
    assert kinds(rewritten(content, "blocks")) == {"Conv": 2, **swish}
    plain, anew = cpu.open_model(save(content)), cpu.open_model(save(content), REWRITE)
    assert (anew.inputs, anew.outputs) == (plain.inputs, plain.outputs)
    x = floats(2, 3, 8, 8) * 5  # far enough for both ends of the clip
    np.testing.assert_allclose(anew.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_every_device_runs_a_graph_written_anew(device: Device, save: Save) -> None:
    x = floats(2, 3, 8, 8)
    plain, anew = device.open_model(save(graphs.convnet())), device.open_model(save(graphs.convnet()), REWRITE)
    np.testing.assert_allclose(anew.run({"x": x})["y"], plain.run({"x": x})["y"], atol=1e-5)  # type: ignore[arg-type]


def test_what_another_reads_is_not_joined(cpu: Device, save: Save) -> None:
    """The convolution's own result is an output too, and the second convolution pads, so that an offset shows."""
    nodes = [
        graphs.node("Conv", "x w b", "c"),
        graphs.node("Mul", "c scale", "m"),
        graphs.node("Add", "m offset", "a"),
        graphs.node("Conv", "a v u", "y", pads=[1, 1, 1, 1]),
    ]
    content = graphs.build(
        nodes,
        [("x", graphs.FLOAT, ["n", 3, 4, 4])],
        [("y", graphs.FLOAT, ["n", 5, 4, 4]), ("c", graphs.FLOAT, ["n", 4, 2, 2])],
        [graphs.weight("w", 4, 3, 3, 3), graphs.weight("b", 4), graphs.weight("v", 5, 4, 1, 1), graphs.weight("u", 5),
         scalar("scale", 2.0), scalar("offset", 1.0)],
    )  # fmt: skip
    assert kinds(rewritten(content, "two outputs")) == {"Conv": 2, "Mul": 1, "Add": 1}
    x = floats(1, 3, 4, 4)
    plain, anew = cpu.open_model(save(content)).run({"x": x}), cpu.open_model(save(content), REWRITE).run({"x": x})
    for name in ("y", "c"):
        np.testing.assert_array_equal(anew[name], plain[name])  # type: ignore[arg-type]


def test_weights_that_are_listed_as_inputs_stay_weights(cpu: Device, save: Save) -> None:
    model = onnx.load_from_string(blocks(1))
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in model.graph.initializer
    )
    content = model.SerializeToString()
    assert kinds(rewritten(content, "old")) == {"Conv": 2, "HardSwish": 1}
    anew = cpu.open_model(save(content), REWRITE)
    assert [spec.name for spec in anew.inputs] == ["x"]
    x = floats(1, 3, 8, 8)
    wanted = cpu.open_model(save(blocks(1))).run({"x": x})["y"]
    np.testing.assert_allclose(anew.run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_weights_beside_the_model_are_read_whether_joined_or_not(cpu: Device, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load_from_string(blocks(1))
    onnx.save_model(model, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").stat().st_size > 400
    x = floats(1, 3, 8, 8)
    wanted = cpu.open_model(blocks(1)).run({"x": x})["y"]
    np.testing.assert_allclose(cpu.open_model(path, REWRITE).run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    path.write_bytes(graphs.external("w.bin"))
    (tmp_path / "w.bin").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    assert float(cpu.open_model(path, REWRITE).run({"x": np.ones((1, 16), np.float32)})["y"][0, 0]) == 120  # type: ignore[index]


def test_weights_outside_the_folder_are_never_read(cpu: Device, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    path = tmp_path / "inside" / "model.onnx"
    path.write_bytes(graphs.external("../secret.bin"))
    with pytest.raises(OperationError, match="not a file inside"):
        cpu.open_model(path, REWRITE)


def test_what_cannot_be_written_anew_is_refused_with_the_remedy(cpu: Device, save: Save) -> None:
    model = onnx.load_from_string(blocks(1))
    model.graph.node[1].output[0] = "c"  # a value that two nodes make
    with pytest.raises(OperationError, match="Load it with graph_optimization 'all'") as refused:
        cpu.open_model(save(model.SerializeToString()), REWRITE)
    assert refused.value.code == "model_invalid"


def test_without_onnxscript_the_option_says_what_is_missing(
    cpu: Device, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(OperationError, match="needs onnxscript") as refused:
        cpu.open_model(save(blocks(1)), REWRITE)
    assert refused.value.code == "device_unavailable"


@pytest.mark.parametrize(
    ("file", "shape", "gone"),
    [
        ("ch_PP-OCRv4_det_infer.onnx", (1, 3, 64, 64), 120),
        ("ch_PP-OCRv4_rec_infer.onnx", (1, 3, 48, 96), 130),
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (2, 3, 48, 192), 36),
    ],
)
def test_real_models_lose_operators_and_keep_their_results(
    cpu: Device, file: str, shape: tuple[int, ...], gone: int
) -> None:
    path = models.fetch_all() / "rapidocr" / file

    def operators(model: bytes) -> int:
        return sum(count for kind, count in kinds(model).items() if kind != "Constant")

    assert operators(path.read_bytes()) - operators(rewritten(path, file)) >= gone
    plain, anew = cpu.open_model(path), cpu.open_model(path, REWRITE)
    x = {"x": floats(*shape)}
    (wanted,), (got,) = plain.run(x).values(), anew.run(x).values()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
