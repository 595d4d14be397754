"""Random graphs that are proven, run joined and alone: no caller's rows differ."""

from __future__ import annotations

import collections
import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.rows.joined import difference, session_of
from tests.rows.random_graphs import graphs
from tests.support.repetitions import FACTOR, repetitions
from workers.rows.node import RULES, Answer, Node
from workers.rows.proof import Proof, prove
from workers.rows.values import ROWS, Value

EXAMPLES = repetitions(2000)

#: How many rows each caller sends, and how many callers there are.
BATCHES = ((1, 2), (1, 3), (2, 2), (3, 2), (1, 4))


class FoundError(Exception):
    """A proven graph was found whose rows differ: no further one is made."""


def explore(examples: int, number: int, *, until_wrong: bool = False) -> tuple[collections.Counter[str], list[str]]:
    """How many graphs got which verdict, and the proven ones whose rows differ."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(graphs())
    def compare(made: object) -> None:
        model, sides = made  # type: ignore[misc]
        try:
            session = session_of(model)
        except Exception:
            counts["refused by ONNX Runtime"] += 1
            return
        found = prove(model)
        counts[found.proof] += 1
        if found.proof is not Proof.PROVEN:
            return
        random = np.random.default_rng(0)
        answers = []
        for rows, callers in BATCHES:
            given_rows = [
                {name: (random.standard_normal((rows, *shape)) * 3).astype(np.float32) for name, shape in sides.items()}
                for _ in range(callers)
            ]
            answers.append(difference(session, given_rows))
        counts["compared"] += None in answers
        wrong.extend(f"{' '.join(node.op_type for node in model.graph.node)}: {answer}" for answer in answers if answer)
        if until_wrong and wrong:
            raise FoundError

    with contextlib.suppress(FoundError):
        compare()
    return counts, wrong


@pytest.mark.timeout(600 * FACTOR)
@pytest.mark.slow
def test_rows_of_random_graphs_that_are_proven_do_not_differ() -> None:
    counts, wrong = explore(EXAMPLES, 14)
    assert wrong == [], counts
    # Enough of them are proven and run, and enough are not, for that to say something.
    assert counts["compared"] > EXAMPLES / 4, counts
    assert counts[Proof.DISPROVEN] > EXAMPLES / 8, counts


@pytest.mark.parametrize("operator", ["Softmax", "Concat", "Gather", "MatMul", "Reshape", "Add"])
def test_a_rule_that_lets_everything_pass_is_found_out(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: where the table says of one operator that it keeps rows apart, rows differ."""

    def passes(node: Node) -> Answer:
        kept, made = node.first, right(node)
        if kept.kind is not ROWS or kept.shape is None or not isinstance(made, Value) or not made.shape:
            return made
        return kept._replace(shape=(kept.shape[kept.axis], *made.shape[1:]), axis=0)

    right = RULES["", operator]
    monkeypatch.setitem(RULES, ("", operator), passes)
    assert explore(EXAMPLES, 14, until_wrong=True)[1]
