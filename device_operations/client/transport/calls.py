"""The commands of flows: a flow is a generator that says what to send and what to do with the answer, and does no I/O.

    Call ─▶ httpx.Response       one request; with `stream`, the body is left to be read by `Next`
    Next ─▶ bytes | str | None   the next piece of a streamed body; None at its end
    Do   ─▶ what it returns      work that may block: reading and writing files
    Sleep, Emit ─▶ None          wait; hand a value to the caller who iterates

`sync.py` and `asynchronous.py` carry them out. The functions below yield one of them each, and type its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar, cast
from urllib.parse import quote

import httpx

from device_operations.wire.json_types import FreeJson

T = TypeVar("T")


class Content(Protocol):
    """A body that is read piece by piece, and again from its beginning when it is sent again."""

    repeatable: bool

    def headers(self) -> dict[str, str]:
        """The length, where it is known."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The pieces, from the beginning."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the gateway."""

    method: str
    path: str
    params: Mapping[str, object] = field(default_factory=dict)
    json: object = None
    content: Content | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    #: Seconds that the server may take on purpose, over the client's own timeout.
    waits_seconds: float = 0.0
    #: Whether it may be sent again when no answer came.
    repeatable: bool = True
    #: Whether it is a submission, which an Idempotency-Key makes repeatable.
    keyed: bool = False
    #: What `Next` reads: the whole body is read at once without it.
    stream: type[bytes] | type[str] | None = None
    #: Error statuses that are answers here.
    accepts: frozenset[int] = frozenset()
    #: How often it is sent again at most; the client's own number where None.
    retries: int | None = None
    #: The code of a 404 without a body.
    missing: str = "not_found"


@dataclass(frozen=True, slots=True)
class Next:
    """The next piece of the body of a streamed response."""

    response: httpx.Response


@dataclass(frozen=True, slots=True)
class Do:
    """Work that may block."""

    function: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Emit:
    """A value for the caller who iterates over the flow."""

    value: object


#: What a flow yields.
Command: TypeAlias = Call | Next | Do | Sleep | Emit
#: A generator of commands that returns a `T`; each command's answer is sent into it.
Flow: TypeAlias = Generator[Command, object, T]


def at(template: str, *ids: str) -> str:
    """A path with ids in it, quoted."""
    return template.format(*(quote(str(given), safe="") for given in ids))


def send(call: Call) -> Flow[httpx.Response]:
    """The answer to one request."""
    return cast("httpx.Response", (yield call))


def next_bytes(response: httpx.Response) -> Flow[bytes | None]:
    """The next piece of a body that is streamed as bytes."""
    return cast("bytes | None", (yield Next(response)))


def next_line(response: httpx.Response) -> Flow[str | None]:
    """The next line of a body that is streamed as text."""
    return cast("str | None", (yield Next(response)))


def do(function: Callable[[], T]) -> Flow[T]:
    """What a function returns that may block."""
    return cast(T, (yield Do(function)))


def get(path: str, **params: object) -> Flow[FreeJson]:
    """The JSON object at a path; parameters that are None are left out."""
    return json_of((yield from send(Call("GET", path, params))))


def json_of(response: httpx.Response) -> FreeJson:
    """The JSON object in an answer."""
    return cast("FreeJson", response.json())
