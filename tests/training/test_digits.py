"""A real data set, scikit-learn's handwritten digits: at least 97 % of digits never trained on are read rightly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tests.training.sessions import start
from workers.training.dataset import BatchPlan, Samples
from workers.training.onnx.export import onnx_bytes
from workers.training.outcomes import StepOptions, summarize

CNN: list[dict[str, Any]] = [
    {"type": "conv2d", "name": "conv1", "in_channels": 1, "out_channels": 16, "kernel_size": 3, "padding": 1},
    {"type": "batch_norm2d", "name": "norm1", "num_features": 16},
    {"type": "relu"},
    {"type": "conv2d", "name": "conv2", "in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1},
    {"type": "batch_norm2d", "name": "norm2", "num_features": 32},
    {"type": "relu"},
    {"type": "max_pool2d", "kernel_size": 2},
    {"type": "flatten"},
    {"type": "dropout", "p": 0.25},
    {"type": "linear", "name": "fc1", "in_features": 512, "out_features": 64},
    {"type": "relu"},
    {"type": "linear", "name": "fc2", "in_features": 64, "out_features": 10},
]


def test_a_small_network_learns_to_read_digits() -> None:
    digits = load_digits()
    pictures = (digits.images[:, None] / 16).astype(np.float32)
    seen, held_out, seen_labels, labels = train_test_split(
        pictures, digits.target, test_size=360, random_state=0, stratify=digits.target
    )
    session = start(
        model={"kind": "layers", "layers": CNN},
        optimizer={"type": "adamw", "learning_rate": 0.004},
        schedule={"type": "cosine", "warmup_steps": 20, "total_steps": 675},
    )
    run = session.run(Samples({"input": seen}, seen_labels), BatchPlan(32, epochs=15), StepOptions(), 1)
    trained = summarize(run)
    run.finish()
    unseen = Samples({"input": held_out}, labels)
    judged = summarize(session.run(unseen, BatchPlan(32, epochs=1, shuffle=False), StepOptions("evaluate"), 2))

    assert trained.steps == 675
    assert judged.accuracy >= 0.97
    model = onnxruntime.InferenceSession(onnx_bytes(session.definition, session.spec, session.snapshot()))
    served = model.run(["output"], {"input": held_out})[0].argmax(1)
    assert float((served == labels).mean()) == judged.accuracy
