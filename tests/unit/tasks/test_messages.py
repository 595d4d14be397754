"""Reading messages: what is one, what is none, and that nothing is taken without a bound."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import time
import zlib
from typing import Any

import pytest
from kombu.compression import compress

from device_operations.wire.ids import is_job_id
from tasks.redis import messages
from tasks.redis.message_fields import REMOTE_CONTROL, Unreadable
from tasks.redis.messages import (
    Direct,
    RecordedMessage,
    UnknownTask,
    read,
    read_kept,
    read_notice,
    read_wake,
    unstorable,
)
from tasks.redis.queues import MESSAGE_BYTES, NOTED, message
from tests.support.messages import EMBED, REQUEST, changed, direct, packed, raw, recorded, unreadable, wrong_requests

CASES = unreadable()


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_message_is_unreadable_quickly_and_for_a_reason_of_one_line(name: str) -> None:
    started = time.process_time()
    with pytest.raises(Unreadable) as refused:
        read(CASES[name])
    assert time.process_time() - started < 2
    assert 0 < len(str(refused.value)) < 200
    assert str(refused.value).isprintable()


def test_a_callers_message_comes_as_kombu_wants_it_with_its_body_read() -> None:
    envelope = direct()
    found = read(raw(envelope))
    assert isinstance(found, Direct)
    assert found.body == [[], {"request": REQUEST}, {}]
    payload = found.payload("device.cpu_0")
    assert payload["headers"]["id"] == envelope["headers"]["id"]
    assert payload["properties"]["delivery_info"] == {"exchange": "", "routing_key": "device.cpu_0"}
    assert payload["properties"]["delivery_tag"] != envelope["properties"]["delivery_tag"]
    assert payload.decoded is found.body
    assert json.loads(payload["body"])[1] == {"request": REQUEST}


def test_a_message_in_the_book_is_the_same_message_again() -> None:
    found = read(raw(direct()))
    assert isinstance(found, Direct)
    kept = raw([found.payload("device.cpu_0"), "", "device.cpu_0"])
    again = read_kept(kept, len(kept))
    assert (again.headers, again.properties, again.body) == (found.headers, found.properties, found.body)


@pytest.mark.parametrize("kept", [b"", b"5", b"[]", b"{}", b'["x", "", ""]', b"[null]", b"garbage", None])
def test_what_is_no_entry_of_the_book_is_unreadable(kept: bytes | None) -> None:
    with pytest.raises(Unreadable):
        read_kept(kept, 0)


def test_a_recorded_jobs_message_in_the_book_is_not_needed() -> None:
    kept = raw([recorded(), "", "device.cpu_0"])
    with pytest.raises(Unreadable):
        read_kept(kept, len(kept))


def test_a_recorded_jobs_message_gives_what_the_lane_needs() -> None:
    found = read(raw(recorded("some-job")))
    assert isinstance(found, RecordedMessage)
    assert found.headers["id"] == "some-job"
    assert found.headers["task"] == "device_operations.memory.deallocate"
    assert found.headers[NOTED] == {"seq": 1, "priority": 5, "after": [], "needs": []}
    assert found.request == REQUEST


def test_a_request_too_big_for_a_message_is_left_to_the_record() -> None:
    row = {
        "id": "some-job", "kind": "memory.allocate", "seq": 1, "priority": 5, "after": [], "needs": [],
        "queue": "device.cpu_0", "celery": None,
    }  # fmt: skip
    big = message(row, {"label": "x" * MESSAGE_BYTES})
    assert len(big) < 4096
    found = read(big)
    assert isinstance(found, RecordedMessage)
    assert found.request == {}


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
def test_celerys_compressed_messages_are_read(method: str) -> None:
    body, name = compress(json.dumps([[], {"request": REQUEST}, EMBED]).encode(), method)
    envelope = changed(direct(), "headers.compression", name) | {"body": base64.b64encode(body).decode()}
    found = read(raw(envelope))
    assert isinstance(found, Direct)
    assert found.body[1] == {"request": REQUEST}
    assert "compression" not in found.headers


@pytest.mark.parametrize(
    ("name", "pack"),
    [("application/x-gzip", zlib.compress), ("application/x-bz2", bz2.compress), ("application/x-lzma", lzma.compress)],
)
def test_what_grows_when_decompressed_is_stopped_at_the_limit(name: str, pack: Any) -> None:
    bomb = base64.b64encode(pack(b" " * (2 * MESSAGE_BYTES))).decode()
    with pytest.raises(Unreadable, match="more than"):
        read(raw(changed(direct(), "headers.compression", name) | {"body": bomb}))


def test_celerys_older_protocol_is_read_too() -> None:
    body = {
        "task": "device_operations.memory.deallocate", "id": "an-older-task", "args": [],
        "kwargs": {"request": REQUEST}, "retries": 0, "eta": None, "expires": None, "utc": True, "callbacks": None,
        "errbacks": None, "timelimit": [None, None], "taskset": None, "chord": None,
    }  # fmt: skip
    found = read(raw(direct() | {"headers": {}, "body": packed(body)}))
    assert isinstance(found, Direct)
    assert (found.headers["id"], found.headers["task"]) == ("an-older-task", body["task"])
    assert json.loads(found.text)[1] == {"request": REQUEST}


def test_a_task_that_is_none_here_is_named_with_its_id() -> None:
    with pytest.raises(UnknownTask) as refused:
        read(raw(changed(changed(direct(), "headers.task", "someone.elses"), "headers.id", "their-id")))
    assert (refused.value.job_id, refused.value.task) == ("their-id", "someone.elses")


def test_numbers_that_json_has_not_are_read_in_a_callers_body() -> None:
    found = read(raw(direct(request={"value": float("nan"), "other": float("-inf")})))
    assert isinstance(found, Direct)
    assert found.body[1]["request"]["other"] == "-Infinity"


@pytest.mark.parametrize("name", wrong_requests())
def test_a_wrong_request_in_a_whole_message_is_read(name: str) -> None:
    assert isinstance(read(raw(wrong_requests()[name])), Direct)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ({"a": ["text", 1, 1.5, None, True, float("nan")]}, True),
        ({"a": "backslash \\u0000 and text"}, True),
        ({"a": "\\\\u0000"}, True),
        ({"a": "NUL \0"}, False),
        ({"a": "backslash \\\0"}, False),
        ({"a\0": 1}, False),
        ({"a": "\ud800"}, False),
        ({"\udfff": 1}, False),
        ({"a": 2**64}, False),
        (json.loads("[" * 500 + "]" * 500), False),
    ],
)
def test_what_cannot_be_stored_is_told_from_what_can(value: Any, fits: bool) -> None:
    assert (unstorable(value) is None) == fits


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ("x", True), ("0199c0de-7000-7000-8000-000000000000", True), ("x" * 255, True), ("größe/42", True),
        ("", False), ("x" * 256, False), ("a b", False), ("a\0", False), ("a\n", False), ("\ud800", False),
        ("\u200b", False), ("\u00a0", False), (5, False), (None, False), (b"x", False), (["x"], False), (True, False),
    ],
)  # fmt: skip
def test_an_id_is_1_to_255_visible_characters(value: Any, fits: bool) -> None:
    assert is_job_id(value) == fits


def wake(told: Any) -> Any:
    return read_wake(read_notice(raw(notice(told)), "control").decoded)


def notice(body: Any) -> dict[str, Any]:
    return {
        "body": json.dumps(body), "content-encoding": "utf-8", "content-type": "application/json", "headers": {},
        "properties": {"delivery_tag": "x", "delivery_info": {"exchange": "", "routing_key": "control"}},
    }  # fmt: skip


SEND = {
    "key": "job-1-1", "to": "cpu_1", "allocation_id": "a", "offset": 0, "size_bytes": 1, "blob_id": "b", "ring": None,
}  # fmt: skip


def test_what_the_control_queue_asks_for_is_read() -> None:
    assert wake({"cancel": "some-job"}).cancel == "some-job"
    assert wake({"follow": "some-job"}).follow == "some-job"
    assert wake({"send": SEND}).send == SEND
    assert wake({}).send is None
    ring = {**SEND, "ring": "devop-0123456789-7-1"}
    assert wake({"send": ring}).send == ring


@pytest.mark.parametrize(
    "told",
    [
        5, [], "x", None, {"cancel": 5}, {"cancel": "a\0b"}, {"follow": []}, {"send": 5}, {"send": {}},
        {"send": {**SEND, "ring": "nodashes"}}, {"send": {**SEND, "ring": "../../x-1-1"}},
        {"send": {**SEND, "blob_id": "../x"}}, {"send": {**SEND, "blob_id": "/etc/x"}},
        {"send": {**SEND, "offset": -1}}, {"send": {**SEND, "size_bytes": 2**64}}, {"send": {**SEND, "key": None}},
        {"send": {**SEND, "allocation_id": []}}, {"send": {**SEND, "to": {}}},
    ],
)  # fmt: skip
def test_what_the_control_queue_cannot_ask_for_is_unreadable(told: Any) -> None:
    with pytest.raises(Unreadable):
        wake(told)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"method": 5}, {"method": "ping", "arguments": []}, {"method": "ping", "destination": "x"},
        {"method": "ping", "pattern": "(a+)+$", "matcher": "pcre"}, {"method": "ping", "reply_to": 5},
        {"method": "ping", "reply_to": {"exchange": 5}}, {"method": "ping", "ticket": {}},
    ],
)  # fmt: skip
def test_what_is_no_remote_control_is_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        read_notice(raw(notice(body)), "pidbox", REMOTE_CONTROL)


@pytest.mark.parametrize("clock", ["x", -1, 2**60, [], True])
def test_a_clock_that_no_clock_shows_is_unreadable(clock: Any) -> None:
    with pytest.raises(Unreadable):
        read_notice(raw({**notice({"method": "ping"}), "headers": {"clock": clock}}), "pidbox", REMOTE_CONTROL)


def test_remote_control_is_read_without_what_it_does_not_know() -> None:
    body = {"method": "ping", "arguments": {"a": 1}, "destination": None, "surprise": 1}
    assert read_notice(raw(notice(body)), "pidbox", REMOTE_CONTROL).decoded == {
        "method": "ping", "arguments": {"a": 1},
    }  # fmt: skip


def test_a_refusal_is_one_short_line_without_what_may_be_secret() -> None:
    for given in (
        raw(direct(request={"prompt": "my-secret-prompt"})),
        b'{"password": "my-secret", "url": "redis://:my-secret@host"}',
        b"redis://:my-secret@host and password=my-secret\nand more\r\n\0\x1b[31m" + b"\xff" * 1000,
    ):
        shown = messages._excerpt(given)
        assert len(shown) <= 60
        assert shown.replace("…", "").isascii()
        assert shown.isprintable()
        assert "secret" not in shown
        assert packed([[], {"request": {"prompt": "my-secret-prompt"}}, EMBED])[:24] not in shown


def test_why_an_unforeseen_error_refused_a_message_is_its_type_and_place() -> None:
    try:
        {}["my-secret"]
    except KeyError as error:
        told = messages.reason(error)
    assert told.startswith("KeyError at test_messages.py:")
    assert "secret" not in told
