"""Celery's canvas on our tasks, from a bare application: callbacks, chains, groups and chords, as Celery promises them."""

from __future__ import annotations

import pytest
from celery import chain, chord, group

from tasks.database import open_engine
from tasks.statements import rows
from tests.direct.conftest import Caller
from tests.support.stack import eventually


def failure_of(result: object) -> str:
    with pytest.raises(Exception, match=r".") as raised:
        result.get(timeout=30)  # type: ignore[attr-defined]
    return str(raised.value)


def test_a_link_is_given_the_result_once(plain: Caller) -> None:
    plain.forget_notes()
    sent = plain.allocate(32, link=plain.plain("note", "more")).apply_async()
    made = sent.get(timeout=30)
    (note,) = plain.noted()
    assert (note["args"], note["parent_id"], note["root_id"]) == ([made, "more"], sent.id, sent.id)
    assert [child.id for child in sent.children] == [note["id"]]
    assert sent.children[0].get(timeout=30) == made
    assert len(plain.notes()) == 1


def test_several_links_and_a_group_among_them(plain: Caller) -> None:
    plain.forget_notes()
    links = [plain.plain("note", 1), plain.plain("note", 2), group(plain.plain("note", 3), plain.plain("note", 4))]
    sent = plain.allocate().apply_async(link=links)
    made = sent.get(timeout=30)
    notes = plain.noted(4)
    assert sorted(note["args"][1] for note in notes) == [1, 2, 3, 4]
    assert all(note["args"][0] == made for note in notes)


def test_a_link_error_is_called_with_the_failed_tasks_id_and_a_link_is_not(plain: Caller) -> None:
    plain.forget_notes()
    sent = plain.refused(link=plain.plain("note", "link"), link_error=plain.plain("note", "error")).apply_async()
    assert "not-there" in failure_of(sent)
    (note,) = plain.noted()
    assert note["args"] == [sent.id, "error"]


def test_a_chain_through_both_services(plain: Caller) -> None:
    made = chain(plain.allocate(64), plain.plain("size"), plain.free("next.allocation_id"), plain.plain("note"))
    last = made.apply_async()
    assert last.get(timeout=30)["freed_bytes"] == 64
    freed = last.parent
    assert plain.ended(freed.id)["kind"] == "memory.deallocate"
    first = freed.parent.parent
    assert plain.ended(first.id)["result"]["size_bytes"] == 64
    assert first.state == "SUCCESS"
    assert [child.id for child in first.children] == [freed.parent.id]


def test_a_chain_stops_where_it_fails_and_its_last_task_says_so(plain: Caller) -> None:
    plain.forget_notes()
    last = chain(plain.allocate(), plain.refused(), plain.plain("note")).apply_async(
        link_error=plain.plain("note", "error")
    )
    assert "not-there" in failure_of(last)
    assert "not-there" in failure_of(last.parent)
    assert last.parent.parent.get(timeout=30)["size_bytes"] == 16
    notes = plain.noted()
    assert [note["args"][1] for note in notes] == ["error"]


def test_a_group_of_our_tasks(plain: Caller) -> None:
    sent = group(plain.allocate(size) for size in (16, 32, 48)).apply_async()
    assert [made["size_bytes"] for made in sent.get(timeout=30)] == [16, 32, 48]


def test_a_chord_gives_its_body_all_results_in_order(plain: Caller) -> None:
    plain.forget_notes()
    body = chord([plain.allocate(16), plain.plain("note", "x"), plain.allocate(48)])(plain.plain("note"))
    first, middle, last = body.get(timeout=30)
    assert (first["size_bytes"], middle, last["size_bytes"]) == (16, "x", 48)
    assert len([note for note in plain.noted(2) if note["id"] == body.id]) == 1


def test_a_chords_body_may_be_ours(plain: Caller) -> None:
    body = chord([plain.allocate(16), plain.allocate(32)])(plain.free("1.allocation_id"))
    assert body.get(timeout=30)["freed_bytes"] == 32


def test_an_error_in_a_chords_header_fails_its_body(plain: Caller) -> None:
    plain.forget_notes()
    wanted = plain.plain("note", "body").on_error(plain.plain("note", "error"))
    body = chord([plain.allocate(), plain.refused()])(wanted)
    assert "not-there" in failure_of(body)
    assert [note["args"] for note in plain.noted()] == [[body.id, "error"]]


def test_a_chain_that_goes_on_after_a_group_becomes_a_chord(plain: Caller) -> None:
    sent = chain(group(plain.allocate(16), plain.allocate(32)), plain.plain("note")).apply_async()
    assert [made["size_bytes"] for made in sent.get(timeout=30)] == [16, 32]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"allocation_id": "a"}, "does not say where it goes"),
        ({"allocation_id": {"$previous": "no.such.field"}}, "has no 'no.such.field'"),
        ({"allocation_id": {"$previous": 1}}, "a path such as"),
    ],
)
def test_a_result_that_has_no_place_is_refused_by_name(caller: Caller, request_: dict, says: str) -> None:
    second = caller.task("memory.deallocate", request_)
    last = chain(caller.allocate(), second).apply_async()
    assert says in failure_of(last)
    job = caller.ended(last.id)
    assert (job["state"], job["error"]["code"]) == ("failed", "validation_failed")
    assert "$previous" in job["error"]["message"] or "previous result" in job["error"]["message"]


def test_a_request_that_asks_for_a_result_where_none_comes_is_refused(caller: Caller) -> None:
    assert "no result came before" in failure_of(caller.free().apply_async())


def test_a_result_may_go_into_a_list_and_whole(plain: Caller) -> None:
    request = {"size_bytes": 8, "job": {"labels": {"from": {"$previous": "allocation_id"}}}}
    sent = chain(plain.allocate(), plain.task("memory.allocate", request)).apply_async()
    sent.get(timeout=30)
    assert plain.ended(sent.id)["labels"]["from"] == plain.ended(sent.parent.id)["result"]["allocation_id"]


def test_callbacks_come_without_a_result_being_kept(plain: Caller) -> None:
    plain.forget_notes()
    sent = plain.allocate(link=plain.plain("note")).apply_async(ignore_result=True)
    assert plain.noted()[0]["args"][0]["size_bytes"] == 16
    assert plain.ended(sent.id)["state"] == "succeeded"
    assert plain.app.AsyncResult(sent.id).state == "PENDING"


def test_a_callback_that_cannot_be_published_costs_no_result(plain: Caller) -> None:
    sent = plain.allocate(link=plain.app.signature("plain.note", queue=5)).apply_async()
    assert sent.get(timeout=30)["size_bytes"] == 16


def test_forget_and_the_results_expiry(caller: Caller) -> None:
    sent = caller.allocate().apply_async()
    sent.get(timeout=30)
    key = caller.app.backend.get_key_for_task(sent.id)
    assert 0 < caller.redis.ttl(key) <= 86_400
    sent.forget()
    assert not caller.redis.exists(key)
    assert caller.ended(sent.id)["state"] == "succeeded"


def test_the_outbox_is_emptied(plain: Caller) -> None:
    sent = plain.allocate(link=plain.plain("note")).apply_async()
    sent.get(timeout=30)
    with open_engine(plain.stack.database_url).connect() as connection:
        eventually(lambda: not rows(connection, "SELECT 1 FROM jobs WHERE celery IS NOT NULL"))
