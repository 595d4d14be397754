"""From the vectors of tokens to one vector a text, and from that to one of length 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from workers.pipelines.text.layout import Pooling

Array = np.ndarray[Any, Any]

#: What sentence-transformers divides by at least, so that nothing is divided by 0.
LEAST_COUNT, LEAST_LENGTH = 1e-9, 1e-12


def pool(tokens: Array, mask: Array, pooling: Pooling) -> Array:
    """One vector a row, float32 [rows, width], of `tokens` [rows, tokens, width].

    `mask` [rows, tokens] has 1 for a token and 0 for padding, which stands at the end.
    """
    if pooling is Pooling.CLS:
        return tokens[:, 0].astype(np.float32)
    weights = mask.astype(np.float32)
    summed = np.matmul(weights[:, None, :], tokens.astype(np.float32, copy=False))[:, 0]
    return np.asarray(summed / np.maximum(weights.sum(axis=1, keepdims=True), LEAST_COUNT), np.float32)


def normalized(vectors: Array) -> Array:
    """Each row [rows, width] divided by its length; a row of zeros stays one."""
    lengths = np.sqrt(np.square(vectors).sum(axis=-1, keepdims=True))
    return np.asarray(vectors / np.maximum(lengths, LEAST_LENGTH), np.float32)
