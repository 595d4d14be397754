"""Convolutions, pools, resizes and what else reads images or signals: the batch is their first axis."""

from __future__ import annotations

from workers.rows.node import Answer, Node, rule
from workers.rows.operators.reductions import along
from workers.rows.operators.sequences import batched
from workers.rows.operators.shapes import refusal
from workers.rows.sizes import Dim, Size, of_rows, opaque_side, over, times
from workers.rows.values import FREE, ROWS, Shape, Value, items_of, known, whole


def spatial(node: Node, shape: Shape | None, kernel: tuple[Dim, ...] | None) -> list[Dim]:
    """The sides behind batch and channels after a convolution or pool; those that cannot be computed are symbols."""
    if shape is None:
        return []
    sides: list[Dim] = []
    count = len(shape) - 2
    strides, dilations = node.numbers("strides") or [1] * count, node.numbers("dilations") or [1] * count
    pads, automatic = node.numbers("pads") or [0] * (2 * count), node.text("auto_pad", "NOTSET")
    for index, side in enumerate(shape[2:]):
        window = kernel[index] if kernel is not None and index < len(kernel) else None
        if not isinstance(side, int) or not isinstance(window, int) or automatic != "NOTSET":
            sides.append(opaque_side())
            continue
        room = side + pads[index] + pads[index + count] - dilations[index] * (window - 1) - 1
        sides.append(opaque_side() if node.number("ceil_mode", 0) else room // strides[index] + 1)
    return sides


@rule("Conv", "ConvInteger", "QLinearConv")
def _conv(node: Node) -> Answer:
    at = 3 if node.operator == "QLinearConv" else 1
    weight, value = node.input(at), node.first
    kernel = weight.shape[2:] if weight is not None and weight.shape is not None else None
    channels = weight.shape[0] if weight is not None and weight.shape is not None else opaque_side()
    shape = None if value.shape is None else (*value.shape[:1], channels, *spatial(node, value.shape, kernel))
    return batched(node, {0: 0}, list(range(1, len(node.inputs))), [(shape, 0)])


@rule("ConvTranspose")
def _conv_transpose(node: Node) -> Answer:
    weight, value = node.input(1), node.first
    channels: Dim = opaque_side()
    if weight is not None and weight.shape is not None:
        channels = times(weight.shape[1], node.number("group", 1))
    shape = None if value.shape is None else (1, channels, *(opaque_side() for _ in value.shape[2:]))
    return batched(node, {0: 0}, [1, 2], [(shape, 0)])


@rule("AveragePool", "LpPool", "MaxPool")
def _pool(node: Node) -> Answer:
    value = node.first
    kernel = node.numbers("kernel_shape")
    shape = None if value.shape is None else (*value.shape[:2], *spatial(node, value.shape, tuple(kernel or ())))
    found = _per_channel(node, shape)
    # Where a largest value lies is counted through the whole tensor.
    return [found, node.mixed("its indices count through all rows")] if len(node.proto.output) > 1 else found


@rule("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool")
def _global_pool(node: Node) -> Value:
    shape = node.first.shape
    return _per_channel(node, None if shape is None else (*shape[:2], *(1 for _ in shape[2:])))


def _per_channel(node: Node, shape: Shape | None) -> Value:
    value = node.first
    if value.axis > 1:
        return node.mixed("it works along the rows")
    if value.kind is FREE or shape is None:
        return node.give(shape)
    return node.give(shape, value.axis, value.outer)


@rule("DepthToSpace", "SpaceToDepth")
def _blocks(node: Node) -> Answer:
    shape, size = node.first.shape, node.number("blocksize", 1)
    if shape is None or len(shape) != 4:
        return batched(node, {0: 0}, [], [(shape, 0)])
    if node.operator == "DepthToSpace":
        channels = over(shape[1], size * size) or opaque_side()
        sides = [times(side, size) for side in shape[2:]]
    else:
        channels = times(shape[1], size * size)
        sides = [over(side, size) or opaque_side() for side in shape[2:]]
    return batched(node, {0: 0}, [], [((shape[0], channels, *sides), 0)])


@rule("DeformConv")
def _deform_conv(node: Node) -> Answer:
    weight, value = node.input(1), node.first
    known_shapes = weight is not None and weight.shape is not None and value.shape is not None
    shape = (1, weight.shape[0], *(opaque_side() for _ in value.shape[2:])) if known_shapes else None  # type: ignore[union-attr,index]
    return batched(node, {0: 0, 2: 0, 4: 0}, [1, 3], [(shape, 0)])


@rule("GridSample")
def _grid_sample(node: Node) -> Answer:
    value, grid = node.first, node.input(1)
    shape = None
    if grid is not None and grid.shape is not None and value.shape is not None:
        shape = (*value.shape[:2], *grid.shape[1:-1])
    return batched(node, {0: 0, 1: 0}, [], [(shape, 0)])


@rule("AffineGrid", all_kinds=True)
def _affine_grid(node: Node) -> Answer:
    refused = refusal(node, arguments=(1,))
    if refused is not None:
        return refused
    theta, size = node.first, whole(node.input(1))
    if theta.kind is FREE and node.free(1):
        return node.give(None if size is None else (size[0], *size[2:], len(size) - 2))
    if size is None or theta.shape is None or size[0] != theta.shape[0]:
        return node.unknown("its size is not that of the rows for certain")
    return batched(node, {0: 0}, [], [((size[0], *size[2:], len(size) - 2), 0)])


@rule("Col2Im")
def _col2im(node: Node) -> Answer:
    image, value = whole(node.input(1)), node.first
    if image is None or value.shape is None:
        return node.give(None) if value.kind is FREE else node.unknown("its shape is not known")
    return batched(node, {0: 0}, [1, 2], [((1, opaque_side(), *image), 0)])


@rule("MaxUnpool")
def _max_unpool(node: Node) -> Value:
    return node.give(None) if node.free(0, 1, 2) else node.mixed("its indices count through all rows")


@rule("RoiAlign", "MaxRoiPool")
def _regions(node: Node) -> Value:
    """Regions of all rows in one list, each with the number of its row."""
    return node.give(None) if node.free(0, 1, 2) else node.mixed("its regions pick among the rows")


# ---- resizes


@rule("Resize", "Upsample", all_kinds=True)
def _resize(node: Node) -> Value:
    refused = refusal(node, arguments=(1, 2, 3))
    if refused is not None:
        return refused
    value = node.first
    if value.shape is None:
        return node.give(None)
    if node.operator == "Upsample":
        factors = node.attribute("scales")
        scales = tuple(factors.floats) if factors is not None else items_of(node.input(1))
        sizes = None
    elif node.version < 11:
        scales, sizes = items_of(node.input(1)), None
    else:
        scales, sizes = items_of(node.input(2)), whole(node.input(3))
    axes = node.numbers("axes")
    places = list(range(len(value.shape))) if axes is None else [axis % len(value.shape) for axis in axes]
    shape, uncertain = list(value.shape), True
    for index, axis in enumerate(places):
        size = sizes[index] if sizes and index < len(sizes) else None
        scale = scales[index] if scales and index < len(scales) else None
        if size is not None:
            shape[axis] = size
        elif scale != 1:
            shape[axis] = opaque_side()
        if axis == value.axis:
            uncertain = (
                isinstance(size, Size) and not of_rows(size) if size is not None else not isinstance(scale, float)
            )
    if value.kind is FREE:
        return node.mixed("it is sized by the rows") if any(map(of_rows, shape)) else node.give(tuple(shape))
    if node.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return node.unknown("it crops, maybe along the rows")
    if node.text("keep_aspect_ratio_policy", "stretch") != "stretch" and value.axis in places:
        return node.unknown("it may scale along the rows")
    if shape[value.axis] != value.shape[value.axis]:
        if uncertain:
            return node.unknown("it is not certain that it leaves the rows' axis as it is")
        return node.mixed("it scales along the rows")
    return node.give(tuple(shape), value.axis, value.outer)


@rule("CenterCropPad", all_kinds=True)
def _center_crop_pad(node: Node) -> Value:
    refused = refusal(node, arguments=(1,))
    if refused is not None:
        return refused
    value, asked = node.first, whole(node.input(1))
    if value.shape is None or asked is None:
        return node.give(None) if value.kind is FREE else node.unknown("its size is not known")
    axes = node.numbers("axes") or list(range(len(value.shape)))
    shape = list(value.shape)
    for axis, side in zip(axes, asked, strict=False):
        shape[axis % len(shape)] = side
    if value.kind is ROWS and shape[value.axis] != value.shape[value.axis]:
        return node.mixed("it cuts or fills along the rows")
    return node.give(tuple(shape), value.axis, value.outer)


# ---- signals


@rule("DFT")
def _dft(node: Node) -> Value:
    value = node.first
    if value.shape is None:
        return node.give(None)
    axis = [node.number("axis", 1)] if node.version < 20 else ([-2] if node.input(2) is None else known(node.input(2)))
    if not axis or not node.free(1, 2):
        return node.unknown("its axis is not known") if value.kind is ROWS else node.give(None)
    at = axis[0] % len(value.shape)
    found = along(node, at)
    if found.kind not in (FREE, ROWS) or value.axis == len(value.shape) - 1:
        return node.mixed("it works along the rows")
    shape = list(value.shape)
    shape[at], shape[-1] = opaque_side(), opaque_side() if node.number("inverse", 0) else 2
    return node.give(tuple(shape), value.axis, value.outer)


@rule("STFT")
def _stft(node: Node) -> Answer:
    return batched(node, {0: 0}, [1, 2, 3], [((1, opaque_side(), opaque_side(), 2), 0)])
