"""Operators that work element by element; of small whole numbers the result is followed."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from workers.rows.broadcasting import broadcast
from workers.rows.node import Node, rule
from workers.rows.sizes import Dim, Size, named_size, not_negative, of_rows, opaque, over, plus, times
from workers.rows.values import FREE, MOST_ITEMS, POSITIONS, ROWS, SIZE, Item, Value, items_of, numbers

Arithmetic = Callable[[Node, Sequence[Item]], Item]


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp",
    "Gelu", "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal",
    "RegexFullMatch", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
    "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Affine", "ParametricSoftplus", "ScaledTanh",
    all_kinds=True,
)  # fmt: skip
def _unary(node: Node) -> Value:
    value = node.first
    if value.kind is POSITIONS:
        return broadcast(node, [value])
    return value._replace(items=None, tensor=None)


@rule(
    "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mean", "Pow", "PRelu", "StringConcat", "Sum", "Xor",
    all_kinds=True,
)  # fmt: skip
def _several(node: Node) -> Value:
    return broadcast(node, _present(node))


@rule("Clip", all_kinds=True)
def _clip(node: Node) -> Value:
    if len(node.inputs) == 1:
        return _unary(node)
    return _followed(node, _clipped) if node.input(1) and node.input(2) else _several(node)


@rule("Cast", "CastLike", "Floor", "Ceil", "Not", all_kinds=True)
def _kept(node: Node) -> Value:
    """A cast is followed as if it lost nothing but fractions; positions stay what they number."""
    value = node.first
    if value.kind is POSITIONS and node.operator in ("Cast", "CastLike"):
        return value
    if value.kind not in (FREE, SIZE):
        return _unary(node)
    return _followed(node, _CHANGES[node.operator], [value])


@rule(
    "Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And",
    "Or", "Where", all_kinds=True,
)  # fmt: skip
def _followed_numbers(node: Node) -> Value:
    if node.operator in ("Min", "Max") and len(node.inputs) != 2:
        return _several(node)
    return _followed(node, _CHANGES[node.operator])


@rule("Identity", "OptionalGetElement", all_kinds=True)
def _same(node: Node) -> Value:
    return node.first


#: The operators that most nodes have, all of which `unchanged` speaks for.
PASSING = frozenset({
    "Add", "Clip", "Div", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mul", "Pow", "PRelu",
    "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh", "Where",
})  # fmt: skip


def unchanged(inputs: Sequence[Value | None]) -> Value | None:
    """The result of an element-by-element operator where it is, for all that is known, one of its inputs.

    That is the most frequent case by far, and is checked first: all inputs that carry rows are alike, and all others
    fit into them. None otherwise.
    """
    rows: Value | None = None
    for value in inputs:
        if value is not None and value.kind is not FREE:
            if rows is None:
                rows = value
            elif value.shape != rows.shape or value.axis != rows.axis or value.outer != rows.outer:
                return None
    if rows is None or rows.kind is not ROWS or rows.shape is None or rows.component is not None:
        return None
    shape, rank, axis = rows.shape, len(rows.shape), rows.axis
    for value in inputs:
        if value is None or value.kind is not FREE:
            continue
        if value.shape is None or len(value.shape) > rank:
            return None
        at = rank - len(value.shape)
        for side in value.shape:
            if side != 1 and (at == axis or side != shape[at]):
                return None
            at += 1
    return rows


def _present(node: Node) -> list[Value]:
    return [value for value in node.inputs if value is not None]


def _followed(node: Node, change: Arithmetic, values: list[Value] | None = None) -> Value:
    """The operator's result, number by number where the inputs are short lists of numbers."""
    values = _present(node) if values is None else values
    result = broadcast(node, values)
    if result.kind > SIZE or result.shape is None or len(result.shape) > 1:
        return result
    count = result.shape[0] if result.shape else 1
    if not isinstance(count, int) or count > MOST_ITEMS:
        return result
    lists = []
    for value in values:
        items = items_of(value)
        if items is None:
            if value.kind is SIZE:
                return result
            items = tuple(opaque() for _ in range(count))
        if len(items) not in (1, count):
            return result
        lists.append(items * count if len(items) == 1 else items)
    made = tuple([change(node, column) for column in zip(*lists, strict=True)])
    return numbers(made, result.shape, node.doubt)


def _depends(items: Sequence[Item]) -> bool:
    return any(of_rows(item) for item in items)


def _plain(change: Callable[..., Item], symbolic: Callable[[Dim, Dim], Item | None] | None = None) -> Arithmetic:
    """Arithmetic of two numbers, by `symbolic` where one is a symbol; what that cannot say is a symbol of its own."""

    def both(node: Node, items: Sequence[Item]) -> Item:
        a, b = items
        if not isinstance(a, Size) and not isinstance(b, Size):
            try:
                return _bounded(change(a, b))
            except (ArithmeticError, ValueError):
                return opaque()
        if symbolic is not None and not isinstance(a, float) and not isinstance(b, float):
            made = symbolic(a, b)
            if made is not None:
                return made
        return named_size(f"{node.operator}({a},{b})", _depends(items))

    return both


def _bounded(item: Item) -> Item:
    return item if isinstance(item, float | Size) or abs(item) < 1 << 62 else opaque()


def _less(a: Dim, b: Dim) -> bool | None:
    """Whether `a` is less than `b`, where that is certain: a side is never less than 0."""
    if not isinstance(b, Size) and b <= 0 and not_negative(a):
        return False
    if not isinstance(a, Size) and a < 0 and not_negative(b):
        return True
    return None


def _equal(a: Dim, b: Dim) -> bool | None:
    if a == b:
        return True
    return False if _less(a, b) or _less(b, a) else None


def _divided(a: Item, b: Item) -> Item:
    assert not isinstance(a, Size)
    assert not isinstance(b, Size)
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: Item, b: Item) -> Item:
    """Of numbers that are not negative; otherwise it depends on an attribute."""
    assert not isinstance(a, Size)
    assert not isinstance(b, Size)
    if a < 0 or b <= 0:
        raise ValueError
    return a % b


def _negated(result: bool | None) -> bool | None:
    return None if result is None else not result


def _chosen(node: Node, items: Sequence[Item]) -> Item:
    condition, yes, no = items
    if isinstance(condition, Size):
        return yes if yes == no else opaque(_depends(items))
    return yes if condition else no


def _clipped(node: Node, items: Sequence[Item]) -> Item:
    value, low, high = items
    if any(isinstance(item, Size) for item in items):
        return opaque(_depends(items))
    return max(low, min(high, value))


def _rounded(to: Callable[[float], int]) -> Arithmetic:
    def one(node: Node, items: Sequence[Item]) -> Item:
        item = items[0]
        if isinstance(item, Size):
            return _without_fraction(item, node.operator)
        return float(to(item)) if isinstance(item, float) and math.isfinite(item) else item

    return one


def _without_fraction(item: Size, how: str) -> Size:
    """A number rounded in some way; sides have no fraction, other symbols may."""
    return item if not_negative(item) else named_size(f"{how}({item})", of_rows(item))


def _cast(node: Node, items: Sequence[Item]) -> Item:
    """To whole numbers, fractions go; to truth values, all but 0 is true; what may not hold the number loses it."""
    item, to = items[0], node.number("to", 0)
    if isinstance(item, Size):
        if to in _WHOLE:
            return _without_fraction(item, "Whole")
        return item if to in _REAL else opaque(of_rows(item))
    if to == _BOOL:
        return bool(item)
    if to in _WHOLE and math.isfinite(item):
        return int(item)
    return float(item) if to in _REAL else opaque()


def _not(node: Node, items: Sequence[Item]) -> Item:
    return opaque(of_rows(items[0])) if isinstance(items[0], Size) else not items[0]


#: BOOL; INT32, INT64, UINT64; FLOAT, DOUBLE.
_BOOL, _WHOLE, _REAL = 9, frozenset({6, 7, 13}), frozenset({1, 11})

_CHANGES: dict[str, Arithmetic] = {
    "Add": _plain(operator.add, plus),
    "Sub": _plain(operator.sub, lambda a, b: plus(a, b, -1)),
    "Mul": _plain(operator.mul, times),
    "Div": _plain(_divided, over),
    "Mod": _plain(_remainder, lambda a, b: 0 if over(a, b) is not None else None),
    "Min": _plain(min),
    "Max": _plain(max),
    "Equal": _plain(operator.eq, _equal),
    "Less": _plain(operator.lt, _less),
    "LessOrEqual": _plain(operator.le, lambda a, b: _negated(_less(b, a))),
    "Greater": _plain(operator.gt, lambda a, b: _less(b, a)),
    "GreaterOrEqual": _plain(operator.ge, lambda a, b: _negated(_less(a, b))),
    "And": _plain(lambda a, b: bool(a and b)),
    "Or": _plain(lambda a, b: bool(a or b)),
    "Where": _chosen,
    "Cast": _cast,
    "CastLike": lambda node, items: opaque(of_rows(items[0])),
    "Floor": _rounded(math.floor),
    "Ceil": _rounded(math.ceil),
    "Not": _not,
}
