"""Layers: every type builds, trains and exports; what is unknown or too large is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import ValidationError

from device_operations.errors import OperationError
from device_operations.requests.layers import LAYERS as TABLE
from device_operations.requests.layers import canonical
from tests.training.sessions import describe, start
from workers.training.model.definition import Sources, define
from workers.training.model.layers import _CLASSES
from workers.training.model.on_device import estimate_bytes
from workers.training.model.ports import Batch
from workers.training.onnx.export import onnx_bytes
from workers.training.outcomes import StepOptions

#: For each type: a layer, and the shape of one sample that it takes.
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "linear": ({"in_features": 6, "out_features": 4}, (6,)),
    "conv1d": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "same"}, (2, 8)),
    "conv2d": ({"in_channels": 2, "out_channels": 4, "kernel_size": [3, 2], "groups": 2, "stride": 2}, (2, 8, 8)),
    "batch_norm1d": ({"num_features": 5}, (5,)),
    "batch_norm2d": ({"num_features": 2, "momentum": 0.2}, (2, 4, 4)),
    "layer_norm": ({"normalized_shape": [3, 4]}, (3, 4)),
    "group_norm": ({"num_groups": 2, "num_channels": 4}, (4, 3, 3)),
    "embedding": ({"num_embeddings": 9, "embedding_dim": 5}, (7,)),
    "lstm": ({"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True}, (5, 3)),
    "gru": ({"input_size": 3, "hidden_size": 4, "output": "last"}, (5, 3)),
    "multihead_attention": ({"embed_dim": 8, "num_heads": 2}, (5, 8)),
    "leaky_relu": ({"negative_slope": 0.2}, (6,)),
    "gelu": ({"approximate": "tanh"}, (6,)),
    "prelu": ({"num_parameters": 3}, (3, 4)),
    "softmax": ({"dim": 1}, (6,)),
    "log_softmax": ({"dim": 1}, (6,)),
    "dropout": ({"p": 0.05}, (6,)),
    "alpha_dropout": ({"p": 0.05}, (6,)),
    "dropout1d": ({"p": 0.05}, (3, 4)),
    "dropout2d": ({"p": 0.05}, (3, 4, 4)),
    "max_pool1d": ({"kernel_size": 2}, (3, 8)),
    "max_pool2d": ({"kernel_size": 3, "stride": 2, "padding": 1}, (3, 8, 8)),
    "avg_pool1d": ({"kernel_size": [2]}, (3, 8)),
    "avg_pool2d": ({"kernel_size": 2, "count_include_pad": False}, (3, 8, 8)),
    "adaptive_avg_pool1d": ({"output_size": 1}, (3, 8)),
    "adaptive_avg_pool2d": ({"output_size": [2, 2]}, (3, 8, 8)),
    "adaptive_max_pool1d": ({"output_size": 4}, (3, 8)),
    "adaptive_max_pool2d": ({"output_size": 1}, (3, 8, 8)),
    "unflatten": ({"dim": 1, "unflattened_size": [2, 3]}, (6,)),
    "sequential": ({"layers": [{"type": "linear", "in_features": 6, "out_features": 6}, {"type": "tanh"}]}, (6,)),
    "residual": ({"layers": [{"type": "linear", "in_features": 6, "out_features": 6}]}, (6,)),
    "parallel": ({"layers": [{"type": "relu"}, {"type": "linear", "in_features": 6, "out_features": 2}]}, (6,)),
}


@pytest.mark.parametrize("kind", TABLE)
def test_every_layer_type_trains_and_its_export_gives_the_same_outputs(kind: str) -> None:
    arguments, shape = EXAMPLES.get(kind, ({}, (6,)))
    layers = [{"type": kind, "name": "layer", **arguments}]
    if kind != "embedding":  # something to train before it, for those that have no parameters
        layers = [{"type": "layer_norm", "normalized_shape": [shape[-1]]}, *layers]
    session = start(model={"kind": "layers", "layers": layers}, loss="mse")
    random = np.random.RandomState(0)
    samples = random.randn(16, *shape).astype(np.float32) if kind != "embedding" else random.randint(0, 9, (16, *shape))
    first = session.outputs({"input": samples})["output"].numpy()
    wanted = first + random.randn(*first.shape).astype(np.float32)

    before = session.perform(Batch({"input": samples}, wanted), StepOptions(mode="evaluate"), 1).loss
    for number in range(2, 30):
        session.perform(Batch({"input": samples}, wanted), StepOptions(), number)
    after = session.perform(Batch({"input": samples}, wanted), StepOptions(mode="evaluate"), 30).loss

    assert before is not None
    assert after is not None
    assert after < before
    served = onnxruntime.InferenceSession(onnx_bytes(session.definition, session.spec, session.snapshot()))
    more = np.concatenate([samples, samples[:1]])  # another batch size than it was traced with
    assert [port.name for port in served.get_inputs()] == ["input"]
    np.testing.assert_allclose(
        served.run(["output"], {"input": more})[0], session.outputs({"input": more})["output"].numpy(), atol=2e-5
    )


def test_the_table_names_only_arguments_that_torch_has() -> None:
    for name, kind in TABLE.items():
        if name in _CLASSES:
            known = set(inspect.signature(_CLASSES[name]).parameters)
            assert {*kind.required, *kind.optional} <= known, name


def test_every_type_of_the_table_has_a_torch_class() -> None:
    own = {"sequential", "residual", "parallel", "lstm", "gru", "multihead_attention"}
    assert set(TABLE) - own == set(_CLASSES)


@pytest.mark.parametrize("spelling", ["BatchNorm2d", "batchnorm2d", "batch_norm2d"])
def test_a_type_may_be_spelled_as_torch_spells_it(spelling: str) -> None:
    assert canonical([{"type": spelling, "num_features": 3}]) == [{"type": "batch_norm2d", "num_features": 3}]


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ({"type": "linaer"}, "unknown layer 'linaer' (did you mean 'linear'?)"),
        ({"type": "lambda", "code": "1"}, "unknown layer 'lambda'"),
        (
            {"type": "linear", "in_feature": 2, "out_features": 2},
            "unknown argument 'in_feature' (did you mean 'in_features'?)",
        ),
        ({"type": "linear", "in_features": 2}, "out_features is missing"),
        ({"type": "linear", "in_features": 0, "out_features": 2}, "in_features must be an integer from 1"),
        ({"type": "linear", "in_features": True, "out_features": 2}, "not True"),
        ({"type": "linear", "in_features": 2, "out_features": 2, "device": "cuda"}, "unknown argument 'device'"),
        ({"type": "conv2d", "in_channels": 3, "out_channels": 4, "kernel_size": [1, 2, 3]}, "a list of 2"),
        ({"type": "conv2d", "in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}, "multiple of groups"),
        ({"type": "multihead_attention", "embed_dim": 7, "num_heads": 2}, "not a multiple"),
        ({"type": "lstm", "input_size": 2, "hidden_size": 2, "batch_first": False}, "must be true"),
        ({"type": "lstm", "input_size": 2, "hidden_size": 2, "num_layers": 10**9}, "num_layers must be"),
        ({"type": "dropout", "p": 1.5}, "p must be a number of at least 0, up to 1"),
        ({"type": "dropout", "p": float("nan")}, "p must be a number"),
        ({"type": "embedding", "num_embeddings": 3, "embedding_dim": 2, "padding_idx": 3}, "none of the 3 rows"),
        ({"type": "max_pool2d", "kernel_size": 2, "padding": 2}, "at most half"),
        ({"type": "relu", "layers": []}, 'takes no "layers"'),
        ({"type": "relu", "name": "a.b"}, "a name is"),
        ({"type": "sequential"}, '"layers" must be a list'),
        (
            {"type": "sequential", "layers": [{"type": "relu", "name": "a"}, {"type": "tanh", "name": "a"}]},
            "given twice",
        ),
        ("relu", 'an object with a "type"'),
        ({"name": "x"}, 'an object with a "type"'),
    ],
)
def test_a_layer_that_cannot_be_is_refused_with_its_place_and_reason(layer: Any, named: str) -> None:
    with pytest.raises(ValueError, match=r"layers\[1\]") as caught:
        canonical([{"type": "relu"}, layer])
    assert named.replace("none of", "is not one of") in str(caught.value) or named in str(caught.value)
    with pytest.raises(ValidationError):
        describe(model={"kind": "layers", "layers": [{"type": "relu"}, layer]})


def test_layers_nested_without_end_are_refused() -> None:
    nested: dict[str, Any] = {"type": "relu"}
    for _ in range(500):
        nested = {"type": "sequential", "layers": [nested]}
    with pytest.raises(ValueError, match="nest deeper"):
        canonical([nested])


@pytest.mark.parametrize("name", ["training", "forward"])
def test_a_name_that_torch_keeps_for_itself_is_refused(name: str) -> None:
    with pytest.raises(OperationError) as caught:
        start(
            model={"kind": "layers", "layers": [{"type": "linear", "name": name, "in_features": 1, "out_features": 1}]}
        )
    assert caught.value.code == "validation_failed"
    assert name in caught.value.message


def test_a_trillion_parameters_are_counted_and_refused_before_any_memory_is_taken() -> None:
    huge = {"kind": "layers", "layers": [{"type": "linear", "name": "fc", "in_features": 10**6, "out_features": 10**6}]}
    spec = describe(model=huge, loss="mse")
    parameters = 10**12 + 10**6

    assert estimate_bytes(define(spec.model, Sources(), trust_programs=False), spec) == parameters * 4 * 4
    with pytest.raises(OperationError) as caught:
        start(model=huge, loss="mse")

    assert caught.value.code == "insufficient_memory"
    assert caught.value.detail == {"needed_bytes": parameters * 16, "free_bytes": 2**32}


def test_a_layer_beyond_what_torch_can_count_is_refused_by_its_name() -> None:
    layers = [{"type": "linear", "name": "vast", "in_features": 2**40, "out_features": 2**40}]
    with pytest.raises(OperationError, match="vast") as caught:
        start(model={"kind": "layers", "layers": layers}, loss="mse")
    assert caught.value.code == "validation_failed"


def test_the_estimate_is_what_the_session_then_takes() -> None:
    for optimizer in ("sgd", "adam"):
        session = start(optimizer={"type": optimizer, "learning_rate": 0.1}, trainable=["fc*"])
        spec = session.spec
        assert session.memory_bytes() == estimate_bytes(define(spec.model, Sources(), trust_programs=False), spec)


def test_equal_seeds_give_equal_weights_and_leave_torchs_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = start(seed=3), start(seed=3), start(seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [session.snapshot().tensors["parameter/fc1.weight"] for session in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_residual_that_changes_the_shape_is_refused_when_a_batch_comes() -> None:
    layers = [{"type": "residual", "layers": [{"type": "linear", "in_features": 6, "out_features": 1}]}]
    session = start(model={"kind": "layers", "layers": layers}, loss="mse")
    with pytest.raises(OperationError, match="residual") as caught:
        session.perform(Batch({"input": np.zeros((2, 6), np.float32)}, np.zeros((2, 6), np.float32)), StepOptions(), 1)
    assert caught.value.code == "input_mismatch"
