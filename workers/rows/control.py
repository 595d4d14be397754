"""Branches, loops and scans: which way they go, and how often, must not depend on the rows."""

from __future__ import annotations

from collections.abc import Sequence

from workers.rows.broadcasting import merged, with_doubt
from workers.rows.node import Answer, Node, rule
from workers.rows.sizes import Dim, opaque, opaque_side
from workers.rows.values import FREE, MIXED, POSITIONS, ROWS, SIZE, UNKNOWN, Value, items_of

#: How often a loop's body is followed before it is given up. What is known of a tensor only ever shrinks.
_ROUNDS = 8

_SCALAR = Value(FREE, ())


def _graph(node: Node, name: str, given: Sequence[Value]) -> list[Value]:
    found = node.attribute(name)
    return [] if found is None else node.subgraph(found.g, given)


def _ruled(node: Node, value: Value, what: str) -> Value | None:
    """The answer where the rows rule a condition or a count."""
    if value.kind is FREE:
        return None
    if value.kind in (UNKNOWN, MIXED):
        return Value(value.kind, None, because=value.because)
    return node.mixed(f"{what} depends on " + ("how many rows there are" if value.kind is SIZE else "the rows"))


@rule("If", all_kinds=True)
def _if(node: Node) -> Answer:
    condition, count = node.first, len(node.proto.output)
    ruled = _ruled(node, condition, "its condition")
    if ruled is not None:
        return [ruled] * count
    known = items_of(condition)
    if known is not None and len(known) == 1 and isinstance(known[0], int | float):
        return _graph(node, "then_branch" if known[0] else "else_branch", [])
    then, other = _graph(node, "then_branch", []), _graph(node, "else_branch", [])
    if len(then) != len(other):
        return [node.unknown("its branches differ")] * count
    return [merged(node, a, b) for a, b in zip(then, other, strict=True)]


@rule("Loop", all_kinds=True)
def _loop(node: Node) -> Answer:
    count = len(node.proto.output)
    for index, what in ((0, "how often it goes round"), (1, "its condition")):
        value = node.input(index)
        ruled = None if value is None else _ruled(node, value, what)
        if ruled is not None:
            return [ruled] * count
    carried = [value for value in node.inputs[2:] if value is not None]
    own: set[Dim] = set()
    for _ in range(_ROUNDS):
        after = _graph(node, "body", [_SCALAR, _SCALAR, *carried])
        if len(after) < len(carried) + 1:
            break
        ruled = _ruled(node, after[0], "its condition")
        if ruled is not None:
            return [ruled] * count
        joined = [_widened(node, a, b, own) for a, b in zip(carried, after[1 : len(carried) + 1], strict=True)]
        if joined == carried:
            doubt = after[0].because
            scanned = [_stacked(node, value, 0) for value in after[len(carried) + 1 :]]
            return [with_doubt(value, doubt) for value in [*carried, *scanned]]
        carried = joined
    return [node.unknown("what it carries does not come to rest")] * count


def _widened(node: Node, before: Value, after: Value, own: set[Dim]) -> Value:
    """What is known of a tensor before a round and after it, whichever round it is: numbers and sides change.

    `own` are the sides that stand for any: symbols of this loop's, which no other tensor has. New ones are added.
    """
    if before == after:
        return before
    found = merged(node, before, after)
    if before.shape is None or found.shape is None or len(before.shape) != len(found.shape):
        return found
    sides = tuple([a if a == b or a in own else b for a, b in zip(before.shape, found.shape, strict=True)])
    own.update(side for side in sides if side not in before.shape)
    return found._replace(shape=sides)


def _stacked(node: Node, value: Value, axis: int) -> Value:
    """One of each round, along a new axis."""
    if value.kind in (UNKNOWN, MIXED) or value.shape is None:
        return value._replace(shape=None, items=None, tensor=None)
    if value.kind is POSITIONS:
        return node.mixed("where a row lies enters its values")
    at = axis % (len(value.shape) + 1)
    shape = (*value.shape[:at], opaque_side(), *value.shape[at:])
    if value.kind is ROWS:
        return node.give(shape, value.axis + (at <= value.axis), value.outer)
    return Value(value.kind, shape, because=value.because)


@rule("Scan", all_kinds=True)
def _scan(node: Node) -> Answer:
    count, given = len(node.proto.output), [value for value in node.inputs if value is not None]
    if node.version < 9:
        free = all(value.kind is FREE for value in given)
        return [Value(FREE, None) if free else node.unknown("its first form is not followed")] * count
    scanned = node.number("num_scan_inputs", 1)
    carried, inputs = given[: len(given) - scanned], given[len(given) - scanned :]
    axes = node.numbers("scan_input_axes") or [0] * scanned
    own: set[Dim] = set()
    slices = [_sliced(node, value, axis) for value, axis in zip(inputs, axes, strict=False)]
    for value in slices:
        if value.kind in (UNKNOWN, MIXED):
            return [value] * count
    for _ in range(_ROUNDS):
        after = _graph(node, "body", [*carried, *slices])
        if len(after) < len(carried):
            break
        joined = [_widened(node, a, b, own) for a, b in zip(carried, after, strict=False)]
        if joined == carried:
            stacks = after[len(carried) :]
            places = node.numbers("scan_output_axes") or [0] * len(stacks)
            return [*carried, *[_stacked(node, value, at) for value, at in zip(stacks, places, strict=False)]]
        carried = joined
    return [node.unknown("what it carries does not come to rest")] * count


def _sliced(node: Node, value: Value, axis: int) -> Value:
    """One step's part of a scanned tensor."""
    if value.kind in (UNKNOWN, MIXED) or value.shape is None:
        return value._replace(shape=None, items=None, tensor=None)
    at = axis % (len(value.shape) or 1)
    if value.axis == at or value.kind is POSITIONS:
        return node.mixed("it goes along the rows, one after another")
    shape = (*value.shape[:at], *value.shape[at + 1 :])
    if value.kind is ROWS:
        return node.give(shape, value.axis - (at < value.axis), value.outer)
    return Value(value.kind, shape, items=(opaque(),) if value.items and not shape else None, because=value.because)
