"""Sides of tensors, and whole numbers computed from them: a number times symbols, one of which is the rows' count.

    4               always 4
    12·x.1          twelve times the second side of input x, the same alone and joined
    3·rows          three for each row: alone it counts one caller's rows, joined all callers'

What cannot be written as such a product becomes a symbol of its own. A symbol that depends on the rows' count in an
unknown way stands beside the count squared, so that it is never taken for a multiple of it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

#: The symbol of the rows' count.
ROWS = "rows"

#: Begins the symbols that may be negative: differences, and numbers of which nothing is known.
_SIGNED = "~"

#: What is longer, or larger, becomes a symbol of its own: a caller's graph must not make numbers without end.
_MOST_SYMBOLS, _MOST_LETTERS, _LARGEST = 12, 120, 1 << 62

_numbers = itertools.count(1)


class Size(NamedTuple):
    """`factor` times the symbols, which are sorted and may repeat. Never without a symbol: that is an int."""

    factor: int
    symbols: tuple[str, ...]

    def __str__(self) -> str:
        return "·".join([str(self.factor), *self.symbols] if self.factor != 1 else self.symbols)


Dim = int | Size

#: One for each row.
ONE_EACH = Size(1, (ROWS,))


def symbol(name: str) -> Size:
    """A side that is the same alone and joined."""
    return Size(1, (name,))


def opaque(of_rows: bool = False) -> Size:
    """A number of which only this is known: whether it depends on the rows' count."""
    name = f"{_SIGNED}{next(_numbers)}"
    return Size(1, (ROWS, ROWS, name)) if of_rows else Size(1, (name,))


def opaque_side(of_rows: bool = False) -> Size:
    """The same for a side, which is not negative."""
    name = f"side{next(_numbers)}"
    return Size(1, (ROWS, ROWS, name)) if of_rows else Size(1, (name,))


def named_size(expression: str, of_rows: bool) -> Size:
    """A number by the expression that computes it, so that the same expression is the same number."""
    if len(expression) > _MOST_LETTERS or of_rows:
        return opaque(of_rows)
    return Size(1, (_SIGNED + expression,))


def of_rows(dim: Dim | float) -> bool:
    """Whether a number depends on the rows' count."""
    return isinstance(dim, Size) and ROWS in dim.symbols


def counts_rows(dim: Dim) -> bool:
    """Whether a side is a multiple of the rows' count."""
    return isinstance(dim, Size) and dim.symbols.count(ROWS) == 1


def not_negative(dim: Dim) -> bool:
    """Whether a number is known to be 0 or more."""
    if not isinstance(dim, Size):
        return dim >= 0
    return dim.factor >= 0 and not any(name.startswith(_SIGNED) for name in dim.symbols)


def times(a: Dim, b: Dim) -> Dim:
    """The product."""
    if not isinstance(a, Size):
        if not isinstance(b, Size):
            return a * b if abs(a) < _LARGEST and abs(b) < _LARGEST else opaque()
        a, b = b, a
    if not isinstance(b, Size):
        if b == 1:
            return a
        product = Size(a.factor * b, a.symbols)
    else:
        product = Size(a.factor * b.factor, tuple(sorted(a.symbols + b.symbols)))
    if product.factor == 0:
        return 0
    if len(product.symbols) > _MOST_SYMBOLS or abs(product.factor) > _LARGEST:
        return opaque(of_rows(product))
    return product


def product_of(dims: tuple[Dim, ...] | list[Dim]) -> Dim:
    """The product of all."""
    result: Dim = 1
    for dim in dims:
        result = times(result, dim)
    return result


def over(a: Dim, b: Dim) -> Dim | None:
    """`a` divided by `b`, where that is a whole number for certain; symbols are not 0 where they divide."""
    if a == b:
        return 1
    if b == 1:
        return a
    factor, divisor = (a.factor if isinstance(a, Size) else a), (b.factor if isinstance(b, Size) else b)
    if divisor == 0 or factor % divisor:
        return None
    left = list(a.symbols) if isinstance(a, Size) else []
    for name in b.symbols if isinstance(b, Size) else ():
        if name not in left:
            return None
        left.remove(name)
    return Size(factor // divisor, tuple(left)) if left else factor // divisor


def plus(a: Dim, b: Dim, sign: int = 1) -> Dim:
    """`a + b`, or `a - b` with `sign` -1."""
    if not isinstance(a, Size) and not isinstance(b, Size):
        return a + sign * b
    if b == 0:
        return a
    if isinstance(a, Size) and isinstance(b, Size) and a.symbols == b.symbols:
        factor = a.factor + sign * b.factor
        return Size(factor, a.symbols) if factor else 0
    return named_size(f"({a}{'+' if sign > 0 else '-'}{b})", of_rows(a) or of_rows(b))


def either(a: Dim, b: Dim) -> Dim:
    """The side that broadcasting `a` against `b` gives."""
    if b in (a, 1):
        return a
    if a == 1:
        return b
    if of_rows(a) or of_rows(b):
        return opaque_side(of_rows=True)
    if not isinstance(a, Size):
        return a
    return opaque_side() if isinstance(b, Size) else b
