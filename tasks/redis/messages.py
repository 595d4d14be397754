"""Messages as Redis hands them over: each is read here, whole and with a bound on everything, or it is `Unreadable`.

    bytes ─▶ read ────────▶ Recorded   a job that PostgreSQL has, published by a gateway or a worker
                      └───▶ Direct     a Celery caller's task, in protocol 1 or 2
    bytes ─▶ read_notice ─▶ Payload    the control queue (whose body is a `Wake`), and Celery's remote control

Celery and kombu read a message's parts where they need them, and an error there ends the worker. So what goes on to
them is made anew from fields that were checked; what they do not know is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
import structlog

from device_operations.wire.json_types import FreeJson
from tasks.redis import message_fields as fields
from tasks.redis.message_bodies import body_of, parsed, text_of
from tasks.redis.message_fields import Unreadable, checked, checked_all, is_kind, object_of
from tasks.redis.queues import MESSAGE_BYTES, NOTED

log = structlog.get_logger(__name__)

#: Bytes of a message in kombu's book at most: its text stands there in JSON once more, in ASCII.
KEPT_BYTES = 4 * MESSAGE_BYTES

#: Characters of a message that its line in the log shows.
_EXCERPT_CHARACTERS = 60


class UnknownTask(Unreadable):
    """A Celery caller's message is whole, but its task is none that a worker has."""

    def __init__(self, job_id: str, task: str) -> None:
        super().__init__("its task is none of this service's")
        self.job_id = job_id
        self.task = task


class Payload(FreeJson):
    """A message as kombu takes it, with its body as it was read, so that it is not read a second time."""

    decoded: object


@dataclass(frozen=True, slots=True)
class RecordedMessage:
    """A recorded job's message: the headers `id`, `task`, `argsrepr`, `kwargsrepr`, `NOTED`, and the request."""

    headers: FreeJson
    request: FreeJson


@dataclass(frozen=True, slots=True)
class Direct:
    """A Celery caller's message: checked headers and properties, the body `[args, kwargs, embed]`, and its text."""

    headers: FreeJson
    properties: FreeJson
    body: list[object]
    text: str

    @property
    def embed(self) -> FreeJson:
        """What Celery passes on to callbacks, chains and chords."""
        return object_of(self.body[2], "embed")

    @property
    def step(self) -> int:
        """The priority as kombu counts, 0 to 9, where 0 is read first."""
        return min(int(self.properties.get("priority", 0)), 9)

    def payload(self, queue: str) -> Payload:
        """The message as kombu takes it, of `queue`."""
        made = _payload(self.text, self.headers, self.properties, queue)
        made.decoded = self.body
        return made


def read(raw: bytes) -> RecordedMessage | Direct:
    """A message of a device's queue. Raises `Unreadable`."""
    return _read(parsed(raw))


def read_kept(raw: bytes | None, size_bytes: int) -> Direct:
    """A message as kombu's book of unacknowledged ones keeps it: `[message, exchange, routing key]`.

    `raw` is None if the entry is too big to be fetched. Raises `Unreadable`.
    """
    if raw is None:
        raise Unreadable(f"the book's entry has {size_bytes} bytes, and {KEPT_BYTES} are allowed")
    kept = parsed(raw, KEPT_BYTES)
    if type(kept) is not list or not kept:
        raise Unreadable("the book's entry is no list that begins with a message")
    message = _read(kept[0])
    if isinstance(message, RecordedMessage):
        raise Unreadable("its job is recorded and needs no message")
    return message


def read_notice(raw: bytes, queue: str, body_fields: Mapping[str, Callable[[object], bool]] | None = None) -> Payload:
    """A message that is no task, whose body is an object, of `body_fields` where given. Raises `Unreadable`."""
    envelope = object_of(parsed(raw), "the message")
    body, text = body_of(envelope)
    headers = checked(object_of(envelope.get("headers") or {}, "headers"), fields.NOTICE_HEADERS)
    body = object_of(body, "the body")
    made = _payload(text_of(text), headers, {}, queue)
    made.decoded = body if body_fields is None else checked(body, body_fields)
    return made


def _payload(text: str, headers: FreeJson, properties: FreeJson, queue: str) -> Payload:
    """What kombu is given. The tag is new each time: one that a caller chose may be another message's."""
    return Payload(
        {
            "body": text,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": {
                **properties,
                "delivery_tag": os.urandom(16).hex(),
                "delivery_info": {"exchange": "", "routing_key": queue},
            },
        }
    )


@dataclass(frozen=True, slots=True)
class Wake:
    """What the control queue asks a worker for.

    A `cancel` is in PostgreSQL too, where the worker looks every second; `follow` and `send` are asked again by those
    who want them.
    """

    cancel: str | None
    follow: str | None
    send: FreeJson | None


def read_wake(body: object) -> Wake:
    """The body of a control queue's message. Raises `Unreadable`."""
    asked = checked(object_of(body, "the body"), fields.WAKE)
    send = asked.get("send")
    if send is not None:
        send = checked_all(send, fields.SEND)
    return Wake(asked.get("cancel"), asked.get("follow"), send)


def refuse(raw: bytes, queue: str, error: Exception) -> None:
    """Logs one line of a message that goes no further."""
    log.warning("message refused", queue=queue, reason=reason(error), size_bytes=len(raw), excerpt=_excerpt(raw))


def unstorable(value: object) -> str | None:
    """Why `value`, made of JSON, can be stored by neither JSON's other readers nor PostgreSQL; None if it can."""
    try:
        text = orjson.dumps(value)
    except (TypeError, RecursionError) as error:
        # orjson says: text that is no UTF-8 (a lone surrogate), an integer over 64 bits, or nested too deep.
        return str(error)[:200]
    # An escaped backslash before `u0000` looks the same.
    if b"\\u0000" in text and _ESCAPED_NUL.search(text):
        return "a text has a NUL character"
    return None


_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


# ---- the envelope


def _read(envelope: object) -> RecordedMessage | Direct:
    envelope = object_of(envelope, "the message")
    headers = object_of(envelope.get("headers"), "headers")
    if NOTED in headers:
        return _recorded(envelope, headers)
    properties = checked(object_of(envelope.get("properties"), "properties"), fields.PROPERTIES)
    body, text = body_of(envelope)
    if "task" not in headers and type(body) is dict:
        headers, body = _from_protocol_1(body)
        text = json.dumps(body)
    headers = checked(headers, fields.HEADERS)
    parts = _check_body(body)
    if not is_kind(headers["task"]):
        raise UnknownTask(headers["id"], headers["task"])
    return Direct(headers, properties, parts, text_of(text))


def _recorded(envelope: FreeJson, headers: FreeJson) -> RecordedMessage:
    """Each job over HTTP comes this way, so only what is used of the message is looked at."""
    known = checked_all(headers, fields.NOTED_HEADERS)
    known[NOTED] = checked_all(object_of(headers[NOTED], NOTED), fields.NOTED)
    return RecordedMessage(known, object_of(envelope.get("request"), "request"))


def _from_protocol_1(body: FreeJson) -> tuple[FreeJson, list[object]]:
    """Celery's older protocol keeps the headers in the body."""
    embed = {name: body.get(name) for name in ("callbacks", "errbacks", "chord")}
    return body, [body.get("args", []), body.get("kwargs", {}), {**embed, "chain": None}]


def _check_body(body: object) -> list[object]:
    if type(body) is not list or len(body) != 3:
        raise Unreadable("the body is not [args, kwargs, embed]")
    if type(body[0]) is not list:
        raise Unreadable("args is no list")
    object_of(body[1], "kwargs")
    body[2] = checked(object_of(body[2] or {}, "embed"), fields.EMBED)
    return body


# ---- the log


def reason(error: Exception) -> str:
    """Why, in one line and without content: of an error that this module did not foresee its type and its place."""
    if isinstance(error, Unreadable):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
    return f"{type(error).__name__}{where}"


def _excerpt(raw: bytes) -> str:
    """How the message begins, without what may be secret: values after a name, long words (bodies, keys)."""
    text = raw[: 4 * _EXCERPT_CHARACTERS].decode("ascii", "backslashreplace")
    text = "".join(character if " " <= character <= "~" else "." for character in text)
    text = re.sub(r'(:\s*)"[^"]*"?', r'\1"…"', text)
    text = re.sub(r"=\S+|//\S*@|[A-Za-z0-9+/_-]{20,}", "…", text)
    return text[:_EXCERPT_CHARACTERS]
