"""ONNX operators of neural networks: products, convolutions, normalizations, pooling, resizing.

Padding that torch's own argument cannot express (uneven, or larger than half a pooling window) is added beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from workers.training.onnx.operators.node import OnnxNode, Operator, aligned, host_integers

Builder = Callable[[OnnxNode], Operator]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _Window:
    """Kernel, strides, dilations and padding of a sliding window, as a node's attributes give them."""

    def __init__(self, node: OnnxNode, kernel: list[int]) -> None:
        rank = len(kernel)
        self.node, self.kernel, self.rank = node, kernel, rank
        self.strides = list(node.attribute("strides", [1] * rank))
        self.dilations = list(node.attribute("dilations", [1] * rank))
        self.pads = list(node.attribute("pads", [0] * 2 * rank))
        self.auto = node.attribute("auto_pad", "NOTSET")
        if self.auto == "VALID":
            self.pads, self.auto = [0] * 2 * rank, "NOTSET"
        if self.auto not in ("NOTSET", "SAME_UPPER", "SAME_LOWER"):
            raise node.refuse(f"auto_pad {self.auto!r}")

    def padding(self, x: Tensor) -> tuple[list[int], list[int]]:
        """(begins, ends) of the padding for the input `x`."""
        if self.auto == "NOTSET":
            return self.pads[: self.rank], self.pads[self.rank :]
        begins, ends = [], []
        for axis in range(self.rank):
            side, stride = x.shape[2 + axis], self.strides[axis]
            span = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            total = max(0, (-(-side // stride) - 1) * stride + span - side)
            small, large = total // 2, total - total // 2
            begins.append(small if self.auto == "SAME_UPPER" else large)
            ends.append(large if self.auto == "SAME_UPPER" else small)
        return begins, ends


def _pad_pairs(begins: list[int], ends: list[int]) -> list[int]:
    return [side for begin, end in zip(reversed(begins), reversed(ends), strict=True) for side in (begin, end)]


def _conv(node: OnnxNode) -> Operator:
    groups = node.attribute("group", 1)
    window: list[_Window] = []

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not window:
            window.append(_Window(node, list(weight.shape[2:])))
        begins, ends = window[0].padding(x)
        if begins != ends:
            x, begins = F.pad(x, _pad_pairs(begins, ends)), [0] * len(begins)
        convolve = _CONVOLUTIONS[window[0].rank]
        return convolve(x, weight, bias, window[0].strides, begins, window[0].dilations, groups)

    return conv


def _conv_transpose(node: OnnxNode) -> Operator:
    groups = node.attribute("group", 1)
    if node.attribute("output_shape") is not None or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise node.refuse("output_shape and auto_pad are not known for it")
    window: list[_Window] = []

    def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not window:
            window.append(_Window(node, list(weight.shape[2:])))
        view = window[0]
        begins, ends = view.padding(x)
        extra = list(node.attribute("output_padding", [0] * view.rank))
        # Uneven padding: cut the difference off the end of each axis.
        even = [min(begin, end) for begin, end in zip(begins, ends, strict=True)]
        y = _TRANSPOSED[view.rank](x, weight, bias, view.strides, even, extra, groups, view.dilations)
        for axis, (begin, end, cut) in enumerate(zip(begins, ends, even, strict=True)):
            y = y.narrow(2 + axis, begin - cut, y.shape[2 + axis] - (begin - cut) - (end - cut))
        return y

    return conv_transpose


def _gemm(node: OnnxNode) -> Operator:
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    flip_a, flip_b = node.attribute("transA", 0), node.attribute("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if flip_a else a
        if c is not None and alpha == beta == 1.0 and c.dim() == 1:
            return F.linear(a, b if flip_b else b.t(), c)
        product = a @ (b.t() if flip_b else b)
        product = product if alpha == 1.0 else product * alpha
        if c is None:
            return product
        return product + (c if beta == 1.0 else c * beta)

    return gemm


def _matmul(_node: OnnxNode) -> Operator:
    return lambda a, b: torch.matmul(*aligned(a, b))


def _einsum(node: OnnxNode) -> Operator:
    equation = node.attribute("equation").replace(" ", "")
    return lambda *tensors: torch.einsum(equation, *aligned(*tensors))


def _batch_normalization(node: OnnxNode) -> Operator:
    if len([name for name in node.outputs if name]) > 1:
        raise node.refuse("its training outputs are used")
    epsilon, momentum = node.attribute("epsilon", 1e-5), 1.0 - node.attribute("momentum", 0.9)

    def normalize(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(
            x, mean, variance, scale, bias, node.mode.training and not node.mode.frozen, momentum, epsilon
        )

    return normalize


def _layer_normalization(node: OnnxNode) -> Operator:
    if len([name for name in node.outputs if name]) > 1:
        raise node.refuse("its mean and deviation outputs are used")
    axis, epsilon = node.attribute("axis", -1), node.attribute("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = list(x.shape[axis:])
        if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
            return F.layer_norm(x, shape, scale, bias, epsilon)
        normal = F.layer_norm(x, shape, None, None, epsilon) * scale
        return normal if bias is None else normal + bias

    return normalize


def _instance_normalization(node: OnnxNode) -> Operator:
    epsilon = node.attribute("epsilon", 1e-5)
    return lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_normalization(node: OnnxNode) -> Operator:
    groups, epsilon = node.attribute("num_groups"), node.attribute("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if scale.shape[0] != x.shape[1]:  # before opset 21 one scale for each group
            scale, bias = (part.repeat_interleave(x.shape[1] // groups) for part in (scale, bias))
        return F.group_norm(x, groups, scale, bias, epsilon)

    return normalize


def _max_pool(node: OnnxNode) -> Operator:
    if len([name for name in node.outputs if name]) > 1:
        raise node.refuse("its indices are used")
    window = _Window(node, list(node.attribute("kernel_shape")))
    ceil = bool(node.attribute("ceil_mode", 0))

    def pool(x: Tensor) -> Tensor:
        begins, ends = window.padding(x)
        if begins != ends or any(2 * begin > side for begin, side in zip(begins, window.kernel, strict=True)):
            x, begins = F.pad(x, _pad_pairs(begins, ends), value=float("-inf")), [0] * window.rank
        return _MAX_POOLS[window.rank](x, window.kernel, window.strides, begins, window.dilations, ceil)

    return pool


def _average_pool(node: OnnxNode) -> Operator:
    window = _Window(node, list(node.attribute("kernel_shape")))
    if any(side != 1 for side in window.dilations):
        raise node.refuse("its dilations are not 1")
    ceil, with_padding = bool(node.attribute("ceil_mode", 0)), bool(node.attribute("count_include_pad", 0))
    average = _AVERAGE_POOLS[window.rank]

    def pool(x: Tensor) -> Tensor:
        begins, ends = window.padding(x)
        even = begins == ends and all(2 * begin <= side for begin, side in zip(begins, window.kernel, strict=True))
        if even:
            return average(x, window.kernel, window.strides, begins, ceil, with_padding)
        pairs = _pad_pairs(begins, ends)
        total = average(F.pad(x, pairs), window.kernel, window.strides, 0, ceil)
        if with_padding:
            return total
        share = average(F.pad(torch.ones_like(x), pairs), window.kernel, window.strides, 0, ceil)
        return total / share

    return pool


def _global_average_pool(_node: OnnxNode) -> Operator:
    return lambda x: x.mean(dim=list(range(2, x.dim())), keepdim=True)


def _global_max_pool(_node: OnnxNode) -> Operator:
    return lambda x: x.amax(dim=list(range(2, x.dim())), keepdim=True)


def _resize(node: OnnxNode) -> Operator:
    mode = node.attribute("mode", "nearest")
    if node.opset < 11:
        raise node.refuse("Resize before opset 11")
    place = node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if node.attribute("antialias", 0) or node.attribute("axes") is not None:
        raise node.refuse("antialias and axes are not known for it")
    by_sizes = node.has(3)
    constant = None if by_sizes else node.constant(2)
    scales = [] if constant is None else [float(scale) for scale in constant.reshape(-1)]
    if (scales or [1, 1])[:2] != [1, 1]:
        raise node.refuse("it resizes the batch or the channels")
    whole = not by_sizes and all(scale >= 1 and scale == int(scale) for scale in scales)
    nearest = mode == "nearest" and (
        (place == "asymmetric" and rounding == "floor") or (place == "half_pixel" and whole)
    )
    linear = mode == "linear" and place in ("half_pixel", "pytorch_half_pixel", "align_corners")
    if not nearest and not linear:
        raise node.refuse(f"mode {mode!r} with coordinates {place!r} and rounding {rounding!r}")
    corners = place == "align_corners" if linear else None

    def resize(x: Tensor, *rest: Tensor | None) -> Tensor:
        way = "nearest" if nearest else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
        if not by_sizes:
            return F.interpolate(x, scale_factor=scales[2:], mode=way, align_corners=corners)
        assert rest[2] is not None
        # The batch's side is among them, so exporters compute them from the input's shape.
        sizes = host_integers(rest[2])
        if sizes[:2] != list(x.shape[:2]):
            raise ValueError(f"Resize of {list(x.shape)} to {sizes}: the batch and the channels cannot be resized")
        return F.interpolate(x, size=sizes[2:], mode=way, align_corners=corners)

    return resize


OPERATORS: dict[str, Builder] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Resize": _resize,
}
