"""Requests of training sessions: what is taken, what is refused, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from device_operations.errors import OperationError
from device_operations.jobs import Kind
from device_operations.requests.kinds import parse
from device_operations.requests.training import Initialize, Step

TENSOR = {"dtype": "float32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}
FAR = {"dtype": "float32", "shape": [2, 3], "blob_id": "b"}
LABELS = {"dtype": "int64", "shape": [2], "data": [0, 1]}
MODEL = {"kind": "layers", "layers": [{"type": "Linear", "name": "fc", "in_features": 3, "out_features": 2}]}
PLAIN: dict[str, Any] = {"model": MODEL, "loss": "cross_entropy", "optimizer": {"type": "sgd", "learning_rate": 0.1}}
BATCH: dict[str, Any] = {"session_id": "s", "inputs": {"input": TENSOR}, "targets": LABELS}
DATASET: dict[str, Any] = {"blob_id": "b", "batch_size": 8, "epochs": 1}


def test_the_contracts_own_examples_are_taken() -> None:
    full = PLAIN | {
        "device_id": "gpu_0",
        "model": {"kind": "onnx", "path": "a/b.onnx", "sha256": "0" * 64, "output": "y"},
        "weights": {"blob_id": "w"},
        "optimizer": {"type": "adamw", "learning_rate": 1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0},
        "schedule": {"type": "cosine", "warmup_steps": 10, "total_steps": 100},
        "seed": 7,
        "trainable": ["fc*"],
        "lora": {"rank": 4, "alpha": 8, "targets": ["fc*"]},
        "checkpoint_every_steps": 100,
        "keep_last": 3,
        "lease_seconds": 600,
        "on_nonfinite": "skip",
    }
    assert Initialize.model_validate(full).blob_ids() == ["w"]
    assert Initialize.model_validate(PLAIN | {"resume_from": "c"}).resume_from == "c"
    for mode in ("train", "gradients", "evaluate"):
        assert Step.model_validate(BATCH | {"mode": mode}).batch_size == 2
    step = Step.model_validate({"session_id": "s", "sequence": 1, "dataset": DATASET, "gradient_clip_norm": 1})
    assert (step.batch_size, step.blob_ids()) == (8, ["b"])
    assert Step.model_validate({"session_id": "s", "mode": "apply", "learning_rate": 0.1}).batch_size is None
    for kind, request in {
        Kind.TRAINING_CHECKPOINT: {"session_id": "s", "name": "n", "export": ["onnx"], "keep_last": 2},
        Kind.TRAINING_VALIDATE: {"checkpoint_id": "c", "inputs": {"input": FAR}, "targets": FAR},
        Kind.TRAINING_END_SESSION: {"session_id": "s", "checkpoint": True},
    }.items():
        assert parse(kind, request).payload() == parse(kind, parse(kind, request).payload()).payload()


def test_layers_are_recorded_by_their_one_spelling_and_a_payload_reads_back_as_it_was() -> None:
    request = Initialize.model_validate(PLAIN)
    assert request.payload()["model"]["layers"][0]["type"] == "linear"
    assert Initialize.model_validate(request.payload()) == request


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "mse"},
        {"loss": {"type": "cross_entropy", "ignore_index": -100, "weight": [1.0, 0.5], "label_smoothing": 0.1}},
        {"loss": {"type": "bce_with_logits", "pos_weight": [2.0]}},
        {"loss": {"type": "smooth_l1", "beta": 0.5}},
        {"schedule": {"type": "plateau", "metric": "evaluate"}},
        {"schedule": {"type": "one_cycle", "total_steps": 10}},
        {"precision": "float16"},
    ],
)
def test_a_recipe_is_recorded_as_it_was_said_and_reads_back(change: dict[str, Any]) -> None:
    request = Initialize.model_validate(PLAIN | change)
    (name, said), *_ = change.items()
    payload = request.payload()
    assert payload[name] == said or said.items() <= payload[name].items()
    assert Initialize.model_validate(payload) == request


def test_the_documents_schema_says_what_each_loss_and_schedule_takes() -> None:
    definitions = Initialize.model_json_schema()["$defs"]
    assert set(definitions["NllLoss"]["properties"]) == {"type", "ignore_index", "weight"}
    assert "every_steps" in definitions["PlateauSchedule"]["properties"]


def test_every_blob_that_a_step_reads_is_named() -> None:
    far = {"dtype": "float32", "shape": [2, 3]}
    step = Step.model_validate(BATCH | {"inputs": {"a": far | {"blob_id": "x"}}, "targets": far | {"blob_id": "y"}})
    assert step.blob_ids() == ["x", "y"]
    inside = DATASET | {
        "blob_id": None,
        "inputs": {"a": far | {"blob_id": "x"}},
        "targets": far | {"allocation_id": "y"},
    }
    step = Step.model_validate({"session_id": "s", "dataset": inside})
    assert step.blob_ids() == ["x"]
    assert {name: tensor.allocation_id for name, tensor in step.tensors().items()} == {"inputs.a": None, "targets": "y"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"kind": "pickle"}}, "layers"),
        ({"model": {"kind": "layers", "layers": []}}, "at least 1"),
        ({"model": {"kind": "layers", "layers": [{"type": "linaer"}]}}, "did you mean 'linear'"),
        ({"model": {"kind": "onnx"}}, "exactly one of blob_id and path"),
        ({"model": {"kind": "onnx", "blob_id": "a", "path": "b"}}, "exactly one of blob_id and path"),
        ({"model": {"kind": "torchscript"}}, "blob_id"),
        ({"loss": "hinge"}, "'mse', 'cross_entropy'"),
        ({"optimizer": {"type": "lion", "learning_rate": 1}}, "'sgd', 'adam', 'adamw'"),
        ({"optimizer": {"type": "sgd"}}, "learning_rate"),
        ({"optimizer": {"type": "sgd", "learning_rate": "0.1"}}, "valid number"),
        ({"optimizer": {"type": "sgd", "learning_rate": float("nan")}}, "finite|greater"),
        ({"optimizer": {"type": "sgd", "learning_rate": -1}}, "greater than or equal to 0"),
        ({"optimizer": {"type": "sgd", "learning_rate": 1, "betas": [0, 0]}}, "betas|Extra"),
        ({"optimizer": {"type": "sgd", "learning_rate": 1, "nesterov": True}}, "momentum above 0"),
        ({"optimizer": {"type": "adam", "learning_rate": 1, "betas": [0.9, 1.0]}}, "less than 1"),
        ({"optimizer": {"type": "adam", "learning_rate": 1, "eps": 0}}, "greater than 0"),
        ({"schedule": {"type": "cosine"}}, "needs total_steps"),
        ({"schedule": {"type": "linear", "warmup_steps": 5, "total_steps": 5}}, "above warmup_steps"),
        ({"schedule": {"total_steps": 5}}, "go with type cosine or linear"),
        ({"schedule": {"type": "cyclic"}}, "'one_cycle' or 'plateau'"),
        ({"schedule": {"type": "step"}}, "step_size"),
        ({"schedule": {"type": "step", "step_size": 0}}, "greater than or equal to 1"),
        ({"schedule": {"type": "exponential", "gamma": 0}}, "greater than 0"),
        ({"schedule": {"type": "exponential", "gamma": 0.9, "step_size": 2}}, "Extra inputs"),
        ({"schedule": {"type": "one_cycle"}}, "total_steps"),
        ({"schedule": {"type": "one_cycle", "total_steps": 9, "pct_start": 1.1}}, "less than or equal to 1"),
        ({"schedule": {"type": "one_cycle", "total_steps": 9, "warmup_steps": 1}}, "Extra inputs"),
        ({"schedule": {"type": "plateau", "factor": 1.0}}, "less than 1"),
        ({"schedule": {"type": "plateau", "metric": "accuracy"}}, "'train' or 'evaluate'"),
        ({"schedule": {"type": "plateau", "metric": "evaluate", "every_steps": 2}}, "goes with metric train"),
        ({"loss": {"type": "hinge"}}, "'mse', 'cross_entropy'"),
        ({"loss": {"ignore_index": 1}}, "whose type is one of these"),
        ({"loss": 1}, "whose type is one of these"),
        ({"loss": {"type": "mse", "weight": [1.0]}}, "Extra inputs"),
        ({"loss": {"type": "nll", "label_smoothing": 0.1}}, "Extra inputs"),
        ({"loss": {"type": "bce_with_logits", "ignore_index": 1}}, "Extra inputs"),
        ({"loss": {"type": "cross_entropy", "pos_weight": [1.0]}}, "Extra inputs"),
        ({"loss": {"type": "cross_entropy", "beta": 1.0}}, "Extra inputs"),
        ({"loss": {"type": "cross_entropy", "label_smoothing": 1.1}}, "less than or equal to 1"),
        ({"loss": {"type": "cross_entropy", "weight": []}}, "at least 1"),
        ({"loss": {"type": "cross_entropy", "weight": [-1.0]}}, "greater than or equal to 0"),
        ({"loss": {"type": "cross_entropy", "ignore_index": 1.5}}, "valid integer"),
        ({"loss": {"type": "smooth_l1", "beta": -1}}, "greater than or equal to 0"),
        ({"precision": "float64"}, "'float32', 'bfloat16' or 'float16'"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**63}, "less than"),
        ({"seed": True}, "valid integer"),
        ({"trainable": []}, "at least 1"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"weights": {"blob_id": "w"}, "resume_from": "c"}, "leave weights out"),
        ({"on_nonfinite": "ignore"}, "'stop' or 'skip'"),
        ({"checkpoint_every_steps": 0}, "greater than or equal to 1"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_an_initialization_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Initialize.model_validate(PLAIN | change)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"session_id": "s"}, "mode train needs inputs and targets"),
        ({"session_id": "s", "inputs": {"input": TENSOR}}, "needs inputs and targets"),
        (BATCH | {"mode": "apply"}, "mode apply takes no inputs"),
        (BATCH | {"dataset": DATASET}, "either inputs and targets, or a dataset"),
        (BATCH | {"mode": "sprint"}, "'train', 'gradients'"),
        (BATCH | {"sequence": 0}, "greater than or equal to 1"),
        (BATCH | {"sequence": 1.0}, "valid integer"),
        (BATCH | {"form": "blob"}, "go with mode gradients"),
        (BATCH | {"accumulate": False}, "go with mode gradients"),
        (BATCH | {"mode": "evaluate", "learning_rate": 0.1}, "go with mode train or apply"),
        (BATCH | {"gradient_clip_norm": 0}, "greater than 0"),
        (BATCH | {"inputs": {}}, "at least 1"),
        (BATCH | {"inputs": {"input": {"dtype": "float32", "shape": [1]}}}, "exactly one of"),
        ({"session_id": "s", "dataset": DATASET | {"epochs": None}}, "exactly one of steps and epochs"),
        ({"session_id": "s", "dataset": DATASET | {"steps": 1}}, "exactly one of steps and epochs"),
        ({"session_id": "s", "dataset": {"batch_size": 8, "epochs": 1}}, "inputs and targets, or a blob_id"),
        ({"session_id": "s", "dataset": DATASET | {"targets": LABELS}}, "either blob_id, or"),
        ({"session_id": "s", "dataset": DATASET, "mode": "gradients", "form": "blob"}, "for one batch"),
        ({"session_id": "s", "dataset": DATASET | {"grad_accumulation": 0}}, "greater than or equal to 1"),
        ({"session_id": "s", "dataset": DATASET | {"grad_accumulation": 2}, "mode": "evaluate"}, "with mode train"),
    ],
)
def test_a_step_that_cannot_be_is_refused(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Step.model_validate(request_)


def test_a_validation_names_a_session_or_a_checkpoint() -> None:
    body = {"inputs": {"input": TENSOR}, "targets": LABELS}
    for names in ({}, {"session_id": "s", "checkpoint_id": "c"}):
        with pytest.raises(OperationError, match="exactly one of session_id and checkpoint_id") as caught:
            parse(Kind.TRAINING_VALIDATE, body | names)
        assert caught.value.code == "validation_failed"
