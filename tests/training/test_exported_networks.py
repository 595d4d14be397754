"""Networks exported by torch train here as torch trains them: the same losses, step by step, from the same start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from device_operations.errors import OperationError
from tests.training.networks import NETWORKS, WAYS, draw, export, make
from tests.training.sessions import CPU, LIMITS, OPTIMIZERS, describe
from workers.training.model.definition import Sources
from workers.training.model.ports import Batch
from workers.training.onnx.export import onnx_bytes
from workers.training.outcomes import StepOptions
from workers.training.session import TrainingSession, build_session

STEPS = 20
PLAIN = {
    "sgd": ({"type": "sgd", "learning_rate": 0.05}, lambda p: torch.optim.SGD(p, 0.05)),
    "adam": ({"type": "adam", "learning_rate": 0.01}, lambda p: torch.optim.Adam(p, 0.01)),
    "adamw": ({"type": "adamw", "learning_rate": 0.01}, lambda p: torch.optim.AdamW(p, 0.01)),
}

#: The layer scale of ConvNeXt only scales: the tracing exporter's file cannot tell it from a buffer, so it is named.
NAMED = {("convnext", way): ["*", "g"] for way in ("eval", "training", "preserve")}

#: What no file of these tells: normalization that was folded away, and a bias of zeros that was left out.
FOLDED = [(name, way) for name in ("bn", "resnet", "mobilenet") for way in ("eval", "dynamo")] + [
    (name, "dynamo") for name in ("encoder", "encoders", "translator")
]
FAITHFUL = [(name, way) for name in NETWORKS for way in WAYS if (name, way) not in FOLDED]

#: Networks that are trained by each optimizer; the others by one.
THOROUGH = ("norm", "bn", "causal", "encoder", "lstm", "gru")
CASES = [(name, way, optimizer) for name, way in FAITHFUL for optimizer in (PLAIN if name in THOROUGH else ["adamw"])]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports a network once for all tests that use it."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def exported(name: str, way: str) -> Path:
        if (name, way) not in made:
            made[name, way] = export(name, way, folder / f"{len(made)}.onnx")
        return made[name, way]

    return exported


def start(path: Path, optimizer: dict[str, Any], **fields: Any) -> TrainingSession:
    model = {"kind": "onnx", "path": path.name}
    return build_session(describe(model=model, optimizer=optimizer, **fields), Sources(model=path), CPU, LIMITS)


def count_trained(session: TrainingSession) -> int:
    return sum(parameter.numel() for parameter in session.state.model.trained.values())


def count_parameters(name: str, way: str) -> int:
    """The numbers that torch trains of the network, as far as the file has them."""
    # The newer exporter's optimizer keeps the rows of the table of positions that a length of 5 uses.
    lost = 11 * 8 if way == "dynamo" and name in ("gpt2", "bert") else 0
    return sum(parameter.numel() for parameter in make(name).parameters()) - lost


def batches(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(draw(name, generator), torch.randint(0, 4, (5,), generator=generator)) for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way", "optimizer"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_an_exported_network_trains_as_in_torch(name: str, way: str, optimizer: str, exported: Any) -> None:
    description, build = PLAIN[optimizer]
    network = make(name).train()
    update = build(network.parameters())
    session = start(exported(name, way), description, trainable=NAMED.get((name, way)))
    assert count_trained(session) == count_parameters(name, way)
    # Exporting in training mode runs the network, which moves its statistics: the file holds them as they are then.
    network.load_state_dict(session.snapshot().part("buffer/"), strict=False)
    for number, (x, targets) in enumerate(batches(name), 1):
        update.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), targets)
        loss.backward()
        update.step()
        outcome = session.perform(Batch({"x": x.numpy()}, targets.numpy()), StepOptions(), number)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-5), f"step {number}"
    x, targets = batches(name)[0]
    with torch.no_grad():
        wanted = network.eval()(x)
    evaluated = session.perform(Batch({"x": x.numpy()}, targets.numpy()), StepOptions(mode="evaluate"), STEPS + 1)
    assert evaluated.loss == pytest.approx(torch.nn.functional.cross_entropy(wanted, targets).item(), rel=1e-5)
    served = onnxruntime.InferenceSession(
        onnx_bytes(session.definition, session.spec, session.snapshot()), providers=["CPUExecutionProvider"]
    ).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(served, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "way"), FOLDED)
def test_a_file_that_lacks_what_torch_trains_is_refused_by_name_unless_statistics_are_frozen(
    name: str, way: str, exported: Any
) -> None:
    with pytest.raises(OperationError, match=r"node .*optimize=False.*frozen_statistics") as refused:
        start(exported(name, way), OPTIMIZERS["sgd"])
    assert refused.value.code == "model_invalid"
    session = start(exported(name, way), OPTIMIZERS["sgd"], frozen_statistics=True)
    x, targets = batches(name)[0]
    assert math.isfinite(session.perform(Batch({"x": x.numpy()}, targets.numpy()), StepOptions(), 1).loss or math.nan)


def test_frozen_statistics_stay_as_they_are_and_are_what_training_uses(exported: Any) -> None:
    session = start(exported("bn", "preserve"), OPTIMIZERS["sgd"], frozen_statistics=True)
    network = make("bn").eval()
    network.load_state_dict(session.snapshot().part("buffer/"), strict=False)
    before = {name: tensor.clone() for name, tensor in session.snapshot().part("buffer/").items()}
    x, targets = batches("bn")[0]
    outcome = session.perform(Batch({"x": x.numpy()}, targets.numpy()), StepOptions(), 1)
    assert outcome.loss == pytest.approx(torch.nn.functional.cross_entropy(network(x), targets).item(), rel=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in session.snapshot().part("buffer/").items())


def test_a_tied_weight_stays_tied_also_where_a_transposed_copy_was_exported(exported: Any) -> None:
    for way in ("preserve", "eval"):
        session = start(exported("gpt2", way), OPTIMIZERS["sgd"])
        x, targets = batches("gpt2")[0]
        session.perform(Batch({"x": x.numpy()}, targets.numpy()), StepOptions(), 1)
        tables = [name for name, p in session.state.model.trained.items() if sorted(p.shape) == [8, 20]]
        assert len(tables) == 1, way
