"""Follows the rows through a graph, node after node, into the graphs and functions that its nodes call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import sleep
from typing import TYPE_CHECKING, NamedTuple

from workers.rows import control  # noqa: F401 - it enters its rules into the table, as the operators do
from workers.rows.node import ALL_KINDS, RULES, Attributes, Node
from workers.rows.operators.elementwise import PASSING, unchanged
from workers.rows.values import FREE, MIXED, POSITIONS, ROWS, SIZE, UNKNOWN, Because, Value

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

#: How many nodes are followed at most, those of loops and functions counted each time: a second or two of work.
MOST_NODES = 200_000

#: How deep graphs and functions may lie inside each other.
DEEPEST = 40

#: After so many nodes other threads have their turn: ONNX Runtime loads the model meanwhile, and must not wait.
TURN = 64

#: The default domain's first operator set whose operators the table describes.
OLDEST = 7

_DEFAULT = ("", "ai.onnx")


class TooLargeError(Exception):
    """Raised where a graph is larger, or nests deeper, than it is followed."""


class Scope:
    """What is known of the tensors of one graph, by name; names of the graphs around it are seen too."""

    __slots__ = ("_around", "_values")

    def __init__(self, around: Scope | None = None) -> None:
        self._around = around
        self._values: dict[str, Value] = {}

    def __setitem__(self, name: str, value: Value) -> None:
        self._values[name] = value

    def values(self) -> Iterable[Value]:
        """What is known of the graph's own tensors."""
        return self._values.values()

    def get(self, name: str) -> Value | None:
        """What is known of a tensor; None where there is none of the name."""
        scope: Scope | None = self
        while scope is not None:
            found = scope._values.get(name)
            if found is not None:
                return found
            scope = scope._around
        return None


class Subgraph(NamedTuple):
    """Follows the rows through a graph inside a node; what is known around the node is known there."""

    walk: Walk
    scope: Scope
    versions: Mapping[str, int]
    environment: Attributes
    depth: int

    def __call__(self, graph: GraphProto, given: Sequence[Value]) -> list[Value]:
        """What is known of the graph's outputs, its inputs being `given`."""
        inside = Scope(self.scope)
        for declared, value in zip(graph.input, given, strict=False):
            inside[declared.name] = value
        return self.walk.graph(graph, inside, self.versions, self.environment, self.depth + 1)


class Walk:
    """One walk through a model."""

    def __init__(self, model: ModelProto) -> None:
        self._functions: dict[tuple[str, str, str], FunctionProto] = {
            (found.domain, found.name, found.overload): found for found in model.functions
        }
        self._versions = _versions(model.opset_import)
        self._left = MOST_NODES
        #: The most elements of a tensor that the main graph computes for one row, each open side counting as 1.
        self.largest_elements = 0

    def outputs(self, graph: GraphProto, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """What is known of the graph's outputs, by name, where `inputs` are given."""
        scope = Scope()
        for name, value in inputs.items():
            scope[name] = value
        found = self.graph(graph, scope, self._versions, {}, 0)
        self.largest_elements = _largest(scope.values())
        return dict(zip([out.name for out in graph.output], found, strict=True))

    def graph(
        self, graph: GraphProto, scope: Scope, versions: Mapping[str, int], environment: Attributes, depth: int
    ) -> list[Value]:
        """What is known of the outputs of a graph whose inputs stand in `scope`."""
        for tensor in graph.initializer:
            scope[tensor.name] = constant(tensor)
        for sparse in graph.sparse_initializer:
            scope[sparse.values.name] = Value(FREE, tuple(sparse.dims))
        self._nodes(graph.node, scope, versions, environment, depth)
        return [scope.get(out.name) or _ABSENT for out in graph.output]

    def _nodes(
        self,
        nodes: Sequence[NodeProto],
        scope: Scope,
        versions: Mapping[str, int],
        environment: Attributes,
        depth: int,
    ) -> None:
        if depth > DEEPEST:
            raise TooLargeError("its graphs nest too deeply")
        self._left -= len(nodes)
        if self._left < 0:
            raise TooLargeError("it has more nodes than are followed")
        get, functions = scope.get, self._functions
        for index, proto in enumerate(nodes):
            if index % TURN == 0:
                sleep(0)
            if proto.op_type == "Constant" and not proto.domain:
                scope[proto.output[0]] = _constant_node(proto, environment)
                continue
            inputs: list[Value | None] = []
            worst, doubt = FREE, None
            for name in proto.input:
                value = get(name) if name else None
                inputs.append(value)
                if value is None:
                    if name:
                        raise KeyError(name)
                    continue
                if value.kind > worst:  # noqa: PLR1730 - max() is slower
                    worst = value.kind
                if value.because is not None and value.kind is not MIXED and doubt is None:
                    doubt = value.because
            if worst is ROWS and doubt is None and proto.op_type in PASSING and not proto.domain and not functions:
                same = unchanged(inputs)
                if same is not None:
                    scope[proto.output[0]] = same
                    continue
            domain = "" if proto.domain in _DEFAULT else proto.domain
            subgraph = Subgraph(self, scope, versions, environment, depth)
            node = Node(proto, versions.get(domain, 1), inputs, doubt, environment, subgraph)
            for name, value in zip(proto.output, self._answers(node, domain, worst, depth), strict=False):
                if name:
                    scope[name] = value

    def _answers(self, node: Node, domain: str, worst: int, depth: int) -> Sequence[Value]:
        proto = node.proto
        function = self._functions.get((proto.domain, proto.op_type, proto.overload)) if self._functions else None
        if function is not None:
            return self._call(function, node, depth)
        count = len(proto.output)
        made = RULES.get((domain, node.operator))
        if made is None:
            return [_not_in_table(node, domain, worst)] * count
        if (worst > ROWS or (worst != FREE and _sized(node))) and made not in ALL_KINDS:
            return [_refused(node)] * count
        answer = made(node)
        answers = [answer] * count if isinstance(answer, Value) else answer
        if node.doubt is not None:
            return [value if value.because is not None else value._replace(because=node.doubt) for value in answers]
        return answers

    def _call(self, function: FunctionProto, node: Node, depth: int) -> list[Value]:
        """A function of the model's own, followed as if it stood in the node's place."""
        scope = Scope()
        for name, value in zip(function.input, node.inputs, strict=False):
            if value is not None:
                scope[name] = value
        environment = {found.name: found for found in function.attribute_proto} | dict(node.attributes())
        self._nodes(_without_absent(function, scope), scope, _versions(function.opset_import), environment, depth + 1)
        return [scope.get(name) or _ABSENT for name in function.output]


def _sized(node: Node) -> bool:
    return any(value is not None and value.kind is SIZE for value in node.inputs)


def _without_absent(function: FunctionProto, scope: Scope) -> Sequence[NodeProto]:
    """The function's nodes; an input that the caller left out is left out of them too."""
    absent = {name for name in function.input if scope.get(name) is None}
    if not absent:
        whole: Sequence[NodeProto] = function.node
        return whole
    nodes = []
    for node in function.node:
        copied = type(node)()
        copied.CopyFrom(node)
        for index, name in enumerate(copied.input):
            if name in absent:
                copied.input[index] = ""
        nodes.append(copied)
    return nodes


def _versions(imports: Sequence[object]) -> dict[str, int]:
    return {"" if found.domain in _DEFAULT else found.domain: found.version for found in imports}  # type: ignore[attr-defined]


def _refused(node: Node) -> Value:
    """The answer of a rule that knows only tensors that carry rows, or nothing of them."""
    worst = max((value for value in node.inputs if value is not None), key=lambda value: value.kind)
    if worst.kind in (UNKNOWN, MIXED):
        return Value(worst.kind, None, because=worst.because)
    if worst.kind is POSITIONS or any(value is not None and value.kind is ROWS for value in node.inputs):
        return node.mixed("the number of rows, or where a row lies, enters its values")
    return Value(SIZE, None, because=node.doubt)


def _not_in_table(node: Node, domain: str, worst: int) -> Value:
    """An operator that the table does not have; of the default domain, what takes no rows gives none."""
    name = f"{domain}.{node.operator}" if domain else node.operator
    if worst == MIXED:
        return _refused(node)
    if worst == FREE:
        found = Value(FREE, None, because=node.doubt)
        return found if not domain else node.doubted(found, f"the table does not have {name}")
    return node.unknown(f"the table does not have {name}")


def _largest(values: Iterable[Value]) -> int:
    """The most elements that any of the tensors has, constants left out, each open side counting as 1."""
    # An operator that leaves a shape as it is hands on the same tuple.
    shapes = {id(value.shape): value.shape for value in values if value.shape and value.tensor is None}
    most = 0
    for shape in shapes.values():
        elements = 1
        for side in shape:
            elements *= abs(side if isinstance(side, int) else side.factor)
        most = max(most, elements)
    return most


def constant(tensor: TensorProto) -> Value:
    """A tensor of the model's own; its numbers are read where they are asked for."""
    return Value(FREE, tuple(tensor.dims), -1, 1, None, None, None, tensor)


_ABSENT = Value(UNKNOWN, None, because=Because("", "", "an output that nothing makes"))


def _constant_node(proto: NodeProto, environment: Attributes) -> Value:
    if len(proto.attribute) != 1:
        return Value(FREE, None)
    found = proto.attribute[0]
    if found.ref_attr_name:
        found = environment.get(found.ref_attr_name, found)
    kind = found.type
    if kind == _TENSOR:
        return constant(found.t)
    if kind in (_FLOAT, _INT):
        return Value(FREE, (), items=(found.f if kind == _FLOAT else found.i,))
    if kind in (_FLOATS, _INTS):
        items = tuple(found.floats if kind == _FLOATS else found.ints)
        return Value(FREE, (len(items),), items=items if len(items) <= 64 else None)
    return Value(FREE, () if kind == _STRING else None)


_FLOAT, _INT, _STRING, _TENSOR, _FLOATS, _INTS = 1, 2, 3, 4, 6, 7
