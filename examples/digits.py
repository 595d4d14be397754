"""Handwritten digits as training takes them, and a small convolutional network for them.

The 1,797 pictures come with scikit-learn: 8 by 8 pixels, ten classes. The last 360 are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Pictures that training never sees.
HELD_OUT = 360

LAYERS: list[dict[str, Any]] = [
    {"type": "conv2d", "name": "conv1", "in_channels": 1, "out_channels": 16, "kernel_size": 3, "padding": 1},
    {"type": "relu"},
    {"type": "conv2d", "name": "conv2", "in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1},
    {"type": "relu"},
    {"type": "max_pool2d", "kernel_size": 2},
    {"type": "flatten"},
    {"type": "dropout", "p": 0.2},
    {"type": "linear", "name": "fc1", "in_features": 512, "out_features": 64},
    {"type": "relu"},
    {"type": "linear", "name": "fc2", "in_features": 64, "out_features": 10},
]


@dataclass(frozen=True, slots=True)
class Digits:
    """`images` float32 [count, 1, 8, 8] from 0 to 1, `labels` int64 [count]."""

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    def as_tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """As a dataset's file names them: the network's input, and the targets."""
        return {"input": self.images, "targets": self.labels}


def load() -> tuple[Digits, Digits]:
    """(for training, held out), shuffled once, the same each time."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    images = (found.images[order, None] / 16).astype(np.float32)
    labels = found.target[order].astype(np.int64)
    return Digits(images[:-HELD_OUT], labels[:-HELD_OUT]), Digits(images[-HELD_OUT:], labels[-HELD_OUT:])
