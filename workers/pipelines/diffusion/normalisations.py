"""A graph whose normalisations can be given their statistics: so that a tile is normalised as the whole image is.

    first run of a tile     own = 0        each normalisation measures the tile's core, as the stock operator does
    pooled over all tiles                  means and mean squares of the whole image
    later runs              own = n        the first n are normalised by what was pooled, and the rest measured again
    last run of a tile      own = all      normalised by what was pooled

The cores of the tiles are the whole image, each point once. Statistics are float32 for graphs of any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from workers.devices.arrays import Array

#: Inputs of the rewritten graph: the number of the first normalisation that uses the tile's own statistics; where the
#: tile's core begins and ends, and its sides, in elements of the graph's input.
OWN, FIRST, LAST, SIDES = "tile_own", "tile_first", "tile_last", "tile_sides"
#: The prefixes of what each normalisation is given, and of what it measures: `[1, groups, 2]`, mean and mean square.
GIVEN, MEASURED = "tile_given_", "tile_measured_"

#: Bytes of a graph that is rewritten at most: protobuf holds no more.
MAX_BYTES = 1 << 31
#: The operators that are written here have their form since this operator set; ReduceMean its axes as input since that.
MIN_OPSET, AXES_AS_INPUT = 13, 18


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The graph's bytes, and how many groups each of its normalisations has, in order."""

    content: bytes
    groups: tuple[int, ...]

    def statistics(self) -> list[Array]:
        """Statistics to begin with, which a first run does not use."""
        return [np.zeros((1, groups, 2), np.float32) for groups in self.groups]


def read(file: Path) -> onnx.ModelProto | None:
    """The graph of `file` with its weights; None where that is too much to be changed."""
    if sum(one.stat().st_size for one in file.parent.iterdir() if one.is_file()) >= MAX_BYTES:
        return None
    return onnx.load(file)


def rewritten(model: onnx.ModelProto) -> Rewritten | None:
    """`model` with statistics in and out, changed in place; None where no normalisation has a form that is known."""
    graph = model.graph
    shapes = {
        value.name: value.type.tensor_type.shape
        for value in (*onnx.shape_inference.infer_shapes(model).graph.value_info, *graph.input, *graph.output)
    }
    known = {one.name: one for one in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    constants = {
        node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant" and node.attribute
    }
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        return None
    groups: list[int] = []
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        scale = known.get(node.input[1], constants.get(node.input[1])) if len(node.input) == 3 else None
        if node.op_type != "InstanceNormalization" or scale is None:
            nodes.append(node)
            continue
        before = made_by.get(node.input[0])
        whole = before.input[0] if before is not None and before.op_type == "Reshape" else ""
        core = whole if whole in shapes and len(shapes[whole].dim) == 4 else ""
        nodes += _with_statistics(node, core, len(groups), scale, opset)
        groups.append(int(scale.dims[0]))
    if not groups:
        return None
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(OWN, TensorProto.INT64, []))
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, [2]) for name in (FIRST, LAST, SIDES))
    for number, count in enumerate(groups):
        sides = [1, count, 2]
        graph.input.append(helper.make_tensor_value_info(f"{GIVEN}{number}", TensorProto.FLOAT, sides))
        graph.output.append(helper.make_tensor_value_info(f"{MEASURED}{number}", TensorProto.FLOAT, sides))
    graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.int64), f"tile_{name}")
        for name, values in (
            ("two", [2]),
            ("four", [4]),
            ("axes", [2, 3]),
            ("halves", [1, 1]),
            ("last_axis", [2]),
        )
    )
    graph.initializer.extend(
        numpy_helper.from_array(np.array([0, count, -1], np.int64), f"tile_grouped_{count}") for count in set(groups)
    )
    return Rewritten(model.SerializeToString(), tuple(groups))


def _with_statistics(
    node: onnx.NodeProto, core: str, number: int, scale: onnx.TensorProto, opset: int
) -> list[onnx.NodeProto]:
    """The nodes in place of one InstanceNormalization of `[1, groups, n]`; `core` is its input as `[1, c, h, w]`."""
    groups = int(scale.dims[0])
    epsilon = next((one.f for one in node.attribute if one.name == "epsilon"), 1e-5)
    made: list[onnx.NodeProto] = []

    def add(operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        output = f"tile_{number}_{name}"
        made.append(helper.make_node(operator, list(inputs), [output], output, **attributes))
        return output

    values = node.input[0]
    measured = values
    if core:
        shape = add("Shape", [core], "shape")
        sides = add("Slice", [shape, "tile_two", "tile_four"], "sides")
        first = add("Div", [add("Mul", [FIRST, sides], "first_part"), SIDES], "first")
        last = add("Div", [add("Mul", [LAST, sides], "last_part"), SIDES], "last")
        cut = add("Slice", [core, first, last, "tile_axes"], "core")
        measured = add("Reshape", [cut, f"tile_grouped_{groups}"], "grouped")
    wide = add("Cast", [measured], "wide", to=TensorProto.FLOAT)
    mean, square = (
        add("ReduceMean", [one, "tile_last_axis"], name, keepdims=1)
        if opset >= AXES_AS_INPUT
        else add("ReduceMean", [one], name, axes=[2], keepdims=1)
        for one, name in ((wide, "mean"), (add("Mul", [wide, wide], "squares"), "square"))
    )
    own_number = f"tile_{number}_number"
    made.append(
        helper.make_node("Constant", [], [own_number], value=numpy_helper.from_array(np.array(number), own_number))
    )
    made.append(helper.make_node("Concat", [mean, square], [f"{MEASURED}{number}"], axis=2))
    own = add("LessOrEqual", [OWN, own_number], "own")
    used = add("Where", [own, f"{MEASURED}{number}", f"{GIVEN}{number}"], "used")
    split = [f"tile_{number}_used_mean", f"tile_{number}_used_square"]
    made.append(helper.make_node("Split", [used, "tile_halves"], split, axis=2))
    variance = add("Sub", [split[1], add("Mul", [split[0], split[0]], "mean_squared")], "variance")
    small = f"tile_{number}_epsilon"
    made.append(
        helper.make_node("Constant", [], [small], value=numpy_helper.from_array(np.array(epsilon, np.float32), small))
    )
    deviation = add("Sqrt", [add("Add", [add("Relu", [variance], "positive"), small], "safe")], "deviation")
    centred = add("Sub", [add("Cast", [values], "values", to=TensorProto.FLOAT), split[0]], "centred")
    scaled = add("Div", [centred, deviation], "normal")
    back = add("Cast", [scaled], "back", to=scale.data_type)
    column = f"tile_{number}_column"
    made.append(
        helper.make_node(
            "Constant", [], [column], value=numpy_helper.from_array(np.array([1, groups, 1], np.int64), column)
        )
    )
    weight = add("Reshape", [node.input[1], column], "weight")
    bias = add("Reshape", [node.input[2], column], "bias")
    weighted = add("Mul", [back, weight], "weighted")
    made.append(helper.make_node("Add", [weighted, bias], [node.output[0]]))
    return made


def pooled(statistics: Sequence[Sequence[Array]], areas: Sequence[int]) -> list[Array]:
    """The statistics of the whole out of those of each tile's core, which has so many elements of the input."""
    share = np.array(areas, np.float64) / sum(areas)
    return [
        np.tensordot(share, np.stack(each).astype(np.float64), axes=1).astype(np.float32)
        for each in zip(*statistics, strict=True)
    ]
