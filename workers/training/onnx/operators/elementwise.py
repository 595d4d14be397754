"""ONNX operators that work element by element: arithmetic, comparison, activation, casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from workers.training.onnx.operators.node import DTYPES, OnnxNode, Operator, aligned

Builder = Callable[[OnnxNode], Operator]


def _unary(function: Callable[[Tensor], Tensor]) -> Builder:
    return lambda _node: function


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    return lambda _node: lambda a, b: function(*aligned(a, b))


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    return lambda _node: lambda *tensors: reduce(function, aligned(*tensors))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    # Integers divide as in C, towards zero.
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(node: OnnxNode) -> Operator:
    constant = node.constants.get(node.inputs[1])
    if constant is not None and constant.size == 1:
        exponent = constant.item()
        # A square is a product: its derivative at 0 and its speed are those of x * x.
        return (lambda a, _b: a * a) if exponent == 2 else lambda a, _b: a.pow(exponent).to(a.dtype)
    return lambda a, b: torch.pow(*aligned(a, b)).to(a.dtype)


def _clip_by_tensors(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bounds = [None if bound is None else aligned(x, bound)[1] for bound in (low, high)]
    return x if bounds == [None, None] else torch.clamp(x, min=bounds[0], max=bounds[1])


def _clip(node: OnnxNode) -> Operator:
    if node.opset < 11:
        low, high = node.attribute("min"), node.attribute("max")
    else:
        if any(node.has(index) and node.inputs[index] not in node.constants for index in (1, 2)):
            return _clip_by_tensors
        bounds = [node.constant(1), node.constant(2)]
        low, high = (None if bound is None else bound.item() for bound in bounds)
    if low is None and high is None:
        return lambda x, *_bounds: x
    return lambda x, *_bounds: torch.clamp(x, min=low, max=high)


def _gelu(node: OnnxNode) -> Operator:
    approximate = node.attribute("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def _hard_sigmoid(node: OnnxNode) -> Operator:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    return lambda x: torch.clamp(x * alpha + beta, 0, 1)


def _leaky_relu(node: OnnxNode) -> Operator:
    alpha = node.attribute("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


def _elu(node: OnnxNode) -> Operator:
    alpha = node.attribute("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def _celu(node: OnnxNode) -> Operator:
    alpha = node.attribute("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def _selu(node: OnnxNode) -> Operator:
    alpha, gamma = node.attribute("alpha", 1.6732632423543772), node.attribute("gamma", 1.0507009873554805)
    return lambda x: gamma * (torch.clamp(x, min=0) + torch.clamp(alpha * torch.expm1(x), max=0))


def _thresholded_relu(node: OnnxNode) -> Operator:
    alpha = node.attribute("alpha", 1.0)
    return lambda x: F.threshold(x, alpha, 0.0)


def _shrink(node: OnnxNode) -> Operator:
    limit, bias = node.attribute("lambd", 0.5), node.attribute("bias", 0.0)
    return lambda x: torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


def _mod(node: OnnxNode) -> Operator:
    # fmod takes the sign of the dividend, mod that of the divisor.
    function = torch.fmod if node.attribute("fmod", 0) else torch.remainder
    return lambda a, b: function(*aligned(a, b))


def _is_infinite(node: OnnxNode) -> Operator:
    up, down = bool(node.attribute("detect_positive", 1)), bool(node.attribute("detect_negative", 1))
    return lambda x: torch.isinf(x) & (((x > 0) & up) | ((x < 0) & down))


def _prelu(_node: OnnxNode) -> Operator:
    def prelu(x: Tensor, slope: Tensor) -> Tensor:
        x, slope = aligned(x, slope)
        return torch.where(x >= 0, x, x * slope)

    return prelu


def _cast(node: OnnxNode) -> Operator:
    wanted = node.attribute("to")
    if wanted not in DTYPES:
        raise node.refuse(f"it casts to ONNX type {wanted}, which torch does not have")
    dtype = DTYPES[wanted]
    return lambda x: x.to(dtype)


def _dropout(node: OnnxNode) -> Operator:
    ratio = node.attribute("ratio", 0.5)
    if node.opset >= 12:
        constant = node.constant(1)
        ratio = 0.5 if constant is None else constant.item()

    def dropout(x: Tensor, *_ratio_and_mode: object) -> tuple[Tensor, ...]:
        kept = F.dropout(x, ratio, node.mode.training)
        return (kept, kept != 0) if len(node.outputs) > 1 else (kept,)

    return dropout


def _where(_node: OnnxNode) -> Operator:
    return lambda condition, a, b: torch.where(*aligned(condition, a, b))


def _mean(_node: OnnxNode) -> Operator:
    return lambda *tensors: reduce(torch.add, aligned(*tensors)) / len(tensors)


OPERATORS: dict[str, Builder] = {
    "Abs": _unary(torch.abs),
    "Acos": _unary(torch.acos),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": _unary(torch.asin),
    "Atan": _unary(torch.atan),
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Cosh": _unary(torch.cosh),
    "Div": _binary(_divide),
    "Dropout": _dropout,
    "Elu": _elu,
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "IsInf": _is_infinite,
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": _leaky_relu,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "Max": _many(torch.maximum),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mish": _unary(F.mish),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sinh": _unary(torch.sinh),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _many(torch.add),
    "Tanh": _unary(torch.tanh),
    "Tan": _unary(torch.tan),
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
    "Xor": _binary(torch.logical_xor),
}
