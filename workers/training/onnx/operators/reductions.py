"""ONNX operators that reduce along axes: means, sums, extremes, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workers.training.onnx.operators.node import OnnxNode, Operator

Builder = Callable[[OnnxNode], Operator]


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor], since: int) -> Builder:
    """A reduction whose `axes` are an attribute before opset `since` and an input from then on."""

    def build(node: OnnxNode) -> Operator:
        axes = node.integers(1, "axes", since)
        keep = bool(node.attribute("keepdims", 1))
        if not axes and node.attribute("noop_with_empty_axes", 0):
            return lambda x, *_axes: x
        return lambda x, *_axes: function(x, axes or list(range(x.dim())), keep)

    return build


def _softmax(function: Callable[..., Tensor]) -> Builder:
    def build(node: OnnxNode) -> Operator:
        if node.opset >= 13:
            axis = node.attribute("axis", -1)
            return lambda x: function(x, dim=axis)
        # Before opset 13 everything from `axis` on is one axis.
        first = node.attribute("axis", 1)

        def flattened(x: Tensor) -> Tensor:
            if first in (-1, x.dim() - 1):
                return function(x, dim=-1)
            start = first if first >= 0 else first + x.dim()
            return function(x.flatten(start), dim=-1).reshape(x.shape)

        return flattened

    return build


def _arg_max(node: OnnxNode) -> Operator:
    if node.attribute("select_last_index", 0):
        raise node.refuse("select_last_index is set")
    axis, keep = node.attribute("axis", 0), bool(node.attribute("keepdims", 1))
    return lambda x: torch.argmax(x, dim=axis, keepdim=keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
    return norm


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, dim=axes, keepdim=keep)


def _square_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return (x * x).sum(dim=axes, keepdim=keep)


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.abs().sum(dim=axes, keepdim=keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


def _each(function: Callable[..., Any]) -> Callable[[Tensor, list[int], bool], Tensor]:
    return lambda x, axes, keep: function(x, dim=axes, keepdim=keep)


OPERATORS: dict[str, Builder] = {
    "ArgMax": _arg_max,
    "LogSoftmax": _softmax(torch.log_softmax),
    "ReduceL1": _reduction(_l1, 18),
    "ReduceL2": _reduction(_l2, 18),
    "ReduceLogSumExp": _reduction(_log_sum_exp, 18),
    "ReduceMax": _reduction(_each(torch.amax), 18),
    "ReduceMean": _reduction(_each(torch.mean), 18),
    "ReduceMin": _reduction(_each(torch.amin), 18),
    "ReduceProd": _reduction(_product, 18),
    "ReduceSum": _reduction(_each(torch.sum), 13),
    "ReduceSumSquare": _reduction(_square_sum, 18),
    "Softmax": _softmax(torch.softmax),
}
