"""ONNX operators that move elements and describe shapes. Shapes are int64 tensors on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from workers.training.onnx.operators.node import OnnxNode, Operator, aligned, host_integers

Builder = Callable[[OnnxNode], Operator]


def _reshape(node: OnnxNode) -> Operator:
    keep_zero = bool(node.attribute("allowzero", 0))

    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        wanted = host_integers(shape)
        if not keep_zero:
            wanted = [x.shape[axis] if side == 0 else side for axis, side in enumerate(wanted)]
        return x.reshape(wanted)

    return reshape


def _transpose(node: OnnxNode) -> Operator:
    order = node.attribute("perm")
    return lambda x: x.permute(list(order) if order is not None else list(reversed(range(x.dim()))))


def _flatten(node: OnnxNode) -> Operator:
    axis = node.attribute("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        split = axis if axis >= 0 else axis + x.dim()
        return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))

    return flatten


def _squeeze(node: OnnxNode) -> Operator:
    axes = node.integers(1, "axes", 13)

    def squeeze(x: Tensor, *_axes: Tensor) -> Tensor:
        if axes is None:
            return x.squeeze()
        gone = {axis % x.dim() for axis in axes} if x.dim() else set()
        return x.reshape([side for axis, side in enumerate(x.shape) if axis not in gone])

    return squeeze


def _unsqueeze(node: OnnxNode) -> Operator:
    axes = node.integers(1, "axes", 13) or []

    def unsqueeze(x: Tensor, *_axes: Tensor) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _concat(node: OnnxNode) -> Operator:
    axis = node.attribute("axis")
    return lambda *tensors: torch.cat(aligned(*tensors), dim=axis)


def _split(node: OnnxNode) -> Operator:
    axis = node.attribute("axis", 0)
    sizes = node.integers(1, "split", 13)
    parts = node.attribute("num_outputs", len(node.outputs))

    def split(x: Tensor, *_sizes: Tensor) -> Sequence[Tensor]:
        if sizes is not None:
            return torch.split(x, sizes, dim=axis)
        # The last part is the smaller one where the parts do not come out even.
        return torch.split(x, -(-x.shape[axis] // parts), dim=axis)

    return split


def _split_to_sequence(node: OnnxNode) -> Operator:
    axis, keep = node.attribute("axis", 0), bool(node.attribute("keepdims", 1))

    def split(x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
        if sizes is None:
            return [x.split(1, dim=axis) if keep else x.unbind(axis)]  # type: ignore[list-item] # one value: a sequence
        wanted = host_integers(sizes)
        return [x.split(wanted if sizes.dim() else wanted[0], dim=axis)]

    return split


def _sequence_at(_node: OnnxNode) -> Operator:
    return lambda sequence, position: sequence[int(position)]


def _slice(node: OnnxNode) -> Operator:
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


def _gather(node: OnnxNode) -> Operator:
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


def _gather_nd(node: OnnxNode) -> Operator:
    if node.attribute("batch_dims", 0):
        raise node.refuse("its batch_dims is not 0")

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        # The last axis of the indices holds one position for each of the first axes of x.
        return x[tuple(indices.to(x.device, torch.int64).unbind(-1))]

    return gather


def _shape(node: OnnxNode) -> Operator:
    start, end = node.attribute("start", 0), node.attribute("end")
    return lambda x: torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _expand(_node: OnnxNode) -> Operator:
    def expand(x: Tensor, shape: Tensor) -> Tensor:
        return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(host_integers(shape))))

    return expand


def _tile(_node: OnnxNode) -> Operator:
    return lambda x, repeats: x.repeat(host_integers(repeats))


def _constant_of_shape(node: OnnxNode) -> Operator:
    value = node.attribute("value")
    filled = torch.zeros(1) if value is None else torch.from_numpy(np.array(value))
    # Only integers and bools take part in shapes; floats are moved to the device by what uses them.
    return lambda shape: torch.full(host_integers(shape), filled.reshape(-1)[0].item(), dtype=filled.dtype)


def _range(_node: OnnxNode) -> Operator:
    def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)

    return range_


def _pad(node: OnnxNode) -> Operator:
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


def _size(_node: OnnxNode) -> Operator:
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


def _cast_like(_node: OnnxNode) -> Operator:
    return lambda x, like: x.to(like.dtype)


def _trilu(node: OnnxNode) -> Operator:
    cut = torch.triu if node.attribute("upper", 1) else torch.tril

    def trilu(x: Tensor, diagonal: Tensor | None = None) -> Tensor:
        return cut(x, 0 if diagonal is None else int(diagonal))

    return trilu


def _gather_elements(node: OnnxNode) -> Operator:
    axis = node.attribute("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        where = indices.to(x.device, torch.int64)
        return torch.gather(x, axis, torch.where(where < 0, where + x.shape[axis], where))

    return gather


def _cumulative_sum(node: OnnxNode) -> Operator:
    if node.attribute("exclusive", 0) or node.attribute("reverse", 0):
        raise node.refuse("it is exclusive or runs in reverse")
    return lambda x, axis: torch.cumsum(x, dim=int(axis))


def _scatter_nd(node: OnnxNode) -> Operator:
    if node.attribute("reduction", "none") not in ("none", "add"):
        raise node.refuse(f"reduction {node.attribute('reduction')!r}")
    adds = node.attribute("reduction", "none") == "add"

    def scatter(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        where = tuple(part.to(x.device, torch.int64) for part in indices.unbind(-1))
        return x.index_put(where, aligned(x, updates)[1], accumulate=adds)

    return scatter


def _depth_to_space(node: OnnxNode) -> Operator:
    block, mode = node.attribute("blocksize"), node.attribute("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise node.refuse(f"mode {mode!r}")

    def spread(x: Tensor) -> Tensor:
        rows, depth, height, width = x.shape
        inner = depth // block**2
        if mode == "CRD":
            parts = x.reshape(rows, inner, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
        else:
            parts = x.reshape(rows, block, block, inner, height, width).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(rows, inner, height * block, width * block)

    return spread


def _space_to_depth(node: OnnxNode) -> Operator:
    block = node.attribute("blocksize")

    def gather(x: Tensor) -> Tensor:
        rows, depth, height, width = x.shape
        parts = x.reshape(rows, depth, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(rows, depth * block**2, height // block, width // block)

    return gather


OPERATORS: dict[str, Builder] = {
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "CastLike": _cast_like,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative_sum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "SequenceAt": _sequence_at,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
