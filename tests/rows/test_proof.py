"""The verdict on a graph, read off its operators."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.rows import graphs
from tests.rows.graphs import Case, const, node, simple, value
from tests.rows.joined import difference, session_of
from workers.rows.proof import Proof, prove

CASES = [*graphs.reported(), *graphs.siblings()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_verdict_names_the_operator_that_decides(case: Case) -> None:
    found = prove(case.model)
    assert (found.proof, found.operator) == (case.proof, case.operator), found


@pytest.mark.parametrize("case", [case for case in CASES if case.proof == "proven"], ids=lambda case: case.name)
def test_what_is_proven_holds(case: Case) -> None:
    random = np.random.default_rng(0)
    session = session_of(case.model)
    for callers in (2, 3, 5):
        assert difference(session, [case.rows(random) for _ in range(callers)]) is None


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.proof == "disproven" and "Mystery" not in case.name],
    ids=lambda case: case.name,
)
def test_what_is_disproven_does_go_wrong(case: Case) -> None:
    """The cases are worth refusing: of a few batches, one differs from its callers' own runs, or fails."""
    random = np.random.default_rng(0)
    session = session_of(case.model)
    assert any(difference(session, [case.rows(random) for _ in range(callers)]) for callers in (2, 2, 3, 3, 4))


def test_a_side_that_the_session_fixes_is_taken_as_fixed() -> None:
    made = graphs.model(
        [node("Reshape", ["x", "s"], ["y"])], [value("x", ["n", "t"])], [value("y", ["n", 2, "m"])],
        [const("s", [-1, 2, 3], "i8")])  # fmt: skip
    assert prove(made).proof is Proof.UNKNOWN
    assert prove(made, {"t": 6}).proof is Proof.PROVEN
    assert prove(made, {"n": 1}).reason == "x has no open first axis"


def test_an_output_that_is_no_list_of_rows_is_never_parted() -> None:
    kept = graphs.model([node("Identity", ["x"], ["y"])], [value("x", ["n", 4])], [value("y", [1, 4])])
    assert prove(kept).reason == "y has no open first axis"
    turned = simple("turned", [node("Transpose", ["x"], ["y"], perm=[1, 0])], "disproven")
    assert "along its first axis" in prove(turned.model).reason
    doubled = simple(
        "doubled", [node("Reshape", ["x", "s"], ["y"])], "disproven", constants=[const("s", [-1, 2], "i8")]
    )
    assert "a row for each row" in prove(doubled.model).reason


def test_the_reason_says_what_lies_along_the_rows() -> None:
    pinned = simple("two", [node("Add", ["x", "c"], ["y"])], "disproven", constants=[const("c", [[1.0], [2.0]], "f4")])
    assert prove(pinned.model).reason == "Add 'y': a fixed side of 2 lies along the rows"


def test_sides_that_a_loop_changes_are_not_taken_for_those_before_it() -> None:
    """Each round adds a token to what is carried: laid out by the shape before the loop, rows would fall apart."""
    body = helper.make_graph(
        [node("Identity", ["on"], ["still"]), node("Concat", ["state", "one"], ["next"], axis=1)], "body",
        [value("i", [], graphs.INT64), value("on", [], 9), value("state", None)],
        [value("still", [], 9), value("next", None)])  # fmt: skip
    made = graphs.model(
        [node("Slice", ["x", "zero", "five", "one1"], ["r"]), node("Slice", ["x", "zero", "one1", "one1"], ["one"]),
         node("Loop", ["two", "yes", "r"], ["long"], body=body), node("Shape", ["r"], ["s"], start=1),
         node("Concat", ["minus", "s"], ["target"], axis=0), node("Reshape", ["long", "target"], ["y"])],
        [value("x", ["n", "t"])], [value("y", ["m", "u"])],
        [const("two", 2, "i8"), const("yes", True, "?"), const("zero", [0], "i8"), const("one1", [1], "i8"),
         const("minus", [-1], "i8"), const("five", [5], "i8")])  # fmt: skip
    assert prove(made).proof is Proof.UNKNOWN


def test_an_initializer_that_is_also_an_input_is_a_constant() -> None:
    made = graphs.model(
        [node("Add", ["x", "w"], ["y"])], [value("x", ["n", 4]), value("w", [4])], [value("y", ["n", 4])],
        [const("w", [1] * 4, "f4")])  # fmt: skip
    assert prove(made).proof is Proof.PROVEN


def test_a_graph_that_calls_itself_to_no_end_is_given_up() -> None:
    """Forty functions, each of which calls the next one three times: 3^40 nodes in a few kilobytes."""
    functions = [
        helper.make_function(
            "local",
            f"F{at}",
            ["a"],
            ["b"],
            [
                node(
                    f"F{at + 1}",
                    ["a" if index == 0 else f"t{index}"],
                    ["b" if index == 2 else f"t{index + 1}"],
                    domain="local",
                )
                for index in range(3)
            ]
            if at < 30
            else [node("Relu", ["a"], ["b"])],
            [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        )
        for at in range(31)
    ]
    made = simple("deep", [node("F0", ["x"], ["y"], domain="local")], "unknown", domain="local", functions=functions)
    found = prove(made.model)
    assert (found.proof, "more nodes" in found.reason) == (Proof.UNKNOWN, True), found


def test_a_damaged_graph_is_unknown() -> None:
    missing = simple("missing", [node("Add", ["x", "nothing"], ["y"])], "unknown")
    wrong = simple("wrong", [node("Transpose", ["x"], ["y"], perm=[7, 7, 7])], "unknown")
    for case in (missing, wrong):
        assert prove(case.model).proof is Proof.UNKNOWN


def test_a_weight_need_not_be_there() -> None:
    made = simple(
        "weight", [node("MatMul", ["x", "w"], ["y"])], "proven", constants=[const("w", np.ones((4, 9)), "f4")]
    )
    made.model.graph.initializer[0].ClearField("raw_data")
    assert prove(made.model).proof is Proof.PROVEN


def test_older_operator_sets_than_the_table_has_are_unknown() -> None:
    made = onnx.ModelProto()
    made.CopyFrom(simple("old", [node("Relu", ["x"], ["y"])], "unknown").model)
    made.opset_import[0].version = 6
    assert prove(made).proof is Proof.UNKNOWN
