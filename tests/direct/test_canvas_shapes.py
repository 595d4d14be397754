"""The shapes of Celery's own integration tests (5.7, `t/integration/test_canvas.py`) with our tasks in them.

There numbers are added; here allocations are made, whose sizes go on: `n(4)` makes 4 bytes, `same` as many as the
result before it, `total` (a task of another service) adds a list of them, `fails` fails. docs/celery-tests.md says of each of
Celery's tests whether it holds, and where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Signature, chain, chord, group
from celery.exceptions import ChordError
from celery.result import GroupResult, ResultSet

from tests.direct.conftest import Caller
from tests.direct.shapes import Shapes, sizes
from tests.support.stack import eventually

Shape = Callable[[Shapes], Signature]

GOOD: dict[str, tuple[Shape, Any]] = {
    "simple chain": (lambda s: s.n(4) | s.same | s.same, 4),
    "single chain": (lambda s: chain(s.n(7)), 7),
    "complex chain": (lambda s: s.n(2) | (s.same | s.same | s.same) | group(s.same for _ in range(4)), [2, 2, 2, 2]),
    "group results in chain": (lambda s: group(s.n(3) | group(s.same, s.same)), [3, 3]),
    "chain of chain with a single task": (lambda s: chain([chain(s.n(42))]), 42),
    "chain inside group receives arguments": (lambda s: s.n(11) | group(s.same | s.same, s.same), [11, 11]),
    "group chord group chain": (
        lambda s: group(s.n(i) for i in (1, 2, 3)) | s.n(5) | group(s.n(6), s.n(7)), [6, 7],
    ),
    "group result not has cache": (lambda s: group(s.n(1), s.n(2), chain(s.n(5), group(s.n(3), s.n(4)))), [1, 2, [3, 4]]),
    "task, group and chord": (lambda s: s.n(1) | group(s.same, s.same) | group(s.total, s.total) | s.total, 4),
    "chords as groups chained to a task with two tasks": (
        lambda s: s.n(1) | group(s.same, s.same) | s.total | s.same | group(s.same, s.same) | s.total, 4,
    ),
    "chords with two tasks": (
        lambda s: s.n(1) | group(s.same, s.same) | s.total | s.same | chord(group(s.same, s.same), s.total), 4,
    ),
    "explicit chords": (
        lambda s: chain(
            chord(group(s.n(1), s.n(1)), s.total), chord(group(s.same, s.same), s.total)
        ) | chain(chord(group(s.same, s.same), s.total), chord(group(s.same, s.same), s.total)), 16,
    ),
    "nine chords": (
        lambda s: chain(chord(group(s.n(1) for _ in range(3)), s.total),
                        *(chord(group(s.same for _ in range(3)), s.total) for _ in range(8))), 3**9,
    ),
    "nine implicit chords": (
        lambda s: chain(group(s.n(1) for _ in range(3)), s.total,
                        *(part for _ in range(8) for part in (group(s.same for _ in range(3)), s.total))), 3**9,
    ),
    "nested chain led by a group": (lambda s: chain(chain(group(s.n(1), s.n(2)), s.total, s.same), s.same), 3),
    "deserialised chain led by a group": (
        lambda s: chain(
            s.read(json.dumps(chain(group(s.n(1), s.n(2)), s.total, s.same), default=str)), s.same
        ), 3,
    ),
    "chord and a group with two tasks": (
        lambda s: s.n(1) | group(s.same, s.same) | s.total | s.same | group(s.same, s.same), [2, 2],
    ),
    "chord, a task and a group": (lambda s: group(s.n(1), s.n(1)) | s.total | s.same | group(s.same, s.same), [2, 2]),
    "chord, three tasks and a group": (
        lambda s: group(s.n(1), s.n(1)) | s.total | s.same | s.same | s.same | group(s.same, s.same), [2, 2],
    ),
    "nested chain group lone": (lambda s: chain(group(s.n(42), s.n(37))), [42, 37]),
    "nested chain group mid": (lambda s: chain(s.n(42), group(s.same, s.same), s.listed), [42, 42]),
    "nested chain group last": (lambda s: chain(s.n(42), group(s.same, s.same)), [42, 42]),
    "group in center of chain": (
        lambda s: chain(chain(s.n(1), group(s.same, s.same), s.total), group(s.same, s.same), s.total), 4,
    ),
    "upgrade to chord inside chains": (
        lambda s: group(chain(s.n(1), group(s.same, s.same), s.total), s.n(5)) | s.total, 7,
    ),
    "groups of groups before a task": (
        lambda s: chain(group(s.n(1), s.n(2)), group(s.taken("0.size_bytes"), s.taken("1.size_bytes")), s.listed),
        [1, 2],
    ),
    "nested group": (lambda s: group(s.n(1), group(s.n(2), group(s.n(3), s.n(4)), s.n(5)), s.n(6)), [1, 2, 3, 4, 5, 6]),
    "large group": (lambda s: group(s.n(i) for i in range(1, 101)), list(range(1, 101))),
    "group lone": (lambda s: group(s.n(42)), [42]),
    "group of groups": (lambda s: group(group(s.n(42), s.n(37))), [42, 37]),
    "chord counting simple": (lambda s: group(chord((s.n(42),), s.listed)), [[42]]),
    "chord counting chain": (lambda s: group(chord((s.n(42) | s.same | s.same,), s.listed)), [[42]]),
    "chord counting group": (lambda s: group(chord((group(s.n(42), s.n(42)),), s.listed)), [[42, 42]]),
    "chord counting chord": (lambda s: group(chord((chord((s.n(42), s.n(42)), s.total),), s.listed)), [[84]]),
    "chord counting mixed": (
        lambda s: group(chord((s.n(1), s.n(2) | s.same, group(s.n(4), s.n(4)), chord((s.n(5),), s.total)), s.listed)),
        [[1, 2, 4, 4, 5]],
    ),
    "chord body chain": (lambda s: group(chord((s.n(42),), chain(s.total, s.same, s.same))), [42]),
    "group chain": (lambda s: s.n(2) | group(s.same, s.same | s.same) | s.total, 4),
    "nested group chain": (
        lambda s: chain(
            s.n(1), group(s.same, chain(s.same, group(s.same, s.same), s.total)), s.total, s.same
        ), 3,
    ),
    "single task header": (lambda s: chord([s.n(2)], s.total), 2),
    "empty header": (lambda s: chord([], s.total), 0),
    "nested chord": (
        lambda s: chord([s.n(1), chord([s.n(2), chord([s.n(3), s.n(4)], s.total)], s.total)], s.total), 10,
    ),
    "generator header": (lambda s: chord((s.n(i) for i in range(1, 11)), s.total), 55),
    "chord in chords with chains": (
        lambda s: chord(
            group([chain(s.n(1), chord(group([s.same, s.same]), s.total)),
                   chain(s.n(2), chord(group([s.same, s.same]), s.total))]), s.total
        ), 6,
    ),
    "chain chord chain chord": (
        lambda s: chain(
            chain(s.n(5), chord([s.same, chain(s.same, s.same)], chain(s.total, s.same))),
            chord([s.same, s.same], s.total),
        ), 20,
    ),
    "chord in chain": (lambda s: chain(s.n(1), chord(group([s.same, s.same]), s.listed)), [1, 1]),
    "large header": (lambda s: group(s.n(1) for _ in range(60)) | s.total, 60),
    "chain to a chord with a large header": (lambda s: s.n(1) | group(s.same for _ in range(60)) | s.total, 60),
    "nested chord group": (
        lambda s: chord((chord((group(s.n(1), s.n(2)), s.n(3)), s.total), s.n(4)), s.total), 10,
    ),
    "nested chord group chain group tail": (
        lambda s: chord(group(chain(s.n(42), group(s.same, s.same))), s.listed), [[42, 42]],
    ),
    "chain of implicit chords as body": (
        lambda s: chord([s.n(1), s.n(2)], chain(s.total, group(s.same, s.same), s.total)), 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_shape_comes_to_its_result(plain: Caller, name: str) -> None:
    shape, expected = GOOD[name]
    assert sizes(shape(Shapes(plain)).apply_async().get(timeout=60)) == expected


#: Shapes with a failing task: what is linked to the error of the whole is called, so often.
BAD: dict[str, tuple[Shape, int]] = {
    "chain, first": (lambda s: chain(s.fails, s.n(1)), 1),
    "chain, last": (lambda s: chain(s.n(1), s.fails), 1),
    "group, first": (lambda s: group(s.fails, s.n(1)), 1),
    "group, last": (lambda s: group(s.n(1), s.fails), 1),
    "group, several": (lambda s: group(s.fails, s.n(1), s.fails, s.fails), 3),
    "chord header": (lambda s: chord([s.n(1), s.fails], s.listed), 1),
    "chord header, several": (lambda s: chord([s.fails, s.n(1), s.fails], s.listed), 1),
    "chord header of ours before a body of ours": (lambda s: chord([s.n(1), s.fails], s.taken("0.size_bytes")), 1),
    "chord body": (lambda s: chord([s.n(1), s.n(2)], s.fails), 1),
    "chord header chain": (lambda s: chord([chain(s.n(1), s.fails)], s.listed), 1),
    "chord header chain tail": (lambda s: chord([chain(s.fails, s.n(1), s.n(2))], s.listed), 1),
    "chord header group": (lambda s: chord([group(s.n(1), s.fails)], s.listed), 1),
    "chord body chain": (lambda s: chord([s.n(1), s.n(2)], chain(s.total, s.fails)), 1),
    "chord after a chord": (lambda s: chain(chord([s.n(1), s.fails], s.total), chord([s.same, s.same], s.total)), 1),
    "chord in a chord": (lambda s: chord([s.n(1), chord([s.n(2), s.fails], s.total)], s.total), 1),
}  # fmt: skip


@pytest.mark.parametrize("immutable", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_shape_with_a_failing_task_fails_and_its_errback_is_called(plain: Caller, name: str, immutable: bool) -> None:
    shape, times = BAD[name]
    s = Shapes(plain)
    plain.forget_notes()
    made = shape(s)
    made.link_error(s.noted("error") if immutable else plain.plain("note", "error"))
    sent = made.apply_async()
    with pytest.raises(Exception, match="not-there"):
        sent.get(timeout=30)

    def errors() -> list[Any]:
        return [note for note in plain.notes() if "error" in note["args"]]

    eventually(lambda: len(errors()) >= times)
    # A task that comes after whatever else was published.
    s.noted("last").apply_async().get(timeout=30)
    assert len(errors()) == times
    if not immutable:
        assert all(isinstance(note["args"][0], str) for note in errors())


def test_a_failing_chain_and_its_parents_say_so(plain: Caller) -> None:
    s = Shapes(plain)
    last = chain(s.n(1), s.fails, s.n(2)).apply_async()
    for result in (last, last.parent):
        with pytest.raises(Exception, match="not-there"):
            result.get(timeout=30)
        assert result.state == "FAILURE"
    assert last.parent.parent.get(timeout=10)["size_bytes"] == 1


def test_the_chord_error_names_the_part_that_failed(plain: Caller) -> None:
    s = Shapes(plain)
    parts = [s.n(1), s.fails.set(task_id=f"part-{id(s)}")]
    body = chord(parts)(s.listed)
    with pytest.raises(ChordError, match=rf"Dependency part-{id(s)} raised"):
        body.get(timeout=30, follow_parents=False)


def test_children_with_callbacks_call_each_once(plain: Caller) -> None:
    s = Shapes(plain)
    plain.forget_notes()
    child = s.n(1)
    child.link(s.noted("callback"))
    chain(child.clone() for _ in range(10)).apply_async().get(timeout=30)
    group(child.clone() for _ in range(10)).apply_async().get(timeout=30)
    chord((child.clone() for _ in range(10)), s.total).apply_async().get(timeout=30)
    eventually(lambda: len([note for note in plain.notes() if note["args"] == ["callback"]]) == 30)


def test_a_chain_whose_children_have_errbacks_calls_that_of_the_failed_one(plain: Caller) -> None:
    s = Shapes(plain)
    plain.forget_notes()
    child = s.fails
    child.link_error(s.noted("error"))
    with pytest.raises(Exception, match="not-there"):
        chain(child.clone() for _ in range(10)).apply_async().get(timeout=30)
    plain.noted()
    s.noted("last").apply_async().get(timeout=30)
    assert [note["args"] for note in plain.notes()] == [["error"], ["last"]]


def test_links_of_an_inner_chain_are_kept(plain: Caller) -> None:
    s = Shapes(plain)
    plain.forget_notes()
    inner = chain(s.n(1), s.same)
    inner.link(s.noted("inner"))
    assert chain(inner, s.same).apply_async().get(timeout=30)["size_bytes"] == 1
    eventually(lambda: ["inner"] in [note["args"] for note in plain.notes()])


def test_parents_roots_and_children(plain: Caller) -> None:
    s = Shapes(plain)
    plain.forget_notes()
    last = chain(s.n(1), s.listed, s.same, s.listed).apply_async()
    last.get(timeout=30)
    first = last.parent.parent.parent
    assert [note["parent_id"] for note in plain.noted(2)] == [first.id, last.parent.id]
    assert {note["root_id"] for note in plain.notes()} == {first.id}
    assert [child.id for child in first.children] == [last.parent.parent.id]
    assert [result.id for result, _ in first.collect()][-1] == last.id
    assert first.get_leaf()["size_bytes"] == 1


def test_a_group_is_saved_restored_iterated_and_revoked(plain: Caller) -> None:
    s = Shapes(plain)
    sent = group(s.n(1), s.n(2), s.fails).apply_async()
    sent.save()
    found = GroupResult.restore(sent.id, app=plain.app)
    eventually(found.ready)
    assert (found.completed_count(), found.failed(), found.successful()) == (2, True, False)
    both = group(s.n(1), s.n(2)).apply_async()
    assert {task_id: meta["status"] for task_id, meta in both.iter_native()} == dict.fromkeys(
        [one.id for one in both.results], "SUCCESS"
    )
    later = group(s.n(1).set(countdown=60), s.n(2).set(countdown=60)).apply_async()
    for one in later.results:
        eventually(lambda one=one: plain.job(one.id))
    later.revoke()
    for one in later.results:
        assert plain.ended(one.id, 5)["state"] == "cancelled"


def test_a_result_set_gathers_tasks_of_both_services(plain: Caller) -> None:
    s = Shapes(plain)
    results = ResultSet([s.n(1).apply_async(), s.noted("x").apply_async()], app=plain.app)
    results.add(s.n(3).apply_async())
    assert sizes(results.get(timeout=30)) == [1, "x", 3]
    failing = ResultSet([s.n(1).apply_async(), s.fails.apply_async()], app=plain.app)
    with pytest.raises(Exception, match="not-there"):
        failing.get(timeout=30)


def test_a_chain_with_an_eta_and_an_error_handler(plain: Caller) -> None:
    s = Shapes(plain)
    made = chain(group(s.n(1), s.n(2)), s.total).on_error(s.noted("error"))
    assert made.apply_async(countdown=1).get(timeout=30) == {"size_bytes": 3}
