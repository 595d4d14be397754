"""ONNX operators that move elements and describe shapes. Shapes are int64 tensors on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from workers.training.operators.node import Node, Operator, aligned, host_integers

Builder = Callable[[Node], Operator]


def _reshape(node: Node) -> Operator:
    keep_zero = bool(node.attribute("allowzero", 0))

    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        wanted = host_integers(shape)
        if not keep_zero:
            wanted = [x.shape[axis] if side == 0 else side for axis, side in enumerate(wanted)]
        return x.reshape(wanted)

    return reshape


def _transpose(node: Node) -> Operator:
    order = node.attribute("perm")
    return lambda x: x.permute(list(order) if order is not None else list(reversed(range(x.dim()))))


def _flatten(node: Node) -> Operator:
    axis = node.attribute("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        split = axis if axis >= 0 else axis + x.dim()
        return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))

    return flatten


def _squeeze(node: Node) -> Operator:
    axes = node.integers(1, "axes", 13)

    def squeeze(x: Tensor, *_axes: Tensor) -> Tensor:
        if axes is None:
            return x.squeeze()
        gone = {axis % x.dim() for axis in axes} if x.dim() else set()
        return x.reshape([side for axis, side in enumerate(x.shape) if axis not in gone])

    return squeeze


def _unsqueeze(node: Node) -> Operator:
    axes = node.integers(1, "axes", 13) or []

    def unsqueeze(x: Tensor, *_axes: Tensor) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _concat(node: Node) -> Operator:
    axis = node.attribute("axis")
    return lambda *tensors: torch.cat(aligned(*tensors), dim=axis)


def _split(node: Node) -> Operator:
    axis = node.attribute("axis", 0)
    sizes = node.integers(1, "split", 13)
    parts = node.attribute("num_outputs", len(node.outputs))

    def split(x: Tensor, *_sizes: Tensor) -> Sequence[Tensor]:
        if sizes is not None:
            return torch.split(x, sizes, dim=axis)
        # The last part is the smaller one where the parts do not come out even.
        return torch.split(x, -(-x.shape[axis] // parts), dim=axis)

    return split


def _slice(node: Node) -> Operator:
    if node.opset < 10:
        starts, ends = node.attribute("starts"), node.attribute("ends")
        axes = node.attribute("axes")
        return lambda x: _sliced(x, starts, ends, axes, None)

    def slice_(x: Tensor, starts: Tensor, ends: Tensor, *axes_and_steps: Tensor | None) -> Tensor:
        described = [None if part is None else host_integers(part) for part in (*axes_and_steps, None, None)]
        return _sliced(x, host_integers(starts), host_integers(ends), described[0], described[1])

    return slice_


def _sliced(x: Tensor, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None) -> Tensor:
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[index] if axes is not None else index
        step = steps[index] if steps is not None else 1
        side = x.shape[axis]
        # Negative positions count from the end; then they are clamped, not quite as Python's slices are.
        lowest, highest = (0, side) if step > 0 else (-1, side - 1)
        first = min(max(start + side if start < 0 else start, 0), highest)
        last = min(max(end + side if end < 0 else end, lowest), highest)
        chosen = range(first, last, step)
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(first, max(first, last), step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64).to(x.device))
    return x


def _gather(node: Node) -> Operator:
    axis = node.attribute("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        where = indices.to(torch.int64)
        if where.dim() == 0 and where.device.type == "cpu":
            return x.select(axis, int(where))
        where = where.to(x.device)
        where = torch.where(where < 0, where + x.shape[axis], where)
        picked = x.index_select(axis, where.reshape(-1))
        at = axis % x.dim()
        return picked.reshape(*x.shape[:at], *where.shape, *x.shape[at + 1 :])

    return gather


def _gather_nd(node: Node) -> Operator:
    if node.attribute("batch_dims", 0):
        raise node.refuse("its batch_dims is not 0")

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        # The last axis of the indices holds one position for each of the first axes of x.
        return x[tuple(indices.to(x.device, torch.int64).unbind(-1))]

    return gather


def _shape(node: Node) -> Operator:
    start, end = node.attribute("start", 0), node.attribute("end")
    return lambda x: torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _expand(_node: Node) -> Operator:
    def expand(x: Tensor, shape: Tensor) -> Tensor:
        return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(host_integers(shape))))

    return expand


def _tile(_node: Node) -> Operator:
    return lambda x, repeats: x.repeat(host_integers(repeats))


def _constant_of_shape(node: Node) -> Operator:
    value = node.attribute("value")
    filled = torch.zeros(1) if value is None else torch.from_numpy(np.array(value))
    # Only integers and bools take part in shapes; floats are moved to the device by what uses them.
    return lambda shape: torch.full(host_integers(shape), filled.reshape(-1)[0].item(), dtype=filled.dtype)


def _range(_node: Node) -> Operator:
    def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)

    return range_


def _pad(node: Node) -> Operator:
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(node.attribute("mode", "constant"))
    if mode is None:
        raise node.refuse(f"mode {node.attribute('mode')!r}")
    if node.has(3):
        raise node.refuse("it names axes")
    pads = node.integers(1, "pads", 11) or []
    constant = node.attribute("value", 0.0) if node.opset < 11 else node.constant(2)
    value = 0.0 if constant is None else float(constant)
    rank = len(pads) // 2
    # ONNX lists all begins, then all ends; torch lists pairs, from the last axis on.
    pairs = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    while len(pairs) > 2 and pairs[-2:] == [0, 0]:
        pairs = pairs[:-2]
    if mode == "constant":
        return lambda x, *_rest: F.pad(x, pairs, value=value)
    return lambda x, *_rest: F.pad(x, pairs, mode=mode)


def _size(_node: Node) -> Operator:
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


def _cast_like(_node: Node) -> Operator:
    return lambda x, like: x.to(like.dtype)


OPERATORS: dict[str, Builder] = {
    "CastLike": _cast_like,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
