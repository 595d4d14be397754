"""Errors in chains, groups and chords, and the callbacks for them, as Celery's integration tests try them.

docs/celery-tests.md says where each of Celery's own tests is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from celery import Signature, chain, chord, group

from tests.direct.conftest import Caller
from tests.direct.shapes import Shapes, sizes
from tests.support.stack import eventually


@pytest.fixture
def s(plain: Caller) -> Shapes:
    plain.forget_notes()
    return Shapes(plain)


@pytest.fixture
def on_headers(plain: Caller) -> Iterator[None]:
    """A chord's `link_error` is for the tasks of its header too, by the caller's configuration."""
    plain.app.conf.task_allow_error_cb_on_chord_header = True
    yield
    plain.app.conf.task_allow_error_cb_on_chord_header = False


def fails(sent: Any) -> None:
    with pytest.raises(Exception, match="not-there"):
        sent.get(timeout=30)


# ---- what an errback is given


@pytest.mark.parametrize("where", ["args", "kwargs"])
def test_an_errback_keeps_its_own_arguments(plain: Caller, s: Shapes, where: str) -> None:
    stored = {"args": ("error",)} if where == "args" else {"kwargs": {"label": "error"}}
    failing = s.fails
    failing.link_error(plain.app.signature("plain.note", **stored))
    sent = failing.apply_async()
    fails(sent)
    (note,) = plain.noted()
    assert (note["args"], note["kwargs"]) == (
        ([sent.id, "error"], {}) if where == "args" else ([sent.id], {"label": "error"})
    )
    assert (note["parent_id"], note["root_id"]) == (sent.id, sent.id)


@pytest.mark.parametrize(
    ("shape", "whose"),
    [
        (lambda s, bad: group(bad, s.n(1)), "failed"),
        (lambda s, bad: chord([bad], s.listed), "body"),
        (lambda s, bad: chord([s.n(1)], bad), "body"),
        (lambda s, bad: chord([chain(s.n(1), bad, s.n(2))], s.listed), "body"),
        (lambda s, bad: chord([s.n(1)], chain(s.n(2), bad, s.n(3))), "failed"),
        (lambda s, bad: chord([chain(s.n(1), bad)], s.listed), "body"),
        (lambda s, bad: chord([s.n(1)], chain(s.n(2), bad)), "failed"),
        (lambda s, bad: chord([group(s.n(1), bad)], s.listed), "body"),
        (lambda s, bad: chord([s.n(1)], group(s.n(2), bad)), "failed"),
    ],
    ids=["group", "header", "body", "header chain", "body chain", "header chain's end", "body chain's end",
         "header group", "body group"],
)  # fmt: skip
def test_a_mutable_errback_is_given_the_id_of_what_failed(
    plain: Caller, s: Shapes, shape: Callable[[Shapes, Signature], Signature], whose: str
) -> None:
    bad = s.fails
    failed_id = bad.freeze().id
    made = shape(s, bad)
    made.link_error(plain.plain("note", "error"))
    if whose == "body":
        failed_id = made.body.freeze().id
    fails(made.apply_async())
    assert [note["args"] for note in s.errors(1)] == [[failed_id, "error"]]


def test_each_failing_task_of_a_group_body_calls_the_errback(plain: Caller, s: Shapes) -> None:
    bad = [s.fails for _ in range(5)]
    failed_ids = [task.freeze().id for task in bad]
    made = chord([s.n(1)], group(s.n(2), *bad))
    made.link_error(plain.plain("note", "error"))
    fails(made.apply_async())
    assert sorted(note["args"][0] for note in s.errors(5)) == sorted(failed_ids)


def test_an_errback_of_ours_runs_and_may_name_the_failed_task(plain: Caller, s: Shapes) -> None:
    failing = s.fails
    job = {"labels": {"failed": {"$previous": ""}}}
    named = plain.task("memory.allocate", {"size_bytes": 4, "job": job}).set(task_id=str(uuid4()))
    without = s.n(4).set(task_id=str(uuid4()))
    failing.link_error(named)
    failing.link_error(without)
    sent = failing.apply_async()
    fails(sent)
    assert plain.ended(named.options["task_id"])["labels"] == {"failed": sent.id}
    assert plain.ended(without.options["task_id"])["state"] == "succeeded"


def test_an_errback_that_is_retried(plain: Caller, s: Shapes) -> None:
    sent = s.fails.apply_async(link_error=plain.plain("retried", "error"))
    fails(sent)
    assert [note["args"] for note in s.errors(1)] == [[sent.id, "error"]]


def test_an_errback_of_the_newer_form_is_called_with_the_id_too(plain: Caller, s: Shapes) -> None:
    """Differs: our worker has no code of it, so it cannot call it with the error itself."""
    errback = plain.plain("newer").set(task_id=str(uuid4()))
    fails(s.fails.apply_async(link_error=errback))
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        plain.app.AsyncResult(errback.options["task_id"]).get(timeout=30)


# ---- errors in a header, in a body


HEADERS: list[Callable[[Shapes], list[Signature]]] = [
    lambda s: [s.fails],
    lambda s: [s.fails, s.fails, s.fails],
    lambda s: [s.fails, s.n(1)],
    lambda s: [s.fails, s.n(1), s.n(2)],
    lambda s: [s.fails, s.n(1), s.fails, s.n(2), s.fails],
]
HEADER_IDS = ["one", "three", "one of two", "one of three", "three of five"]


@pytest.mark.parametrize("header", HEADERS, ids=HEADER_IDS)
def test_errbacks_of_a_header_and_of_its_body(
    plain: Caller, s: Shapes, header: Callable[[Shapes], list[Signature]], on_headers: None
) -> None:
    made = chord(header(s), s.noted("body"))
    for task in made.tasks:
        task.link_error(s.noted("of header"))
    made.body.link_error(s.noted("of body"))
    fails(made.apply_async())
    s.errors(1, "of body")
    s.errors(len([task for task in made.tasks if task.task.endswith("clear")]), "of header")
    assert ["body"] not in [note["args"] for note in plain.notes()]


@pytest.mark.parametrize("header", HEADERS, ids=HEADER_IDS)
def test_a_chords_errback_is_called_once_whatever_fails(
    plain: Caller, s: Shapes, header: Callable[[Shapes], list[Signature]]
) -> None:
    made = chord(header(s), s.noted("body"))
    made.link_error(s.noted("error"))
    fails(made.apply_async())
    s.errors(1)
    assert ["body"] not in [note["args"] for note in plain.notes()]


@pytest.mark.parametrize("header", HEADERS[1:], ids=HEADER_IDS[1:])
def test_a_chords_errback_on_its_header_where_the_caller_asks_for_that(
    plain: Caller, s: Shapes, header: Callable[[Shapes], list[Signature]], on_headers: None
) -> None:
    tasks = header(s)
    made = chain(group(tasks), s.noted("body"))
    made.link_error(s.noted("error"))
    fails(made.apply_async())
    s.errors(1 + len([task for task in tasks if task.task.endswith("clear")]))
    plain.forget_notes()
    fails(chain(s.n(1), group(s.fails, s.fails), s.noted("body")).on_error(s.noted("error")).apply_async())
    s.errors(3)


@pytest.mark.parametrize(
    "body",
    [
        lambda s: s.n(1),
        lambda s: chain(s.n(1), s.n(2)),
        lambda s: group(s.n(1), s.n(2)),
        lambda s: chord(group(s.n(1), s.n(2)), s.n(3)),
        lambda s: chord(group(s.n(1), s.n(2)), s.listed),
    ],
    ids=["task", "chain", "group", "chord of ours", "chord"],
)
def test_each_form_of_body_fails_with_its_header(s: Shapes, body: Callable[[Shapes], Signature]) -> None:
    fails(chain(group(s.n(1), s.fails), body(s)).apply_async())


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("group_body", [False, True])
def test_a_headers_failure_fails_the_chords_after_it(s: Shapes, failing: int, group_body: bool) -> None:
    header = [s.n(1), s.fails] if failing == 1 else [s.fails, s.fails]
    body = group(s.total, s.total) if group_body else s.total
    inner = chain(chord(header, body), chord([s.total, s.total] if group_body else [s.same, s.same], s.total))
    sent = group(inner, s.n(2)).apply_async()
    with pytest.raises(Exception, match="not-there"):
        sent.get(timeout=30)
    assert sent.results[0].state == "FAILURE"
    assert sizes(sent.results[1].get(timeout=30)) == 2


def test_errors_in_nested_chains_and_chords_come_through(s: Shapes) -> None:
    fails(chain(chain(group(s.n(1), s.fails), s.listed), s.listed).apply_async())
    fails(chain(group(s.n(1), chain(s.fails, group(s.n(2), s.n(3)), s.n(4))), s.listed).apply_async())
    fails((s.n(1) | s.same | group(s.same, s.fails)).apply_async())


def test_a_group_at_a_chains_end_after_an_error_stays_pending_as_with_celery(s: Shapes) -> None:
    """Celery marks single tasks of a chain that will not run; its own test of this is expected to fail (#6437)."""
    sent = (s.n(1) | s.fails | group(s.same, s.same)).apply_async()
    fails(sent.parent)
    assert [one.state for one in sent.results] == ["PENDING", "PENDING"]


@pytest.mark.parametrize("failure", ["header", "body"])
def test_a_chord_at_the_end_of_a_chords_body_fails(s: Shapes, failure: str) -> None:
    first = group(s.fails, s.n(3)) if failure == "header" else group(s.n(3))
    inner = chain(s.fails if failure == "body" else s.total, group(s.same, s.same), s.total)
    inner.link_error(s.noted("error"))
    fails(chord([s.n(2)], chain(s.total, chord(first, inner))).apply_async())
    s.errors(1)


# ---- `link_error` as an option


@pytest.mark.parametrize(("body", "times"), [("group", 2), ("chord", 1)])
def test_the_option_is_called_when_a_header_fails(s: Shapes, body: str, times: int) -> None:
    made = group(s.total, s.total) if body == "group" else chord([s.total, s.total], s.total)
    fails(chord([s.n(1), s.fails], made).apply_async(link_error=s.noted("error")))
    s.errors(times)


def test_the_option_and_a_bodys_own_errback_are_both_called(plain: Caller, s: Shapes) -> None:
    body = s.fails
    body.link_error(s.noted("own"))
    fails(chord([s.n(1)], body).apply_async(link_error=s.noted("error")))
    s.errors(1, "own")
    s.errors(1)
    plain.forget_notes()
    failing = s.fails
    failing.link_error(s.noted("own"))
    fails(chord([s.n(1)], group(failing, s.total)).apply_async(link_error=s.noted("error")))
    s.errors(1, "own")
    s.errors(1)
    plain.forget_notes()
    body = group(s.fails, s.total).set(link_error=s.noted("own"))
    fails(chord([s.n(1)], body).apply_async(link_error=s.noted("error")))
    s.errors(1, "own")
    s.errors(1)
    plain.forget_notes()
    body = group(chord([s.n(1)], group(s.fails, s.total))).set(link_error=s.noted("own"))
    fails(chord([s.n(1)], body).apply_async(link_error=s.noted("error")))
    s.errors(1, "own")
    s.errors(1)


@pytest.mark.parametrize("how", ["option", "method"])
def test_errbacks_of_a_group_body_when_the_header_fails(plain: Caller, s: Shapes, how: str) -> None:
    def sent(made: Signature) -> Any:
        if how == "option":
            return made.apply_async(link_error=s.noted("error"))
        made.link_error(s.noted("error"))
        return made.apply_async()

    first = s.total
    first.link_error(s.noted("own"))
    fails(sent(chord([s.n(1), s.fails], group(first, s.total))))
    s.errors(1, "own")
    s.errors(2)
    plain.forget_notes()
    fails(sent(chord([s.n(1), s.fails], group(chord([s.n(2)], s.total), s.total))))
    s.errors(2)


def test_an_errback_set_as_one_signature(s: Shapes) -> None:
    first = s.total.set(link_error=s.noted("own"))
    fails(chord([s.n(1), s.fails], group(first, s.total)).apply_async())
    s.errors(1, "own")


# ---- ends without a failure


@pytest.mark.parametrize("end", ["expired", "revoked"])
def test_a_chord_fails_where_a_part_will_not_run_and_its_errback_is_called(plain: Caller, s: Shapes, end: str) -> None:
    part = s.n(2).set(countdown=60, task_id=str(uuid4()), **({"expires": 1} if end == "expired" else {}))
    made = chord([s.n(1), part], s.listed)
    made.link_error(s.noted("error"))
    sent = made.apply_async()
    if end == "revoked":
        eventually(lambda: plain.job(part.options["task_id"]))
        plain.app.control.revoke(part.options["task_id"])
    with pytest.raises(Exception, match=r"expired|revoked|cancelled"):
        sent.get(timeout=30, follow_parents=False)
    s.errors(1)
