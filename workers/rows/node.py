"""One node of a graph as the table's rules see it: its attributes, what is known of its inputs, and ways to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from workers.rows.sizes import Dim, counts_rows, of_rows
from workers.rows.values import FREE, MIXED, ROWS, UNKNOWN, Because, Shape, Value

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, NodeProto

Attributes = Mapping[str, "AttributeProto"]
Answer = Value | Sequence[Value]


class Subgraphs(Protocol):
    """Follows the rows through a graph inside a node."""

    def __call__(self, graph: GraphProto, given: Sequence[Value]) -> list[Value]:
        """What is known of the graph's outputs, its inputs being `given`."""


class Node:
    """A node whose inputs have been followed. An input that is left out is None."""

    __slots__ = ("_attributes", "_environment", "doubt", "inputs", "operator", "proto", "subgraph", "version")

    def __init__(
        self,
        proto: NodeProto,
        version: int,
        inputs: list[Value | None],
        doubt: Because | None,
        environment: Attributes,
        subgraph: Subgraphs,
    ) -> None:
        self.proto = proto
        self.operator: str = proto.op_type
        self.version = version
        self.inputs = inputs
        #: What leaves a doubt about any of the inputs.
        self.doubt = doubt
        self.subgraph = subgraph
        self._environment = environment
        self._attributes: dict[str, AttributeProto] | None = None

    # ---- attributes

    def attribute(self, name: str) -> AttributeProto | None:
        """The attribute, or that of the function's call which it refers to."""
        if self._attributes is None:
            self._attributes = {}
            for found in self.proto.attribute:
                if not found.ref_attr_name:
                    self._attributes[found.name] = found
                elif found.ref_attr_name in self._environment:
                    self._attributes[found.name] = self._environment[found.ref_attr_name]
        return self._attributes.get(name)

    def attributes(self) -> Attributes:
        """All of them, by name."""
        self.attribute("")
        return self._attributes or {}

    def number(self, name: str, default: int) -> int:
        """A whole number."""
        found = self.attribute(name)
        return default if found is None else int(found.i)

    def numbers(self, name: str) -> list[int] | None:
        """Several whole numbers."""
        found = self.attribute(name)
        return None if found is None else list(found.ints)

    def text(self, name: str, default: str) -> str:
        """A string."""
        found = self.attribute(name)
        return default if found is None else bytes(found.s).decode("utf-8", "replace")

    # ---- inputs

    def input(self, index: int) -> Value | None:
        """What is known of an input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def first(self) -> Value:
        """The first input; an empty tensor where it is left out."""
        found = self.input(0)
        return _NOTHING if found is None else found

    def free(self, *indices: int) -> bool:
        """Whether each of these inputs is left out or the same alone and joined."""
        return all((found := self.input(index)) is None or found.kind is FREE for index in indices)

    # ---- answers

    def because(self, reason: str) -> Because:
        """This node as the one that decided."""
        return Because(self.proto.name or next(iter(self.proto.output), ""), self.operator, reason)

    def mixed(self, reason: str, shape: Shape | None = None) -> Value:
        """Disproven: a caller's part of this tensor depends on who else is in the batch."""
        return Value(MIXED, shape, because=self.because(reason))

    def unknown(self, reason: str, shape: Shape | None = None) -> Value:
        """Neither proven nor disproven from here on."""
        return Value(UNKNOWN, shape, because=self.doubt or self.because(reason))

    def give(self, shape: Shape | None, axis: int = -1, outer: Dim = 1) -> Value:
        """Rows along `axis` of a tensor of that shape, or, without an axis, what is the same alone and joined."""
        if axis < 0:
            return Value(FREE, shape, because=self.doubt)
        assert shape is not None
        for index, dim in enumerate(shape):
            if index == axis:
                if not counts_rows(dim):
                    return self.mixed(f"its side {dim} does not grow with the rows", shape)
            elif not isinstance(dim, int) and of_rows(dim):
                return self.mixed("the rows run along two of its axes", shape)
        return Value(ROWS, shape, axis, outer, because=self.doubt)

    def doubted(self, value: Value, reason: str) -> Value:
        """The same with a doubt."""
        return value if value.because is not None else value._replace(because=self.because(reason))


_NOTHING = Value(FREE, ())

Rule = Callable[[Node], Answer]
R = TypeVar("R", bound=Rule)

#: What happens to the rows, by domain and operator. A rule here sees inputs that are FREE or ROWS.
RULES: dict[tuple[str, str], Rule] = {}

#: The rules that see inputs of every kind.
ALL_KINDS: set[Rule] = set()


def rule(*operators: str, domain: str = "", all_kinds: bool = False) -> Callable[[R], R]:
    """Enters a rule into the table for `operators`."""

    def enter(made: R) -> R:
        RULES.update({(domain, operator): made for operator in operators})
        if all_kinds:
            ALL_KINDS.add(made)
        return made

    return enter
