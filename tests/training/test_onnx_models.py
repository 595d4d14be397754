"""Real ONNX models under training: equal to ONNX Runtime before the first step, and after it through write-back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.gpu.faults import ROWS, write_gatherer
from device_operations.errors import OperationError
from tests.training.sessions import CPU, LIMITS, describe
from workers.training.model.definition import Sources
from workers.training.model.ports import Batch
from workers.training.onnx.export import export_onnx, onnx_bytes
from workers.training.outcomes import StepOptions
from workers.training.session import TrainingSession, build_session
from workers.training.validation import compare

#: File, shape of a batch, and the loss that suits the model's output.
MODELS = {
    "cls": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 3, 48, 192)),
    "det": ("ch_PP-OCRv4_det_infer.onnx", (2, 3, 96, 128)),
    "rec": ("ch_PP-OCRv4_rec_infer.onnx", (2, 3, 48, 96)),
}


def images(shape: tuple[int, ...]) -> np.ndarray:
    """White pages with two lines of dark blots the size of letters, so that detection has something to find."""
    random = np.random.RandomState(0)
    pages = np.full(shape, 2.2, np.float32)
    for top in (shape[-2] // 6, shape[-2] * 7 // 12):
        for left in range(8, shape[-1] - 12, 10):
            letter = np.kron(random.rand(6, 3) > 0.5, np.ones((3, 2)))[: shape[-2] // 3]
            pages[:, :, top : top + len(letter), left : left + 6] = np.where(letter, -2.0, 2.2)
    return pages


def open_model(path: Path, **fields: Any) -> TrainingSession:
    fields = {"loss": "mse", "optimizer": {"type": "sgd", "learning_rate": 0.01}} | fields
    model = {"kind": "onnx", "path": path.name} | fields.pop("model", {})
    return build_session(describe(model=model, **fields), Sources(model=path), CPU, LIMITS)


def runtime(model: Path | bytes, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_gives_onnx_runtimes_outputs_before_the_first_step(name: str, models_dir: Path) -> None:
    file, shape = MODELS[name]
    path, x = models_dir / "rapidocr" / file, images(shape)
    found = list(open_model(path).outputs({"x": x}).values())
    wanted = runtime(path, {"x": x})
    for ours, theirs in zip(found, wanted, strict=True):
        assert float(np.ptp(theirs)) > 0.01  # an output that says something
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", ["cls", "det"])
def test_trained_weights_are_written_back_into_the_original_file(name: str, models_dir: Path, tmp_path: Path) -> None:
    file, shape = MODELS[name]
    path, x = models_dir / "rapidocr" / file, images(shape)
    session = open_model(path, optimizer={"type": "sgd", "learning_rate": 0.01})
    before = session.outputs({"x": x})
    targets = 1 - next(iter(before.values())).numpy()  # the other class, the other pixels
    losses = [session.perform(Batch({"x": x}, targets), StepOptions(), number).loss for number in range(1, 9)]
    assert losses[-1] < losses[0]

    written = export_onnx(session.definition, session.spec, session.snapshot(), tmp_path / "trained.onnx")
    original, trained = onnx.load(str(path)), onnx.load(str(written.path))
    served = dict(zip(session.definition.output_names, runtime(written.path, {"x": x}), strict=True))
    validation = compare(session, {"x": x}, targets, served)

    assert [node.op_type for node in trained.graph.node] == [node.op_type for node in original.graph.node]
    assert trained.graph.input == original.graph.input
    assert validation.largest_difference < 1e-4
    assert validation.loss == pytest.approx(validation.trained_loss, rel=1e-4)
    assert float(np.abs(next(iter(served.values())) - next(iter(before.values())).numpy()).max()) > 1e-3


def test_running_statistics_of_a_graph_follow_training_and_are_written_back(models_dir: Path) -> None:
    path = models_dir / "rapidocr" / MODELS["cls"][0]
    session = open_model(path)
    x = images(MODELS["cls"][1]) + 3
    before = session.snapshot().part("buffer/")
    session.perform(Batch({"x": x}, np.zeros((3, 2), np.float32)), StepOptions(), 1)
    after = session.snapshot().part("buffer/")
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    model = onnx.load_from_string(onnx_bytes(session.definition, session.spec, session.snapshot()))
    constants = {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    }
    for name, tensor in after.items():
        np.testing.assert_array_equal(constants[name], tensor.numpy())


def small_graph(path: Path, nodes: list[Any], weights: dict[str, np.ndarray], inputs: list[Any], outputs: str) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def decomposed_norm(path: Path) -> Path:
    """Embedding, the decomposed form of layer normalization, a product and a bias of one element."""
    node = helper.make_node
    nodes = [
        node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        node("Gather", ["table", "wide"], ["x"]),
        node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        node("Sub", ["x", "mean"], ["apart"]),
        node("Pow", ["apart", "two"], ["squared"]),
        node("ReduceMean", ["squared"], ["variance"], axes=[-1]),
        node("Add", ["variance", "epsilon"], ["safe"]),
        node("Sqrt", ["safe"], ["deviation"]),
        node("Div", ["apart", "deviation"], ["normal"]),
        node("Mul", ["normal", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["shifted"]),
        node("MatMul", ["shifted", "weight.0"], ["product"]),
        node("Add", ["product", "bias"], ["y"]),
        node("Relu", ["y"], ["second"]),
    ]
    random = np.random.RandomState(0)
    weights = {
        "table": random.randn(11, 6).astype(np.float32),
        "two": np.array(2, np.float32),
        "epsilon": np.array([1e-5], np.float32),
        "scale": np.ones(6, np.float32),
        "shift": np.zeros(6, np.float32),
        "weight.0": random.randn(6, 1).astype(np.float32),
        "bias": np.zeros(1, np.float32),
    }
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    return small_graph(path, nodes, weights, [ids], "y second")


def test_what_trains_are_the_weights_and_not_the_settings(tmp_path: Path) -> None:
    session = open_model(decomposed_norm(tmp_path / "m.onnx"))
    trained = {name for name in session.snapshot().tensors if name.startswith("parameter/")}
    assert trained == {f"parameter/{name}" for name in ("table", "scale", "shift", "weight.0", "bias")}


def test_a_decomposed_normalization_trains_and_exports(tmp_path: Path) -> None:
    path = decomposed_norm(tmp_path / "m.onnx")
    session = open_model(path, optimizer={"type": "adam", "learning_rate": 0.05})
    ids = np.array([[1, 2, 3], [4, 10, 0]])
    np.testing.assert_allclose(session.outputs({"ids": ids})["y"].numpy(), runtime(path, {"ids": ids})[0], atol=1e-5)
    targets = np.ones((2, 3, 1), np.float32)
    losses = [session.perform(Batch({"ids": ids}, targets), StepOptions(), number).loss for number in range(1, 40)]
    assert losses[-1] < 0.1 * losses[0]
    exported = onnx_bytes(session.definition, session.spec, session.snapshot())
    np.testing.assert_allclose(
        runtime(exported, {"ids": ids})[0], session.outputs({"ids": ids})["y"].numpy(), atol=1e-5
    )


def test_an_index_outside_a_graphs_embedding_is_refused_before_torch_sees_it(tmp_path: Path) -> None:
    session = open_model(decomposed_norm(tmp_path / "m.onnx"))
    with pytest.raises(OperationError, match="11 is none of the embedding's 11 rows") as caught:
        session.perform(Batch({"ids": np.array([[3, 11]])}, np.ones((1, 2, 1), np.float32)), StepOptions(), 1)
    assert caught.value.code == "input_mismatch"


def test_an_index_that_the_graph_computes_outside_its_table_is_the_callers_error(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_gatherer(path)
    session = open_model(path)
    for number, (at, fails) in enumerate(((ROWS, True), (0, False)), 1):
        batch = Batch({"at": np.array([1, at])}, np.zeros((2, 4), np.float32))
        if fails:
            with pytest.raises(OperationError, match="index") as caught:
                session.perform(batch, StepOptions(), number)
            assert caught.value.code == "input_mismatch"
        else:
            assert session.perform(batch, StepOptions(), number).loss == pytest.approx(0.25)


def test_the_loss_is_taken_of_the_output_that_the_request_names(tmp_path: Path) -> None:
    path = decomposed_norm(tmp_path / "m.onnx")
    ids, targets = np.array([[1, 2, 3]]), np.full((1, 3, 1), 0.5, np.float32)
    values = runtime(path, {"ids": ids})
    for index, name in enumerate(("y", "second")):
        session = open_model(path, model={"output": name})
        loss = session.perform(Batch({"ids": ids}, targets), StepOptions(mode="evaluate"), 1).loss
        assert loss == pytest.approx(float(np.mean((values[index] - targets) ** 2)), rel=1e-4)
    with pytest.raises(OperationError, match="no output 'third'; it has y, second"):
        open_model(path, model={"output": "third"})


def test_a_batch_of_another_rank_than_the_file_declares_is_refused(tmp_path: Path) -> None:
    session = open_model(decomposed_norm(tmp_path / "m.onnx"))
    with pytest.raises(OperationError, match=r"takes shape \['any', 'any'\], but \[1\] was given"):
        session.perform(Batch({"ids": np.array([1])}, np.ones(1, np.float32)), StepOptions(), 1)


def test_a_shape_that_the_graph_cannot_take_names_the_node(models_dir: Path) -> None:
    session = open_model(models_dir / "rapidocr" / MODELS["det"][0])
    x = np.zeros((1, 3, 100, 128), np.float32)  # 100 does not halve often enough for the pyramid to fit together
    with pytest.raises(OperationError, match="at ONNX operator Add") as caught:
        session.perform(Batch({"x": x}, np.zeros((1, 1, 100, 128), np.float32)), StepOptions(), 1)
    assert caught.value.code == "input_mismatch"


def test_a_sentence_transformer_trains_what_of_it_is_not_quantized(models_dir: Path) -> None:
    path = models_dir / "minilm" / "model.onnx"
    session = open_model(path)
    ids = np.array([[101, 2054, 2003, 102], [101, 7592, 102, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    wanted = runtime(path, inputs)
    for ours, theirs in zip(session.outputs(inputs).values(), wanted, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)
    batch = Batch(inputs, np.zeros_like(wanted[0]))
    losses = [session.perform(batch, StepOptions(), number).loss for number in (1, 2, 3)]
    assert losses[2] < losses[0]


def test_weights_kept_in_files_beside_the_model_are_refused(tmp_path: Path) -> None:
    path = decomposed_norm(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="../elsewhere", size_threshold=0)
    with pytest.raises(OperationError, match="next to the model") as caught:
        open_model(path)
    assert caught.value.code == "model_invalid"


def test_a_damaged_model_file_is_refused_by_its_hash(tmp_path: Path) -> None:
    path = decomposed_norm(tmp_path / "m.onnx")
    with pytest.raises(OperationError) as caught:
        open_model(path, model={"sha256": "0" * 64})
    assert caught.value.code == "checksum_mismatch"
