"""Mixed precision: the scale of the loss as torch's GradScaler has it, and devices that cannot.

`test_plain_torch` compares its training with torch's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from device_operations.errors import OperationError
from tests.training.sessions import CPU, LAYERS, batch, carried_over, describe, digest, start, train
from workers.training.model.definition import Sources
from workers.training.model.ports import Batch
from workers.training.optimization import precision
from workers.training.optimization.precision import Autocast, LossScale
from workers.training.outcomes import StepOptions
from workers.training.session import Limits, TrainingSession, build_session

QUIET = [layer for layer in LAYERS if layer["type"] != "dropout"]
HALF = {"precision": "float16", "model": {"kind": "layers", "layers": QUIET}, "seed": 4}

#: What overflows in the backward pass of the first batches.
TOO_LARGE = 2.0**24


def test_an_overflow_passes_over_the_batch_and_lowers_the_scale_as_torchs_scaler_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    session = start(**HALF)
    session.state.loss_scale = LossScale(TOO_LARGE)
    network = session.definition.build(4).train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=TOO_LARGE, growth_interval=3)
    skipped = 0
    for number in range(1, 21):
        one = batch(number)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            output = network(torch.from_numpy(one.inputs["input"]))
        loss = torch.nn.functional.cross_entropy(output.float(), torch.from_numpy(one.targets))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        outcome = session.perform(one, StepOptions(), number)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-6), f"step {number}"
        assert session.state.loss_scale.scale == scaler.get_scale(), f"step {number}"
        skipped += outcome.skipped
        if number == 10:
            session = carried_over(session, tmp_path, **HALF)
    assert 0 < skipped < 20
    assert session.step == 20 - skipped
    for ours, theirs in zip(session.snapshot().tensors.values(), network.state_dict().values(), strict=False):
        assert ours.isfinite().all() and theirs.isfinite().all()
    state = network.state_dict()
    for name, tensor in {**session.snapshot().part("parameter/"), **session.snapshot().part("buffer/")}.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)


def test_the_scale_goes_on_where_a_checkpoint_was_taken(tmp_path: Path) -> None:
    session = start(**HALF)
    session.state.loss_scale = LossScale(TOO_LARGE)
    train(session, 5)
    resumed = carried_over(session, tmp_path, **HALF)
    assert resumed.state.loss_scale == session.state.loss_scale != LossScale()
    train(session, 5, first=6)
    train(resumed, 5, first=6)
    assert digest(resumed) == digest(session)


def test_a_gradient_that_no_scale_explains_is_refused() -> None:
    layers = [{"type": "linear", "in_features": 6, "out_features": 4}]
    session = start(model={"kind": "layers", "layers": layers}, loss="mse", precision="float16")
    session.state.loss_scale = LossScale(1.0)
    # The output and the loss are finite; the gradient of the weights, some 1e8, is not in float16.
    one = Batch({"input": np.full((8, 6), 1e4, np.float32)}, np.zeros((8, 4), np.float32))
    before = digest(session)
    with pytest.raises(OperationError, match="gradient norm is") as caught:
        session.perform(one, StepOptions(), 1)
    assert caught.value.code == "nonfinite_loss"
    assert digest(session) == before


def test_parameters_stay_in_float32_and_are_served_so() -> None:
    session = start(**HALF)
    train(session, 2)
    assert {tensor.dtype for tensor in session.snapshot().part("parameter/").values()} == {torch.float32}
    (output,) = session.outputs(batch(1).inputs).values()
    full = start(model=HALF["model"], seed=4)
    full.restore(session.snapshot())
    assert torch.equal(output, *full.outputs(batch(1).inputs).values())


@pytest.mark.parametrize("wanted", ["bfloat16", "float16"])
def test_a_device_without_autocast_refuses_the_session_by_name(wanted: str) -> None:
    with pytest.raises(OperationError, match=rf"{wanted}.*not on privateuseone.*leave precision out") as caught:
        build_session(describe(precision=wanted), Sources(), torch.device("privateuseone"), Limits(None, 32))
    assert caught.value.code == "dtype_unsupported"


def test_bfloat16_is_refused_where_the_hardware_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an older card")
    with pytest.raises(OperationError, match="an older card has no bfloat16") as caught:
        Autocast("bfloat16", torch.device("cuda"))
    assert caught.value.code == "dtype_unsupported"
    Autocast("float16", torch.device("cuda"))


def _on_cuda(wanted: str) -> TrainingSession:
    spec = describe(**HALF | {"precision": wanted})
    return build_session(spec, Sources(), torch.device("cuda"), Limits(None, 32))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("wanted", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_mixed_precision_on_cuda_is_torchs_and_resumes_to_the_bit(wanted: str, tolerance: float) -> None:
    # Losses were at most 2.3e-3 (bfloat16) and 1.9e-4 (float16) apart on an H200: an element's last bit in half precision.
    session = _on_cuda(wanted)
    network = session.definition.build(4).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=wanted == "float16")
    for number in range(1, 21):
        one = batch(number)
        optimizer.zero_grad()
        with torch.autocast("cuda", getattr(torch, wanted)):
            output = network(torch.from_numpy(one.inputs["input"]).cuda())
            loss = torch.nn.functional.cross_entropy(output, torch.from_numpy(one.targets).cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        outcome = session.perform(one, StepOptions(), number)
        assert outcome.loss == pytest.approx(loss.item(), rel=tolerance), f"step {number}"
        if number == 10:
            half = session.snapshot()
            twin = _on_cuda(wanted)
            twin.restore(half)
        if number > 10:
            twin.perform(one, StepOptions(), number)
    assert digest(twin) == digest(session)


def test_float32_is_left_as_it_is() -> None:
    assert start().state.loss_scale is None
    assert Autocast("float32", CPU).widened([torch.zeros(1, dtype=torch.bfloat16)])[0].dtype == torch.bfloat16
