"""Single steps: modes, gradients as a service, and everything that is refused while the session stays unharmed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from device_operations.errors import OperationError
from tests.training.sessions import LAYERS, OPTIMIZERS, batch, describe, digest, start, train
from workers.training import checkpoints
from workers.training.model.definition import Sources
from workers.training.model.ports import Batch
from workers.training.outcomes import StepOptions
from workers.training.session import Limits

PLAIN = [{"type": "linear", "name": "fc", "in_features": 6, "out_features": 4}]
GRADIENTS = StepOptions(mode="gradients")


def plain(**fields: Any) -> Any:
    return start(model={"kind": "layers", "layers": PLAIN}, **fields)


def halves() -> tuple[Batch, Batch, Batch]:
    whole = batch(1, 16)
    x, y = whole.inputs["input"], whole.targets
    return whole, Batch({"input": x[:8]}, y[:8]), Batch({"input": x[8:]}, y[8:])


def test_accumulated_gradients_step_as_their_sum_in_one_batch_would() -> None:
    whole, first, second = halves()
    at_once, in_parts = (plain(optimizer=OPTIMIZERS["sgd"]) for _ in range(2))
    at_once.perform(whole, StepOptions(learning_rate=0.2), 1)
    in_parts.perform(first, GRADIENTS, 1)
    in_parts.perform(second, GRADIENTS, 2)
    # Each half's loss is a mean over half the samples: the sum of both is twice the whole's mean.
    outcome = in_parts.perform(None, StepOptions(mode="apply", learning_rate=0.1), 3)
    assert outcome.step == 1
    for name, tensor in at_once.snapshot().part("parameter/").items():
        torch.testing.assert_close(tensor, in_parts.snapshot().part("parameter/")[name])


def test_train_takes_the_accumulated_gradients_with_it() -> None:
    _, first, second = halves()
    one, other = (plain(optimizer=OPTIMIZERS["sgd"]) for _ in range(2))
    one.perform(first, GRADIENTS, 1)
    one.perform(second, StepOptions(), 2)
    other.perform(first, GRADIENTS, 1)
    other.perform(second, GRADIENTS, 2)
    other.perform(None, StepOptions(mode="apply"), 3)
    assert one.step == other.step == 1
    for name, tensor in one.snapshot().part("parameter/").items():
        torch.testing.assert_close(tensor, other.snapshot().part("parameter/")[name])


def test_gradients_come_back_as_torch_computes_them(tmp_path: Path) -> None:
    session, one = plain(), batch(3)
    outcome = session.perform(one, StepOptions(mode="gradients", return_gradients=True), 1)
    module = session.definition.build(0)
    logits = module(torch.from_numpy(one.inputs["input"]))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(one.targets)).backward()

    written = checkpoints.write_tensors(outcome.gradients, tmp_path / "gradients.safetensors")
    given = load_file(written.path)
    assert set(given) == set(outcome.gradient_norms) == {"fc.weight", "fc.bias"}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad)
        assert outcome.gradient_norms[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
    total = sum(norm**2 for norm in outcome.gradient_norms.values()) ** 0.5
    assert outcome.gradient_norm == pytest.approx(total, rel=1e-5)
    assert (outcome.step, outcome.accumulated_batches, session.step) == (0, 1, 0)


def test_gradients_asked_for_without_accumulating_change_nothing_but_the_count_of_samples() -> None:
    session = start()
    before = session.snapshot()
    for number in (1, 2):
        outcome = session.perform(batch(1), StepOptions(mode="gradients", accumulate=False), number)
    after = session.snapshot()
    assert outcome.accumulated_batches == 0
    assert set(before.tensors) == set(after.tensors)
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


def test_evaluating_changes_no_tensor_and_counts_right_answers() -> None:
    session = start()
    train(session, 3)
    before, one = session.snapshot(), batch(7)
    outcome = session.perform(one, StepOptions(mode="evaluate"), 4)
    again = session.perform(one, StepOptions(mode="evaluate"), 5)
    logits = session.outputs(one.inputs)["output"]
    assert (
        outcome.loss
        == again.loss
        == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(one.targets))), rel=1e-6)
    )
    assert (outcome.correct, outcome.elements) == (int((logits.argmax(1).numpy() == one.targets).sum()), 8)
    assert all(torch.equal(tensor, session.snapshot().tensors[name]) for name, tensor in before.tensors.items())


def test_clipping_bounds_the_update_and_the_norm_told_is_the_one_before() -> None:
    session = plain(optimizer={"type": "sgd", "learning_rate": 1.0})
    before = session.snapshot().part("parameter/")
    outcome = session.perform(batch(1), StepOptions(gradient_clip_norm=0.01), 1)
    after = session.snapshot().part("parameter/")
    moved = sum(float(((after[name] - before[name]) ** 2).sum()) for name in before) ** 0.5
    assert outcome.gradient_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_another_user_of_torchs_random_numbers_changes_nothing() -> None:
    quiet, disturbed = start(), start()
    for number in range(1, 6):
        quiet.perform(batch(number), StepOptions(), number)
        torch.manual_seed(number)
        torch.rand(number)
        disturbed.perform(batch(number), StepOptions(), number)
    assert digest(quiet) == digest(disturbed)


def test_each_batch_accumulated_within_a_step_draws_other_random_numbers() -> None:
    session = start(optimizer=OPTIMIZERS["sgd"])
    losses = [session.perform(batch(1), GRADIENTS, number).loss for number in range(1, 4)]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["train", "gradients", "evaluate"])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_step_to_the_bit(value: float, mode: Any) -> None:
    session = start()
    train(session, 3)
    session.perform(batch(9), GRADIENTS, 4)
    before = digest(session)
    poisoned = Batch({"input": np.full((8, 6), value, np.float32)}, batch(1).targets)
    with pytest.raises(OperationError, match="step 4: the loss is nan") as caught:
        session.perform(poisoned, StepOptions(mode=mode), 5)
    assert caught.value.code == "nonfinite_loss"
    assert caught.value.detail == {"step": 4, "what": "loss", "value": "nan", "last_good_step": 3}
    assert digest(session) == before
    session.perform(batch(5), StepOptions(), 5)


def test_gradients_that_overflow_stop_as_a_loss_does() -> None:
    layers = [{"type": "linear", "in_features": 6, "out_features": 1}]
    session = start(model={"kind": "layers", "layers": layers}, loss="l1")
    before = digest(session)
    x = np.array([[3e38, 0, 0, 0, 0, 0], [3e38, 0, 0, 0, 0, 0]], np.float32) * np.float32(0.5)
    many = Batch({"input": np.concatenate([x] * 8)}, np.zeros((16, 1), np.float32))
    with pytest.raises(OperationError, match="gradient norm is inf") as caught:
        session.perform(many, StepOptions(), 1)
    assert caught.value.code == "nonfinite_loss"
    assert digest(session) == before


def test_a_session_that_skips_passes_over_a_bad_batch_and_goes_on() -> None:
    skipping, without = start(on_nonfinite="skip"), start()
    poisoned = Batch({"input": np.full((8, 6), np.nan, np.float32)}, batch(1).targets)
    train(skipping, 2)
    outcome = skipping.perform(poisoned, StepOptions(), 3)
    skipping.perform(batch(4), StepOptions(), 4)
    train(without, 2)
    without.perform(batch(4), StepOptions(), 4)
    assert outcome.skipped
    assert (outcome.loss, outcome.step, skipping.step) == (None, 2, 3)
    assert digest(skipping) == digest(without)


F32, I64 = np.float32, np.int64
GOOD_X, GOOD_Y = np.zeros((4, 6), F32), np.zeros(4, I64)

#: inputs, targets, the code, and words of the message.
BAD: dict[str, tuple[dict[str, Any], Any, str, str]] = {
    "an unknown input": ({"x": GOOD_X}, GOOD_Y, "input_mismatch", r"inputs \['input'\], but \['x'\]"),
    "an input too many": ({"input": GOOD_X, "y": GOOD_X}, GOOD_Y, "input_mismatch", "but"),
    "no input": ({}, GOOD_Y, "input_mismatch", r"but \[\] were given"),
    "another width": ({"input": np.zeros((4, 5), F32)}, GOOD_Y, "input_mismatch", r"shape \[4, 5\]"),
    "doubles": ({"input": np.zeros((4, 6))}, GOOD_Y, "input_mismatch", "takes float32, but float64"),
    "whole numbers": ({"input": np.zeros((4, 6), I64)}, GOOD_Y, "input_mismatch", "takes float32, but int64"),
    "text": ({"input": np.array([["a"] * 6])}, GOOD_Y, "input_mismatch", "cannot be trained on"),
    "complex numbers": ({"input": np.zeros((4, 6), np.complex64)}, GOOD_Y, "input_mismatch", "cannot be trained on"),
    "no samples": ({"input": np.zeros((0, 6), F32)}, np.zeros(0, I64), "input_mismatch", "holds no samples"),
    "a scalar": ({"input": np.array(1, F32)}, GOOD_Y, "input_mismatch", "holds no samples"),
    "more inputs than targets": ({"input": GOOD_X}, np.zeros(3, I64), "input_mismatch", "first axes differ"),
    "scalar targets": ({"input": GOOD_X}, np.array(1), "input_mismatch", "first axes differ"),
    "a class too high": ({"input": GOOD_X}, np.array([0, 1, 4, 2]), "input_mismatch", "4 is none of the 4 classes"),
    "a negative class": ({"input": GOOD_X}, np.array([0, -100, 1, 2]), "input_mismatch", "-100 is none of"),
    "bool classes": ({"input": GOOD_X}, np.zeros(4, bool), "input_mismatch", "bool was given"),
    "targets of two axes": ({"input": GOOD_X}, np.zeros((4, 1), I64), "input_mismatch", r"takes shape \[4\]"),
    "shares of doubles": ({"input": GOOD_X}, np.zeros((4, 4)), "input_mismatch", "float64 was given"),
    "shares above 1": ({"input": GOOD_X}, np.full((4, 4), 2, F32), "input_mismatch", "shares from 0 to 1"),
    "NaN as shares": ({"input": GOOD_X}, np.full((4, 4), np.nan, F32), "input_mismatch", "shares from 0 to 1"),
    "a batch too large": ({"input": np.zeros((33, 6), F32)}, np.zeros(33, I64), "batch_too_large", "33 samples"),
    "one sample to normalize": ({"input": GOOD_X[:1]}, GOOD_Y[:1], "input_mismatch", "more than 1 value per channel"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_batch_that_does_not_fit_is_refused_and_the_session_is_unharmed(case: str) -> None:
    inputs, targets, code, words = BAD[case]
    session = start()
    train(session, 2)
    before = digest(session)
    with pytest.raises(OperationError, match=words) as caught:
        session.perform(Batch(inputs, targets), StepOptions(), 3)
    assert caught.value.code == code
    assert digest(session) == before
    session.perform(batch(3), StepOptions(), 3)


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1", "bce_with_logits"])
def test_targets_are_never_spread_over_an_output_of_another_shape(loss: str) -> None:
    session = plain(loss=loss)
    with pytest.raises(OperationError, match=r"takes shape \[4, 4\], but \[4, 1\]") as caught:
        session.perform(Batch({"input": GOOD_X}, np.zeros((4, 1), F32)), StepOptions(), 1)
    assert caught.value.code == "input_mismatch"


def test_shares_for_a_binary_loss_are_checked() -> None:
    session = plain(loss="bce_with_logits")
    with pytest.raises(OperationError, match="go from 0 to 3"):
        session.perform(Batch({"input": GOOD_X}, np.array([[0, 1, 3, 0]] * 4, F32)), StepOptions(), 1)
    outcome = session.perform(Batch({"input": GOOD_X}, np.ones((4, 4), F32)), StepOptions(mode="evaluate"), 1)
    assert outcome.elements == 16


def test_nll_takes_class_numbers_only_and_needs_a_class_axis() -> None:
    session = plain(loss="nll")
    with pytest.raises(OperationError, match="nll takes class numbers, but float32"):
        session.perform(Batch({"input": GOOD_X}, np.zeros((4, 4), F32)), StepOptions(), 1)
    flat = start(model={"kind": "layers", "layers": [*PLAIN, {"type": "flatten", "start_dim": 0}]}, loss="nll")
    with pytest.raises(OperationError, match="needs an output of shape"):
        flat.perform(Batch({"input": GOOD_X}, GOOD_Y), StepOptions(), 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_class_numbers_may_be_whole_numbers_of_any_width(dtype: Any) -> None:
    one, other = plain(), plain()
    one.perform(batch(1), StepOptions(), 1)
    other.perform(Batch(batch(1).inputs, batch(1).targets.astype(dtype)), StepOptions(), 1)
    assert digest(one) == digest(other)


@pytest.mark.parametrize("ids", [[[0, 9]], [[-1, 0]]])
def test_an_index_outside_the_embedding_is_refused(ids: list[list[int]]) -> None:
    layers = [{"type": "embedding", "num_embeddings": 9, "embedding_dim": 4}, {"type": "flatten"}]
    session = start(model={"kind": "layers", "layers": layers}, loss="mse")
    with pytest.raises(OperationError, match="none of the embedding's 9 rows") as caught:
        session.perform(Batch({"input": np.array(ids)}, np.zeros((1, 8), F32)), StepOptions(), 1)
    assert caught.value.code == "input_mismatch"


def test_running_out_of_memory_in_a_step_has_its_own_code_and_harms_nothing() -> None:
    layers = [{"type": "linear", "in_features": 1, "out_features": 64}, {"type": "flatten"}]
    session = start(model={"kind": "layers", "layers": layers}, loss="mse")
    before = digest(session)
    # One element seen 2**36 times: the input takes no memory, the first product 16 TiB.
    vast = torch.zeros(1, 1, 1).expand(1, 2**36, 1)
    wanted = torch.zeros(1, 1).expand(1, 2**42)
    with pytest.raises(OperationError) as caught:
        session.perform(Batch({"input": vast}, wanted), StepOptions(), 1)
    assert caught.value.code == "out_of_memory"
    assert digest(session) == before
    session.perform(Batch({"input": np.zeros((2, 3, 1), F32)}, np.zeros((2, 192), F32)), StepOptions(), 1)


def test_applying_without_gradients_is_refused() -> None:
    with pytest.raises(OperationError, match="no gradients are accumulated") as caught:
        start().perform(None, StepOptions(mode="apply"), 1)
    assert caught.value.code == "validation_failed"


def test_a_sequence_number_that_was_applied_is_refused() -> None:
    session = start()
    train(session, 2)
    before = digest(session)
    with pytest.raises(OperationError, match="step 2 has been applied") as caught:
        session.perform(batch(2), StepOptions(), 2)
    assert caught.value.code == "sequence_conflict"
    assert digest(session) == before


def test_a_model_without_parameters_has_nothing_to_train() -> None:
    with pytest.raises(OperationError, match="nothing to train"):
        start(model={"kind": "layers", "layers": [{"type": "relu"}]})


def test_memory_is_refused_before_it_is_taken_and_the_message_says_how_much() -> None:
    with pytest.raises(OperationError, match="takes 5264 bytes, but 1000") as caught:
        start(limits=Limits(memory_bytes=1000, max_batch_size=32))
    assert caught.value.code == "insufficient_memory"
    assert start(limits=Limits(memory_bytes=5264, max_batch_size=32)).memory_bytes() == 5264


def test_a_program_is_refused_unless_programs_are_trusted(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(6, 4))), str(path))
    model = {"kind": "torchscript", "blob_id": "program"}
    with pytest.raises(OperationError, match="TRAINING__TRUST_PROGRAMS") as caught:
        start(Sources(model=path), model=model)
    assert caught.value.code == "untrusted_program"

    trusted = Limits(memory_bytes=2**30, max_batch_size=32, trust_programs=True)
    session = start(Sources(model=path), trusted, model=model)
    x, y = batch(1).inputs["input"], batch(1).targets
    losses = [session.perform(Batch({"input": x}, y), StepOptions(), number).loss for number in range(1, 20)]
    assert losses[-1] < losses[0]
    with pytest.raises(OperationError) as caught:
        session.perform(Batch({"input": x}, y + 9), StepOptions(), 30)
    assert caught.value.code == "input_mismatch"
    path.write_bytes(b"no program")
    with pytest.raises(OperationError) as caught:
        start(Sources(model=path), trusted, model=model)
    assert caught.value.code == "model_invalid"


class Put(torch.nn.Module):
    """Writes to places by number, which torch does not do deterministically."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y + torch.zeros_like(y).put_(torch.zeros(2, dtype=torch.int64), torch.ones(2))


def test_an_operator_without_a_deterministic_kernel_is_named_unless_the_request_lets_it_in(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(Put()), str(path))
    trusted = Limits(memory_bytes=2**30, max_batch_size=32, trust_programs=True)
    model = {"kind": "torchscript", "blob_id": "program"}
    one = Batch({"x": batch(1).inputs["input"]}, batch(1).targets)
    with pytest.raises(
        OperationError, match=r'put_ has no deterministic kernel on cpu.*"deterministic": false'
    ) as caught:
        start(Sources(model=path), trusted, model=model).perform(one, StepOptions(), 1)
    assert caught.value.code == "run_failed"
    start(Sources(model=path), trusted, model=model, deterministic=False).perform(one, StepOptions(), 1)


@pytest.mark.parametrize("kind", ["layers", "onnx"])
def test_a_session_that_is_let_go_gives_its_memory_back_at_once(kind: str, models_dir: Path) -> None:
    if kind == "layers":
        session = start()
        train(session, 2)
    else:
        path = models_dir / "rapidocr" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
        session = start(Sources(model=path), model={"kind": "onnx", "blob_id": "cls"}, loss="mse")
        x = np.zeros((2, 3, 48, 96), np.float32)
        session.perform(Batch({"x": x}, np.zeros((2, 2), np.float32)), StepOptions(), 1)
    held = [weakref.ref(tensor) for tensor in (*session.state.trained, *session.state.updater.tensors())]
    gc.disable()
    try:
        del session
        assert [reference for reference in held if reference() is not None] == []
    finally:
        gc.enable()


def test_weights_from_a_file_are_what_the_session_starts_with(tmp_path: Path) -> None:
    trained = start()
    train(trained, 4)
    snapshot = trained.snapshot()
    weights = {**snapshot.part("parameter/"), **snapshot.part("buffer/")}
    written = checkpoints.write_tensors(weights, tmp_path / "weights.safetensors")
    named = {"blob_id": "weights", "sha256": written.sha256}
    session = start(Sources(weights=written.path), weights=named)
    assert torch.equal(session.outputs(batch(1).inputs)["output"], trained.outputs(batch(1).inputs)["output"])

    for wrong, words in [
        ({"fc1.weight": weights["fc1.weight"]}, "missing"),
        ({**weights, "other": torch.zeros(1)}, r"unknown \['other'\]"),
        ({**weights, "fc1.bias": torch.zeros(3)}, r"fc1\.bias is \[12\] there and \[3\] here"),
    ]:
        bad = checkpoints.write_tensors(wrong, tmp_path / "bad.safetensors")
        with pytest.raises(OperationError, match=words) as caught:
            start(Sources(weights=bad.path), weights={"blob_id": "weights"})
        assert caught.value.code == "model_invalid"
    with pytest.raises(OperationError) as caught:
        start(Sources(weights=bad.path), weights=named)
    assert caught.value.code == "checksum_mismatch"


def test_only_the_parameters_that_a_pattern_names_are_trained() -> None:
    session = start(trainable=["fc2.*", "*.bias"])
    before = session.snapshot()
    train(session, 3)
    after = session.snapshot()
    moved = {
        n for n, tensor in before.part("parameter/").items() if not torch.equal(tensor, after.part("parameter/")[n])
    }
    assert moved == {"fc1.bias", "norm.bias", "block.mix.bias", "fc2.weight", "fc2.bias"}
    assert {name.rsplit("/", 1)[1] for name in after.tensors if name.startswith("optimizer/")} == moved


def test_a_pattern_that_names_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(OperationError, match=r"'fc3\.\*' fits none.*fc1\.weight") as caught:
        start(trainable=["fc3.*"])
    assert caught.value.code == "validation_failed"


def test_a_request_has_the_classifier_that_these_tests_stand_on() -> None:
    assert describe().model.layers == LAYERS
