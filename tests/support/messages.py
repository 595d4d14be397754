"""Messages as callers and gateways put them into Redis, and many ways in which they can be wrong."""

from __future__ import annotations

import base64
import copy
import json
import uuid
import zlib
from collections.abc import Callable
from typing import Any

from device_operations.jobs import new_id
from tasks.redis.queues import NOTED, message

Envelope = dict[str, Any]

EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: A request that needs nothing to be there, and leaves nothing behind but a failed job.
REQUEST = {"allocation_id": "nobody-has-this"}


def packed(body: Any) -> str:
    """A body as Celery sends it."""
    return base64.b64encode(json.dumps(body).encode()).decode()


def direct(task: str = "device_operations.memory.deallocate", request: Any = REQUEST, **kwargs: Any) -> Envelope:
    """A Celery caller's message, as kombu makes it."""
    task_id = str(uuid.uuid4())
    return {
        "body": packed([[], {"request": request, **kwargs}, EMBED]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py", "task": task, "id": task_id, "shadow": None, "eta": None, "expires": None, "group": None,
            "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": task_id, "parent_id": None,
            "argsrepr": "()", "kwargsrepr": "{…}", "origin": "gen1@host", "ignore_result": False,
            "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
        },
        "properties": {
            "correlation_id": task_id, "reply_to": str(uuid.uuid4()), "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "device.cpu_0"}, "priority": 4, "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }  # fmt: skip


def recorded(job_id: str | None = None) -> Envelope:
    """A gateway's message of a job. Where no id is given there is no such job."""
    row = {
        "id": job_id or new_id(), "kind": "memory.deallocate", "seq": 1, "priority": 5, "after": [], "needs": [],
        "queue": "device.cpu_0", "celery": None,
    }  # fmt: skip
    made: Envelope = json.loads(message(row, REQUEST))
    return made


def changed(envelope: Envelope, path: str, value: Any) -> Envelope:
    """A copy with another value at a path such as `headers.id`; without it if the value is `...`."""
    made = copy.deepcopy(envelope)
    *above, name = path.split(".")
    place = made
    for part in above:
        place = place[part]
    if value is ...:
        place.pop(name, None)
    else:
        place[name] = value
    return made


def raw(envelope: Any) -> bytes:
    """As it lies in Redis."""
    return json.dumps(envelope).encode()


def nested(depth: int) -> str:
    """JSON lists within each other."""
    return "[" * depth + "]" * depth


def _with(path: str, value: Any, make: Callable[[], Envelope] = direct) -> bytes:
    return raw(changed(make(), path, value))


def _body(text: str | bytes, make: Callable[[], Envelope] = direct) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return _with("body", base64.b64encode(data).decode(), make)


def _spliced(path: str, json_text: str, make: Callable[[], Envelope] = direct) -> bytes:
    """With a value that Python's JSON does not write."""
    return raw(changed(make(), path, "\x01")).replace(b'"\\u0001"', json_text.encode())


def unreadable() -> dict[str, bytes]:
    """By a name for each, messages that are to be refused. Made anew each time: each has ids of its own."""
    bomb = base64.b64encode(zlib.compress(b" " * (64 << 20), 9)).decode()
    compressed = changed(direct(), "headers.compression", "application/x-gzip")
    cases = {
        "not JSON": b"garbage",
        "nothing": b"",
        "not UTF-8": b'{"body": "\xff\xfe"}',
        "NULs": bytes(100),
        "a number": b"5",
        "a long number": b"9" * 5000,
        "null": b"null",
        "a list": b"[]",
        "a text": b'"text"',
        "cut off": raw(direct())[:-20],
        "twice": raw(direct()) * 2,
        "nested deep": nested(100_000).encode(),
        "JSON that is no envelope": b'{"hello": "world"}',
        "empty": b"{}",
        "too long": raw({**direct(), "more": "x" * (17 << 20)}),
        "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins",
        "body a list of 2": _body("[[], {}]"),
        "body a list of 4": _body("[[], {}, {}, {}]"),
        "body an object": _body("{}"),
        "body a text": _body('"text"'),
        "body null": _body("null"),
        "body empty": _with("body", ""),
        "body not JSON": _body("garbage"),
        "body not UTF-8": _body(b"[[], {}, \xff]"),
        "body nested deep": _body(f'[[], {{"request": {nested(50_000)}}}, {{}}]'),
        "body with a long number": _body(f'[[], {{"request": {{"size_bytes": {"9" * 5000}}}}}, {{}}]'),
        "body not base64": _with("body", "***"),
        "body cut base64": _with("body", packed([[], {}, {}])[:-1]),
        "body base64 of other letters": _with("body", "äöü"),
        "args a text": _body('["text", {}, {}]'),
        "kwargs a list": _body("[[], [], {}]"),
        "kwargs null": _body("[[], null, {}]"),
        "embed a list": _body("[[], {}, [1]]"),
        "callbacks a number": _body('[[], {}, {"callbacks": 5}]'),
        "chord a text": _body('[[], {}, {"chord": "x"}]'),
        "id with a lone surrogate": _spliced("headers.id", '"\\ud800"'),
        "priority a long number": _spliced("properties.priority", "9" * 5000),
        "NaN in the envelope": _spliced("properties.priority", "NaN"),
        "compressed bomb": raw(changed(compressed, "body", bomb)),
        "compressed garbage": raw(changed(compressed, "body", base64.b64encode(b"garbage").decode())),
        "compression not known": _with("headers.compression", "application/x-brotli"),
        "compression a list": _with("headers.compression", []),
        "a protocol 1 message without a task": _with("headers", {}),
        "task not known": _with("headers.task", "device_operations.memory.explode"),
        "a task of Celery's": _with("headers.task", "celery.backend_cleanup"),
        "noted task not known": _with("headers.task", "device_operations.memory.explode", recorded),
        "noted request a list": _with("request", [], recorded),
        "noted body garbage": _with("request", "garbage", recorded),
        "noted id a number": _with("headers.id", 5, recorded),
        "noted a number": _with(f"headers.{NOTED}", 5, recorded),
        "noted null": _with(f"headers.{NOTED}", None, recorded),
        "noted kwargsrepr a list": _with("headers.kwargsrepr", [], recorded),
        "direct, noted": _with(f"headers.{NOTED}", {}),
    }
    wrong: dict[str, list[Any]] = {
        "body": [..., None, 5, {}, []],
        "content-type": [..., None, 5, "application/x-python-serialize", "application/x-yaml", "\0", []],
        "content-encoding": [5, "binary", "idna", "zip", "\0", []],
        "headers": [..., None, 5, "x", []],
        "properties": [..., None, 5, "x", []],
        "headers.id": [..., None, 5, 1.5, True, "", "a\0b", "a b", "a\nb", "x" * 256, [], {}, "\u200b"],
        "headers.task": [..., None, 5, "", "a\0b", [], {}, "x" * 300],
        "headers.eta": [5, "soon", "0001-01-01T00:00:00", "9999-12-31T23:59:59+00:00", "9" * 5000, [], True],
        "headers.expires": [5, "soon", "0001-01-01T00:00:00", "9999-12-31T23:59:59-23:00", "9" * 5000, {}, False],
        "headers.timelimit": [5, "x", [1], [1, 2, 3], ["a", "b"], [-1, None], {}],
        "headers.retries": ["x", -1, 1.5, [], True, 2**64],
        "headers.root_id": [5, "", "a\0b", "x" * 256, []],
        "headers.parent_id": [5, "", "a\0b", "x" * 256, {}],
        "headers.group": [5, "", "a\0b", []],
        "headers.group_index": ["x", -1, []],
        "headers.origin": [5, "a\0b", [], "x" * 10_000],
        "headers.argsrepr": [5, {}, "a\0b", "x" * 10_000],
        "headers.kwargsrepr": [5, [], "a\0b", "x" * 10_000],
        "headers.shadow": [5, [], "a\0b"],
        "headers.lang": [5, []],
        "headers.ignore_result": [0, "no", []],
        "headers.replaced_task_nesting": ["x", -1, []],
        "headers.stamped_headers": [5, "x", [5], [[]], {}],
        "headers.stamps": [5, "x", []],
        "properties.priority": ["x", -1, 1.5, True, [], {}, 2**64],
        "properties.correlation_id": [5, "", "a\0b", [], "x" * 256],
        "properties.reply_to": [5, "a\0b", []],
        "properties.body_encoding": [5, "rot13", "\0", []],
    }  # fmt: skip
    noted_wrong: dict[str, list[Any]] = {
        "seq": [..., None, "1", -1, 1.5, 2**63, True, []],
        "priority": [..., None, "5", -1, 10, 1.5, True, 10**18],
        "after": [..., None, 5, "x", {}, [5], ["a\0b"], ["x" * 256]],
        "needs": [..., None, 5, "x", {}, [5], ["a\0b"], [[]]],
    }
    for path, values in wrong.items():
        for value in values:
            cases[f"{path} = {str(value)[:30]!r} {type(value).__name__}"] = _with(path, value)
    for name, values in noted_wrong.items():
        for value in values:
            cases[f"noted {name} = {str(value)[:30]!r}"] = _with(f"headers.{NOTED}.{name}", value, recorded)
    return cases


def wrong_requests() -> dict[str, Envelope]:
    """Messages whose caller is known by its task id, and whose request is wrong: each is a failed job."""
    allocate = "device_operations.memory.allocate"
    many = {f"name {number}": 1 for number in range(5000)}
    return {
        "positional arguments": {**direct(), "body": packed([[1], {"request": REQUEST}, EMBED])},
        "more arguments": direct(surprise=1),
        "very many arguments": direct(**many),
        "no request": {**direct(), "body": packed([[], {}, EMBED])},
        "request a list": direct(request=[]),
        "request null": direct(request=None),
        "request of unknown fields": direct(request=many),
        "request nested deep": direct(request={"allocation_id": json.loads(nested(500))}),
        "NUL in a field": direct(request={"allocation_id": "a\0b"}),
        "NUL in a name": direct(request={"a\0b": 1}),
        "lone surrogate in a field": direct(request={"allocation_id": "a\ud800"}),
        "lone surrogate in a name": direct(request={"\udfff": 1}),
        "a number over 64 bits": direct(allocate, {"size_bytes": 10**30}),
        "a negative number": direct(allocate, {"size_bytes": -1}),
        "NaN": direct(allocate, {"size_bytes": float("nan")}),
        "infinity": direct(allocate, {"size_bytes": float("inf")}),
        "job a list": direct(job=[1]),
        "job a text": direct(job="x"),
        "job of unknown fields": direct(job={"x": 1}),
        "owner with NUL": direct(job={"owner": "a\0b"}),
        "owner a number": direct(job={"owner": 5}),
        "label with a surrogate": direct(job={"labels": {"a": "\ud800"}}),
        "label with NUL": direct(job={"labels": {"a\0": "b"}}),
        "labels a list": direct(job={"labels": [1]}),
        "after a number": direct(job={"after": 5}),
        "after with NUL": direct(job={"after": ["a\0b"]}),
        "priority beyond": direct(job={"priority": 10**20}),
    }
