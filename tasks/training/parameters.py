"""How many parameters a list of layers has, counted from its JSON: what a session reserves before it is built."""

from __future__ import annotations

import math

from device_operations.wire.json_types import FreeJson


def count_parameters(layers: list[FreeJson]) -> int:
    """Parameters of checked layers, nested ones too. An estimate: the worker measures what it has built."""
    return sum(_count(layer) + count_parameters(layer.get("layers", [])) for layer in layers)


def _count(layer: FreeJson) -> int:
    kind = layer["type"]
    bias = 1 if layer.get("bias", True) else 0
    if kind == "linear":
        return int(layer["out_features"] * (layer["in_features"] + bias))
    if kind in ("conv1d", "conv2d"):
        size = layer["kernel_size"]
        kernel = math.prod(size) if isinstance(size, list) else size ** int(kind[4])
        return int(layer["out_channels"] * (layer["in_channels"] // layer.get("groups", 1) * kernel + bias))
    if kind == "embedding":
        return int(layer["num_embeddings"] * layer["embedding_dim"])
    if kind in ("lstm", "gru"):
        return _recurrent(layer, gates=4 if kind == "lstm" else 3, biases=2 * bias)
    if kind == "multihead_attention":
        return int(4 * layer["embed_dim"] * (layer["embed_dim"] + bias))
    if kind == "layer_norm":
        shape = layer["normalized_shape"]
        return 2 * (math.prod(shape) if isinstance(shape, list) else int(shape))
    return int(2 * (layer.get("num_features") or layer.get("num_channels") or 0))


def _recurrent(layer: FreeJson, gates: int, biases: int) -> int:
    hidden, directions = layer["hidden_size"], 2 if layer.get("bidirectional") else 1
    total = 0
    for index in range(layer.get("num_layers", 1)):
        given = layer["input_size"] if index == 0 else hidden * directions
        total += directions * gates * hidden * (given + hidden + biases)
    return total
