"""ONNX's recurrent operators, LSTM, GRU and RNN, written out step by step so that torch differentiates them.

X is (length, batch, inputs), W (directions, gates * hidden, inputs), R (directions, gates * hidden, hidden), B
(directions, 2 * gates * hidden): the bias of W, then that of R. Y is (length, directions, batch, hidden). Gates stand
in ONNX's order: i o f c for LSTM, z r h for GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from workers.training.onnx.operators.node import OnnxNode, Operator, aligned

Activation = Callable[[Tensor], Tensor]

#: One step: the projected input (batch, gates * hidden), the states and the direction's weights to the new states.
Cell = Callable[[Tensor, list[Tensor], Tensor, Tensor | None, list[Activation]], list[Tensor]]

#: Activations by ONNX's name in lower case, those without parameters.
_ACTIVATIONS: dict[str, Activation] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softsign": F.softsign, "softplus": F.softplus,
}  # fmt: skip


def _recurrent(node: OnnxNode, gates: int, defaults: list[str], cell: Cell) -> Operator:
    """The operator around `cell`: directions, initial states, the order of the axes."""
    directions = {"forward": 1, "reverse": 1, "bidirectional": 2}.get(node.attribute("direction", "forward"))
    if directions is None:
        raise node.refuse(f"direction {node.attribute('direction')!r}")
    if node.attribute("layout", 0):
        raise node.refuse("layout 1; export it with the length as the first axis")
    if node.attribute("clip") is not None:
        raise node.refuse("it clips its cells")
    if node.has(4):
        raise node.refuse("it is given the length of each sequence (sequence_lens)")
    if node.has(7):
        raise node.refuse("it has peephole weights")
    hidden = node.attribute("hidden_size")
    activations = _activations(node, defaults, directions)
    backwards = [node.attribute("direction") == "reverse", True]
    states_of = 2 if node.op_type == "LSTM" else 1

    def run(x: Tensor, w: Tensor, r: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        given = [*rest, *[None] * (4 - len(rest))]
        bias, initial = given[0], given[2:]
        w, r = aligned(x, w, r)[1:]
        outputs, last = [], []
        for direction in range(directions):
            states = [
                x.new_zeros(x.shape[1], hidden) if state is None else aligned(x, state)[1][direction]
                for state in initial[:states_of]
            ]
            b_w, b_r = (None, None) if bias is None else aligned(x, bias)[1][direction].split(gates * hidden)
            # The bias of W is added for all steps at once, that of R where its gate wants it.
            projected = F.linear(x, w[direction], b_w)
            forwards = range(x.shape[0])
            steps: Iterable[int] = reversed(forwards) if backwards[direction] else forwards
            made: dict[int, Tensor] = {}
            for step in steps:
                states = cell(projected[step], states, r[direction], b_r, activations[direction])
                made[step] = states[0]
            outputs.append(torch.stack([made[step] for step in range(x.shape[0])]))
            last.append(states)
        return (torch.stack(outputs, dim=1), *(torch.stack(parts) for parts in zip(*last, strict=True)))

    return run


def _activations(node: OnnxNode, defaults: list[str], directions: int) -> list[list[Activation]]:
    given = node.attribute("activations")
    if node.attribute("activation_alpha") or node.attribute("activation_beta"):
        raise node.refuse("its activations have parameters")
    names = [name.decode() if isinstance(name, bytes) else name for name in given] if given else defaults * directions
    unknown = sorted({name for name in names if name.lower() not in _ACTIVATIONS})
    if unknown or len(names) != len(defaults) * directions:
        raise node.refuse(f"activations {', '.join(names)}")
    functions = [_ACTIVATIONS[name.lower()] for name in names]
    return [functions[len(defaults) * d : len(defaults) * (d + 1)] for d in range(directions)]


def _lstm(node: OnnxNode) -> Operator:
    if node.attribute("input_forget", 0):
        raise node.refuse("its input and forget gates are coupled")

    def cell(x: Tensor, states: list[Tensor], r: Tensor, b: Tensor | None, f: list[Activation]) -> list[Tensor]:
        hidden, memory = states
        i, o, forget, c = (x + F.linear(hidden, r, b)).chunk(4, dim=-1)
        memory = f[0](forget) * memory + f[0](i) * f[1](c)
        return [f[0](o) * f[2](memory), memory]

    return _recurrent(node, 4, ["Sigmoid", "Tanh", "Tanh"], cell)


def _gru(node: OnnxNode) -> Operator:
    reset_after = bool(node.attribute("linear_before_reset", 0))

    def cell(x: Tensor, states: list[Tensor], r: Tensor, b: Tensor | None, f: list[Activation]) -> list[Tensor]:
        (hidden,) = states
        size = hidden.shape[-1]
        x_gates, x_new = x.split([2 * size, size], dim=-1)
        r_gates, r_new = r.split([2 * size, size])
        b_gates, b_new = (None, None) if b is None else b.split([2 * size, size])
        update, reset = f[0](x_gates + F.linear(hidden, r_gates, b_gates)).chunk(2, dim=-1)
        if reset_after:
            new = f[1](x_new + reset * F.linear(hidden, r_new, b_new))
        else:
            new = f[1](x_new + F.linear(reset * hidden, r_new, b_new))
        return [(1 - update) * new + update * hidden]

    return _recurrent(node, 3, ["Sigmoid", "Tanh"], cell)


def _rnn(node: OnnxNode) -> Operator:
    def cell(x: Tensor, states: list[Tensor], r: Tensor, b: Tensor | None, f: list[Activation]) -> list[Tensor]:
        return [f[0](x + F.linear(states[0], r, b))]

    return _recurrent(node, 1, ["Tanh"], cell)


OPERATORS: dict[str, Callable[[OnnxNode], Operator]] = {"GRU": _gru, "LSTM": _lstm, "RNN": _rnn}
