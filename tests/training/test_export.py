"""Export and validation: plain ONNX Runtime runs the file, and the comparison tells how far apart the two are."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from device_operations.errors import OperationError
from device_operations.requests.training import LayersModel
from tests.training.sessions import CPU, LIMITS, batch, describe, digest, start, train
from workers.training.model.definition import Networks, Sources, define
from workers.training.model.ports import Batch
from workers.training.model.shapes import ShapeTrial
from workers.training.onnx.export import export_ahead, export_onnx, onnx_bytes
from workers.training.outcomes import StepOptions
from workers.training.session import Limits, TrainingSession, build_session
from workers.training.validation import compare


def served_by(model: bytes | str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def test_the_file_has_the_sessions_names_an_open_batch_and_nothing_of_training(tmp_path: Path) -> None:
    session = start()
    train(session, 3)
    before = digest(session)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = export_onnx(session.definition, session.spec, session.snapshot(), tmp_path / "model.onnx")
    model = onnx.load(str(written.path))
    onnx.checker.check_model(model, full_check=True)
    assert [port.name for port in model.graph.input] == ["input"]
    assert [port.name for port in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "Dropout" not in {node.op_type for node in model.graph.node}
    assert digest(session) == before
    train(session, 1, first=4)


def test_a_validation_tells_both_losses_and_the_largest_difference() -> None:
    session = start()
    train(session, 5)
    many = batch(8, 50)  # more than a step may take: validation is no step
    served = served_by(onnx_bytes(session.definition, session.spec, session.snapshot()), dict(many.inputs))
    same = compare(session, many.inputs, many.targets, served)
    logits = torch.from_numpy(served["output"])
    targets = torch.from_numpy(many.targets)
    assert same.largest_difference < 1e-5
    assert same.loss == pytest.approx(same.trained_loss, rel=1e-5)
    assert same.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-6)
    assert same.accuracy == pytest.approx(float((logits.argmax(1) == targets).float().mean()))
    assert same.samples == 50

    served["output"][17, 2] += 0.5
    apart = compare(session, many.inputs, many.targets, served)
    assert apart.largest_difference == pytest.approx(0.5, abs=1e-4)
    assert apart.loss != same.loss
    assert apart.trained_loss == same.trained_loss


def test_a_validation_checks_its_targets() -> None:
    session = start()
    one = batch(1)
    with pytest.raises(OperationError, match="none of the 4 classes"):
        compare(session, one.inputs, one.targets + 9, {"output": np.zeros((8, 4), np.float32)})


def test_before_the_first_batch_the_exporter_has_no_shape_to_go_by() -> None:
    session = start()
    with pytest.raises(OperationError, match="make or evaluate one step first") as caught:
        onnx_bytes(session.definition, session.spec, session.snapshot())
    assert caught.value.code == "validation_failed"
    one = batch(1)
    exported = onnx_bytes(session.definition, session.spec, session.snapshot(), one.inputs)
    assert compare(session, one.inputs, one.targets, served_by(exported, dict(one.inputs))).largest_difference < 1e-5


@pytest.mark.filterwarnings("error:Converting a tensor")
def test_a_program_exports_as_layers_do(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU())), str(path))
    trusted = Limits(memory_bytes=2**30, max_batch_size=32, trust_programs=True)
    session = start(Sources(model=path), trusted, model={"kind": "torchscript", "blob_id": "program"})
    train_input = {session.definition.inputs[0].name: batch(1).inputs["input"]}
    for number in range(1, 6):
        session.perform(Batch(train_input, batch(1).targets), StepOptions(), number)
    served = served_by(onnx_bytes(session.definition, session.spec, session.snapshot()), train_input)
    assert compare(session, train_input, batch(1).targets, served).largest_difference < 1e-5


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX's")
def test_a_full_disk_fails_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    session = start()
    train(session, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OperationError) as caught:
            export_onnx(session.definition, session.spec, session.snapshot(), tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "storage_full"
    assert not list(tmp_path.iterdir())


CLASSIFIER = [
    {"type": "conv2d", "name": "conv", "in_channels": 1, "out_channels": 4, "kernel_size": 3},
    {"type": "relu"},
    {"type": "flatten"},
    {"type": "linear", "name": "fc", "in_features": 64, "out_features": 4},
]


def pictures(number: int) -> Batch:
    random = np.random.RandomState(number)
    return Batch({"input": random.randn(8, 1, 6, 6).astype(np.float32)}, random.randint(0, 4, 8))


@pytest.mark.parametrize(
    ("layers", "traced_once"),
    [
        (CLASSIFIER, True),
        # The exporter folds this normalization into the convolution, and its result is no weight of the session.
        ([CLASSIFIER[0], {"type": "batch_norm2d", "num_features": 4}, *CLASSIFIER[1:]], False),
        # These two start alike and the exporter merges them; later they differ.
        ([*CLASSIFIER[:2], *[{"type": "group_norm", "num_groups": 2, "num_channels": 4}] * 2, *CLASSIFIER[2:]], False),
    ],
)  # fmt: skip
def test_a_later_export_is_what_the_exporter_makes_of_the_new_weights(
    layers: list[dict], traced_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"model": {"kind": "layers", "layers": layers}, "optimizer": {"type": "adam", "learning_rate": 0.01}}
    session = start(**spec)
    traced: list[object] = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **named: traced.append(given) or export(*given, **named))
    for number in (1, 2, 3):
        content = onnx_bytes(session.definition, session.spec, session.snapshot(), pictures(number).inputs)
        count = len(traced)
        anew = onnx_bytes(start(**spec).definition, session.spec, session.snapshot(), pictures(number).inputs)
        assert onnx.load_from_string(content) == onnx.load_from_string(anew)
        del traced[count:]
        session.perform(pictures(number), StepOptions("train"), number)
    assert len(traced) == (1 if traced_once else 3)
    assert len(content) == len(anew)


def test_an_export_for_other_shapes_is_traced_anew() -> None:
    layers = [{"type": "flatten", "start_dim": 2}, {"type": "adaptive_avg_pool1d", "output_size": 1}]
    layers = [*layers, {"type": "flatten"}, {"type": "linear", "in_features": 3, "out_features": 4}]
    session = start(model={"kind": "layers", "layers": layers})
    for side in (2, 4):
        inputs = {"input": np.ones((5, 3, side, side), np.float32)}
        content = onnx_bytes(session.definition, session.spec, session.snapshot(), inputs)
        shape = onnx.load_from_string(content).graph.input[0].type.tensor_type.shape
        assert [one.dim_value for one in shape.dim][1:] == [3, side, side]
        assert served_by(content, inputs)["output"] == pytest.approx(
            session.outputs(inputs)["output"].numpy(), abs=1e-6
        )


def exported_ahead(session: TrainingSession) -> None:
    export_ahead(session.definition, {"input": ("float32", [1, 6, 6])})


#: These two start alike, and the exporter would merge them; later they differ.
ALIKE = [*CLASSIFIER[:3], *[{"type": "layer_norm", "normalized_shape": 64}] * 2, CLASSIFIER[3]]


@pytest.mark.parametrize("layers", [CLASSIFIER, ALIKE], ids=["plain", "alike at first"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4, "targets": ["fc"]}], ids=["whole", "adapters"])
def test_a_graph_exported_ahead_takes_any_weights_without_the_exporter(
    layers: list[dict], lora: dict | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {} if lora is None else {"lora": lora}
    session = start(model={"kind": "layers", "layers": layers}, **more)
    exported_ahead(session)

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("the exporter ran")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    for number in (1, 2, 3):
        one = pictures(number)
        content = onnx_bytes(session.definition, session.spec, session.snapshot(model_only=True), one.inputs)
        onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
        served = served_by(content, dict(one.inputs))
        assert compare(session, one.inputs, one.targets, served).largest_difference < 1e-5
        session.perform(one, StepOptions(), number)


def test_what_the_exporter_changes_weights_in_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = [CLASSIFIER[0], {"type": "batch_norm2d", "num_features": 4}, *CLASSIFIER[1:]]
    session = start(model={"kind": "layers", "layers": folded})
    exported_ahead(session)
    assert list(session.definition.learned.graphs.values()) == [None]
    for number in (1, 2):
        one = pictures(number)
        session.perform(one, StepOptions(), number)
        served = served_by(onnx_bytes(session.definition, session.spec, session.snapshot()), dict(one.inputs))
        assert compare(session, one.inputs, one.targets, served).largest_difference < 1e-4
    # And it is known by now, so that nobody tries again ahead.
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **named: pytest.fail("the exporter ran"))
    exported_ahead(session)


def test_exporting_ahead_changes_nothing_of_a_session_or_of_the_process() -> None:
    alone, other = start(), start()
    for number in (1, 2, 3, 4):
        state = torch.get_rng_state()
        export_ahead(alone.definition, {"input": ("float32", [6])})
        alone.definition.learned.graphs.clear()
        assert torch.equal(torch.get_rng_state(), state)
        train(alone, 1, first=number)
        train(other, 1, first=number)
    assert digest(alone) == digest(other)


def test_a_large_network_is_not_exported_ahead() -> None:
    wide = [{"type": "linear", "in_features": 40_000, "out_features": 40_000}]  # 6.4 GB, of which none is taken
    definition = define(LayersModel.model_validate({"kind": "layers", "layers": wide}), Sources(), trust_programs=False)
    export_ahead(definition, {"input": ("float32", [40_000])})
    deep = [{"type": "linear", "in_features": 2, "out_features": 2}] * 60
    deeper = define(LayersModel.model_validate({"kind": "layers", "layers": deep}), Sources(), trust_programs=False)
    export_ahead(deeper, {"input": ("float32", [2])})
    assert not definition.learned.graphs
    assert not deeper.learned.graphs


def test_sessions_of_one_network_learn_from_each_other_and_the_oldest_networks_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks: Networks = OrderedDict()
    spec = describe()
    first = build_session(spec, Sources(), CPU, LIMITS, networks)
    train(first, 1)
    attempt = ShapeTrial._try
    tried: list[object] = []
    monkeypatch.setattr(ShapeTrial, "_try", lambda *given: tried.append(given) or attempt(*given))
    second = build_session(spec, Sources(), CPU, LIMITS, networks)
    assert second.definition.learned is first.definition.learned
    train(second, 1)
    assert not tried
    assert digest(second) == digest(first)
    stranger = build_session(describe(model={"kind": "layers", "layers": CLASSIFIER}), Sources(), CPU, LIMITS, networks)
    assert stranger.definition.learned is not first.definition.learned
    for width in range(1, 70):
        layers = [{"type": "linear", "in_features": width, "out_features": 4}]
        build_session(describe(model={"kind": "layers", "layers": layers}), Sources(), CPU, LIMITS, networks)
    assert len(networks) == 64
    assert first.definition.structure not in networks
