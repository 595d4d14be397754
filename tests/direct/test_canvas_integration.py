"""Chains, groups and chords as Celery's integration tests make them, with arguments, ids, retries and replacements.

Shapes without those are in `test_canvas_shapes.py`; docs/celery-tests.md says where each of Celery's own tests is found.
"""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import uuid4

import pytest
from celery import Signature, chain, chord, group, signature
from celery.canvas import _chain
from celery.result import AsyncResult, GroupResult, ResultBase

from tests.direct.conftest import Caller
from tests.direct.shapes import Shapes, sizes


@pytest.fixture
def s(plain: Caller) -> Shapes:
    plain.forget_notes()
    return Shapes(plain)


def result_of(made: Signature, **options: Any) -> Any:
    return sizes(made.apply_async(**options).get(timeout=60))


def ids_in(made: Any) -> list[str]:
    """The ids of all results in a result's tuple."""
    if isinstance(made, ResultBase):
        return ids_in(made.as_tuple())
    if isinstance(made, str):
        return [made]
    return [] if made is None else [found for part in made for found in ids_in(part)]


# ---- arguments


def test_a_chain_begins_with_the_callers_argument(s: Shapes) -> None:
    assert result_of(chain(chain(s.same, s.same)), args=({"size_bytes": 5},)) == 5
    assert result_of(chain(chord([s.same, s.same], s.listed), s.listed), args=({"size_bytes": 5},)) == [5, 5]
    assert result_of(group(s.same, s.same) | s.total, args=({"size_bytes": 5},)) == 10


def test_named_arguments_of_a_canvas_reach_each_task_that_is_mutable(plain: Caller, s: Shapes) -> None:
    sent = group(s.same, s.same).apply_async(args=({"size_bytes": 5},), kwargs={"job": {"labels": {"order": "7"}}})
    sent.get(timeout=30)
    assert [plain.ended(one.id)["labels"] for one in sent.results] == [{"order": "7"}] * 2


def test_a_task_is_given_one_result(s: Shapes) -> None:
    with pytest.raises(Exception, match="one positional argument at most, not 2"):
        s.same.apply_async(args=({"size_bytes": 5}, {"size_bytes": 6})).get(timeout=30)


# ---- what is empty


def test_empty_parts_are_left_out(plain: Caller, s: Shapes) -> None:
    assert result_of(chain(group(s.n(2), s.n(4)), group(), group(), app=plain.app)) == [2, 4]
    assert result_of(_chain(group(s.n(2), s.n(4)), group(), group(), s.total, app=plain.app)) == 6
    assert result_of(_chain(group(), s.same, app=plain.app), args=({"size_bytes": 5},)) == 5
    assert result_of(_chain(chain(), s.same, app=plain.app), args=({"size_bytes": 5},)) == 5
    assert (
        result_of(_chain(_chain(group(), s.same, app=plain.app), s.same, app=plain.app), args=({"size_bytes": 5},)) == 5
    )
    assert result_of(group(chain(), s.n(3), chain(), s.n(7), app=plain.app)) == [3, 7]
    assert result_of(chord([chain()], body=s.total, app=plain.app)) == 0
    assert result_of(chord([chain(), s.n(2), chain(), s.n(4)], body=s.total, app=plain.app)) == 6


def test_an_empty_group_is_saved_and_restored(plain: Caller) -> None:
    sent = group([], app=plain.app).apply_async()
    sent.save(backend=plain.app.backend)
    assert GroupResult.restore(sent.id, app=plain.app).results == []


# ---- ids, parents, children


def test_a_canvas_has_each_id_once(s: Shapes) -> None:
    sent = group(s.n(1), chain(s.n(2), group(s.n(3), s.n(4)))).apply_async()
    assert sizes(sent.get(timeout=60)) == [1, [3, 4]]
    assert len(set(ids_in(sent))) == len(ids_in(sent)) == 6
    sent = chord(group(s.n(1), s.n(2)), group(s.n(3), s.n(4))).apply_async()
    assert sizes(sent.get(timeout=60)) == [3, 4]
    assert len(set(ids_in(sent))) == len(ids_in(sent)) == 6


@pytest.mark.parametrize("options", [{}, {"task_id": "id"}])
def test_two_groups_in_a_chain(s: Shapes, options: dict[str, str]) -> None:
    options = {name: str(uuid4()) for name in options}
    made = chain(s.n(1), group(s.same, s.same), group(s.total, s.total), s.total, s.same, **options)
    sent = made.apply_async()
    assert len(set(ids_in(sent))) == len(ids_in(sent)) == 9
    assert sizes(sent.get(timeout=60)) == 4
    if options:
        assert sent.id == options["task_id"]


def test_a_chords_body_is_a_chain_with_an_id_of_its_own(s: Shapes) -> None:
    body = chain(s.n(1), group(s.n(2), s.n(3)), s.n(4) | s.n(6), task_id=str(uuid4()))
    made = chord([s.n(2), s.n(3)], body)
    made.freeze()
    sent = made.apply_async()
    assert len(set(ids_in(sent))) == len(ids_in(sent))
    assert sizes(sent.get(timeout=60)) == 6


def test_freezing_a_chain_fixes_the_id_of_its_last_task(plain: Caller, s: Shapes) -> None:
    last_id = str(uuid4())
    made = s.n(4) | s.same.set(task_id=last_id)
    made.freeze(last_id)
    assert made.apply_async().id == last_id
    assert plain.ended(last_id)["result"]["size_bytes"] == 4


def test_parents_and_root_through_a_chord(plain: Caller, s: Shapes) -> None:
    root = s.n(1)
    root_id = root.freeze().id
    last = chain(root, s.listed, group(s.listed for _ in range(5)), s.listed, s.same_of_first, s.listed).apply_async()
    last.get(timeout=60)
    ours, body = last.parent, last.parent.parent
    header = body.parent
    assert isinstance(header, GroupResult)
    second = header.parent
    assert (second.parent.id, second.parent.parent) == (root_id, None)
    notes = {note["id"]: note for note in plain.noted(8)}
    assert {note["root_id"] for note in notes.values()} == {root_id}
    assert notes[second.id]["parent_id"] == root_id
    assert {notes[one.id]["parent_id"] for one in header.results} == {second.id}
    assert notes[body.id]["parent_id"] in {one.id for one in header.results}
    assert notes[last.id]["parent_id"] == ours.id
    assert {notes[one.id]["group"] for one in header.results} == {header.id}


def test_parents_and_root_where_ours_are_the_group(plain: Caller, s: Shapes) -> None:
    root = s.listed.clone(args=({"size_bytes": 3},))
    root_id = root.freeze().id
    sent = chain(root, s.same, group(s.same | s.listed for _ in range(3)), s.total | s.listed).apply_async()
    assert sizes(sent.get(timeout=60)) == 9
    notes = [note for note in plain.noted(6) if note["id"] != root_id]
    assert {note["root_id"] for note in notes} == {root_id}
    ours = {note["parent_id"] for note in notes}
    for task_id in ours:
        assert isinstance(AsyncResult(task_id, app=plain.app).get(timeout=5), dict)


def test_the_same_frozen_chord_again_runs_nothing_again(plain: Caller, s: Shapes) -> None:
    """Differs: a task's id is a job's, and a job runs once."""
    made = chord(group(s.n(1), s.n(2)), s.total)
    made.freeze()
    first = made.apply_async()
    assert sizes(first.get(timeout=30)) == 3
    again = made.apply_async()
    assert again.id == first.id
    s.noted("last").apply_async().get(timeout=30)
    assert [note["args"] for note in plain.notes() if note["id"] == first.id] == [[first.parent.get()]]


# ---- protocols, serialised, frozen


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("serialized", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("in_body", [False, True])
def test_results_of_a_group_reach_each_task_of_the_next(
    plain: Caller, s: Shapes, protocol: int, serialized: bool, frozen: bool, in_body: bool
) -> None:
    plain.app.conf.task_protocol = protocol
    try:
        steps = [group(s.n(1) for _ in range(3)), *(group(s.total for _ in range(3)) for _ in range(2))]
        made = chain(*steps, s.total, s.same, app=plain.app)
        if in_body:
            made = chord([s.n(1), s.n(1)], made)
        if frozen:
            made.freeze()
        if serialized:
            made = signature(json.loads(json.dumps(made)), app=plain.app)
        assert result_of(made) == 27
        sums = [note["id"] for note in plain.notes() if note["task"] == "plain.total"]
        assert len(sums) == len(set(sums)) == 7
    finally:
        plain.app.conf.task_protocol = 2


def test_a_thousand_tasks_in_a_header(s: Shapes) -> None:
    assert result_of(group(s.n(1) for _ in range(1000)) | s.total) == 1000
    assert result_of(s.n(1) | group(s.same for _ in range(1000)) | s.total) == 1000


def test_a_generator_is_unrolled_as_it_is_sent(s: Shapes) -> None:
    made = group(s.n(size) for size in range(1, 5))
    assert [len(made.tasks) for _ in made.tasks] == [4] * 4
    assert result_of(made) == [1, 2, 3, 4]


def test_chords_side_by_side(s: Shapes) -> None:
    assert result_of(group(chord(group(s.n(3), s.n(7)), s.total), chord(group(s.n(3), s.n(7)), s.total))) == [10, 10]


def test_a_chord_is_nested_in_groups_four_deep(s: Shapes) -> None:
    made = group([group([group([group([s.n(3)]) | s.listed]) | s.listed]) | s.listed]) | s.listed
    assert result_of(made) == [[[[3]]]]


@pytest.mark.parametrize("last_is_a_group", [False, True])
def test_chained_groups_run_each_task_once(plain: Caller, s: Shapes, last_is_a_group: bool) -> None:
    def noted(*names: int) -> Any:
        return group(chain(s.n(name), s.listed) for name in names)

    done = group(s.noted("done")) if last_is_a_group else s.noted("done")
    for made in (
        chain(noted(1, 2, 3), noted(4, 5, 6), noted(7), noted(8), s.noted("9"), done),
        chain(chord(noted(1, 2, 3), noted(4, 5, 6)), noted(7), noted(8), s.noted("9"), done),
        chain(chord([*noted(1, 2).tasks], noted(3, 4)), chord(noted(5, 6), noted(7, 8)), s.noted("9"), done),
    ):
        plain.forget_notes()
        made.apply_async().get(timeout=60)
        notes = [note["args"][0] for note in plain.notes()]
        assert sorted(note["size_bytes"] for note in notes if isinstance(note, dict)) == list(range(1, 9))
        assert [note for note in notes if isinstance(note, str)] == ["9", "done"]


# ---- options on a canvas


def test_a_countdown_delays_the_whole_header(plain: Caller, s: Shapes) -> None:
    began = time.time()
    sent = (group(s.n(1), s.n(2)) | s.total).apply_async(countdown=2)
    assert sizes(sent.get(timeout=30)) == 3
    assert time.time() - began >= 1.9
    for one in sent.parent.results:
        assert plain.ended(one.id)["timings"]["total_ms"] >= 1500


def test_priorities_of_a_chains_tasks_are_their_own(plain: Caller, s: Shapes) -> None:
    sent = chain(s.n(1).set(priority=3), s.same.set(priority=7), s.same).apply_async()
    sent.get(timeout=30)
    jobs = [plain.ended(task.id)["priority"] for task in (sent.parent.parent, sent.parent, sent)]
    assert jobs == [6, 2, 5]


def test_an_option_link_is_called_after_the_body(plain: Caller, s: Shapes) -> None:
    body = s.total
    body.link(s.noted("own"))
    chord([s.n(2), s.n(4)], body).apply_async(link=s.noted("chord")).get(timeout=30)
    s.errors(1, "own")
    s.errors(1, "chord")
    plain.forget_notes()
    chain(s.n(2), chord([s.same, s.same], s.total)).apply_async(link=s.noted("chord")).get(timeout=30)
    s.errors(1, "chord")
    plain.forget_notes()
    first = s.taken("0.size_bytes")
    first.link(s.noted("own"))
    sent = chord([s.n(2), s.n(4)], group(first, s.total)).apply_async(link=s.noted("chord"))
    assert sizes(sent.get(timeout=30)) == [2, 6]
    s.errors(1, "own")
    s.errors(1, "chord")


def test_a_groups_callback_is_called_once(s: Shapes) -> None:
    made = group(s.n(1), s.n(2))
    made.link(s.noted("callback"))
    made.apply_async().get(timeout=30)
    s.errors(1, "callback")


@pytest.mark.parametrize("serialized", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_chords_in_a_chords_body_keep_the_id_and_the_last_link(
    plain: Caller, s: Shapes, serialized: bool, frozen: bool
) -> None:
    steps = [s.total]
    for _ in range(3):
        steps.extend([group(s.same, s.same), s.total])
    callback = s.listed
    called = callback.freeze()
    steps[-1].link(callback)
    made = chord([s.n(1), s.n(2)], chain(*steps))
    task_id = str(uuid4())
    if frozen:
        assert made.freeze(task_id).id == task_id
    if serialized:
        made = signature(json.loads(json.dumps(made)), app=plain.app)
    sent = made.apply_async(task_id=task_id)
    assert sent.id == task_id
    assert sizes(sent.get(timeout=60)) == 24
    assert sizes(plain.app.AsyncResult(called.id).get(timeout=30)) == 24


# ---- tasks of another service that replace themselves, add to a chord, or are retried, next to ours


def test_a_task_of_another_service_replaces_itself_by_ours(plain: Caller, s: Shapes) -> None:
    by = s.n(8)
    assert result_of(plain.plain("replaced", by=by)) == 8
    linked = plain.plain("replaced", by=by)
    linked.link(s.noted("linked"))
    assert result_of(linked) == 8
    s.errors(1, "linked")
    assert result_of(chain(plain.plain("replaced", by=by), s.same)) == 8
    assert result_of(chain(s.n(1), plain.plain("replaced", by=by), s.same)) == 8
    assert result_of(chain(s.n(1), plain.plain("replaced", by=chain(s.n(3), s.same)))) == 3
    assert result_of(group(plain.plain("replaced", by=by), s.n(2))) == [8, 2]
    assert result_of(chord([plain.plain("replaced", by=by), s.n(2)], s.total)) == 10
    assert result_of(chord([plain.plain("replaced", by=chain(s.n(3), s.same)), s.n(2)], s.total)) == 5
    assert result_of(chord([s.n(2)], plain.plain("replaced", by=chain(s.n(3), s.same)))) == 3
    assert result_of(plain.plain("replaced", by=group(s.n(1), s.n(2)))) == [1, 2]
    assert result_of(plain.plain("replaced", by=chord([s.n(1), s.n(2)], s.total))) == 3


def test_a_replacement_that_fails_calls_the_errback_of_what_it_replaces(plain: Caller, s: Shapes) -> None:
    made = plain.plain("replaced", by=s.fails)
    made.link_error(s.noted("error"))
    with pytest.raises(Exception, match="not-there"):
        result_of(made)
    s.errors(1)


def test_a_task_of_another_service_adds_ours_to_its_chord(plain: Caller, s: Shapes) -> None:
    more = [s.n(1), s.n(2), s.n(3)]
    assert sorted(result_of(group([plain.plain("adds", more)]) | s.listed)) == [0, 1, 2, 3]
    nested = [group(s.n(1), s.n(2)) | s.total]
    assert sorted(result_of(group([plain.plain("adds", nested)]) | s.listed)) == [0, 3]


def test_a_retried_task_of_another_service_goes_on(plain: Caller, s: Shapes) -> None:
    assert result_of(chain(s.n(3), plain.plain("retried"), s.same)) == 3
    assert result_of(chord([s.n(3), plain.plain("retried", {"size_bytes": 2})], s.total)) == 5
