"""A list of layers as a torch module. The list has passed the table of `device_operations.requests.layers`.

Nothing but the classes named here is ever built, with arguments that the table has checked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from device_operations.errors import failure
from device_operations.requests.layers import canonical
from workers.training.memory import is_out_of_memory

#: A layer's description: its type and its arguments, as a request gives them, checked.
Layer: TypeAlias = dict[str, Any]


class Residual(nn.Sequential):
    """x + layers(x); the layers must keep the shape."""

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = super().forward(x)
        if inner.shape != x.shape:
            raise ValueError(f"residual: its layers turn shape {list(x.shape)} into {list(inner.shape)}")
        return x + inner


class Parallel(nn.Module):
    """Each layer on the same input; the results concatenated along `dim`, or added."""

    def __init__(self, branches: OrderedDict[str, nn.Module], merge: str, dim: int) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)
        self._merge, self._dim = merge, dim

    def forward(self, x: Tensor) -> Tensor:
        results: list[Tensor] = [branch(x) for branch in self.children()]
        if self._merge == "concat":
            return torch.cat(results, dim=self._dim)
        shapes = {tuple(result.shape) for result in results}
        if len(shapes) > 1:
            raise ValueError(f"parallel: its layers give different shapes {sorted(shapes)}, which cannot be added")
        total = results[0]
        for result in results[1:]:
            total = total + result
        return total


class _Recurrent(nn.Module):
    """An LSTM or GRU whose result is the sequence (batch, steps, features), or its last step (batch, features)."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], arguments: Layer) -> None:
        super().__init__()
        self._last = arguments.pop("output", "sequence") == "last"
        self.cells = kind(**{**arguments, "batch_first": True})

    def forward(self, x: Tensor) -> Tensor:
        sequence: Tensor = self.cells(x)[0]
        return sequence[:, -1] if self._last else sequence


class _SelfAttention(nn.Module):
    """Multi-head attention of a sequence (batch, steps, embed_dim) on itself."""

    def __init__(self, arguments: Layer) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(**{**arguments, "batch_first": True})

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


def build_layers(layers: list[Layer]) -> nn.Module:
    """The module that runs `layers` in order, with torch's own initial weights from its global random state.

    Build it under `torch.device("meta")` to count parameters and try shapes without taking memory.
    Raises `validation_failed` naming the layer that does not fit.
    """
    try:
        checked = canonical(layers)
    except ValueError as error:
        raise failure("validation_failed", str(error)) from error
    return _sequence(checked, "layers", nn.Sequential)


def index_limit(layers: list[Layer]) -> int | None:
    """How many rows the embedding has that reads the input first; None where the input is not a tensor of indices."""
    for layer in layers:
        if layer["type"] == "embedding":
            return int(layer["num_embeddings"])
        if layer["type"] in ("sequential", "residual"):
            found = index_limit(layer["layers"])
        elif layer["type"] == "parallel":
            limits = [limit for branch in layer["layers"] if (limit := index_limit([branch])) is not None]
            found = min(limits) if limits else None
        elif layer["type"] in ("identity", "flatten", "unflatten"):
            continue
        else:
            return None
        if found is not None:
            return found
    return None


def _sequence(layers: list[Layer], where: str, kind: type[nn.Sequential]) -> nn.Sequential:
    try:
        return kind(_named(layers, where))
    except KeyError as error:
        raise failure("validation_failed", f"{where}: a layer cannot have this name: {error.args[0]}") from error


def _named(layers: list[Layer], where: str) -> OrderedDict[str, nn.Module]:
    names = [layer.get("name", str(index)) for index, layer in enumerate(layers)]
    return OrderedDict((name, _build(layer, f"{where}.{name}")) for name, layer in zip(names, layers, strict=True))


def _build(layer: Layer, where: str) -> nn.Module:
    kind = layer["type"]
    arguments = {key: _argument(value) for key, value in layer.items() if key not in ("type", "name", "layers")}
    try:
        if kind == "sequential":
            return _sequence(layer["layers"], where, nn.Sequential)
        if kind == "residual":
            return _sequence(layer["layers"], where, Residual)
        if kind == "parallel":
            branches = _named(layer["layers"], where)
            return Parallel(branches, arguments.get("merge", "concat"), arguments.get("dim", 1))
        if kind in ("lstm", "gru"):
            return _Recurrent(nn.LSTM if kind == "lstm" else nn.GRU, arguments)
        if kind == "multihead_attention":
            return _SelfAttention(arguments)
        return _CLASSES[kind](**arguments)
    except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:300]
        raise failure("validation_failed", f"{where} ({kind}) cannot be built: {reason}") from error


def _argument(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


#: torch's class for each type that is one class with its arguments as they stand.
_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "batch_norm1d": nn.BatchNorm1d,
    "batch_norm2d": nn.BatchNorm2d,
    "layer_norm": nn.LayerNorm,
    "group_norm": nn.GroupNorm,
    "embedding": nn.Embedding,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh,
    "prelu": nn.PReLU,
    "log_sigmoid": nn.LogSigmoid,
    "softmax": nn.Softmax,
    "log_softmax": nn.LogSoftmax,
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "max_pool1d": nn.MaxPool1d,
    "max_pool2d": nn.MaxPool2d,
    "avg_pool1d": nn.AvgPool1d,
    "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool1d": nn.AdaptiveAvgPool1d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "adaptive_max_pool1d": nn.AdaptiveMaxPool1d,
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d,
    "flatten": nn.Flatten,
    "unflatten": nn.Unflatten,
    "identity": nn.Identity,
}
