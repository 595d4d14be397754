"""One call until it is answered: what is sent again, after how long, and which exception an answer becomes."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import httpx

from device_operations.client.transport.calls import Call, Command, Flow, Sleep, send
from device_operations.errors import CODES, OperationError, failure
from device_operations.wire.json_types import FreeJson

T = TypeVar("T")

#: Failures before anything was sent: the call did not happen.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

#: Seconds of the first pause and the longest; each pause is twice the one before, less up to a quarter by chance.
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0

#: A `Retry-After` beyond this is the caller's to wait for, not a method's.
LONGEST_RETRY_AFTER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How often a call is sent again, and whether submissions get a key that makes this safe."""

    retries: int = 5
    idempotency_keys: bool = True


class FlowRun(Generic[T]):
    """A flow under way: `wants` is the command that it waits for, until it is `over` with its `result`."""

    #: Set once it is over.
    result: T

    def __init__(self, flow: Flow[T], policy: Policy) -> None:
        self._steps = _persistent(flow, policy)
        self.over = False
        self.wants: Command | None = None
        self.go_on(None)

    def go_on(self, answer: object) -> None:
        """Gives the flow the answer to its command."""
        self._advance(lambda: self._steps.send(answer))

    def fail(self, error: Exception) -> None:
        """Raises in the flow why its command failed."""
        self._advance(lambda: self._steps.throw(error))

    def close(self) -> None:
        """Ends the flow where it stands; its `finally` clauses run."""
        self._steps.close()

    def _advance(self, step: Callable[[], Command]) -> None:
        try:
            self.wants = step()
        except StopIteration as end:
            self.over, self.wants, self.result = True, None, end.value


def _persistent(flow: Flow[T], policy: Policy) -> Flow[T]:
    """The flow with each of its calls sent until it is answered, and refusals raised where the call was made."""
    answer: object = None
    error: Exception | None = None
    try:
        while True:
            try:
                command = flow.send(answer) if error is None else flow.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                answer = (yield from exchange(command, policy)) if isinstance(command, Call) else (yield command)
                error = None
            except Exception as raised:  # noqa: BLE001 - raised again inside the flow
                answer, error = None, raised
    finally:
        flow.close()


def exchange(call: Call, policy: Policy) -> Flow[httpx.Response]:
    """The answer to a call. Raises the error that a refusal stands for, `gateway_unreachable` where no answer comes."""
    call = _with_key(call, policy)
    repeatable = call.repeatable and (call.content is None or call.content.repeatable)
    retries = policy.retries if call.retries is None else call.retries
    for attempt in itertools.count():
        try:
            response = yield from send(call)
        except httpx.UnsupportedProtocol as error:
            raise _unreachable(call, error) from error
        except httpx.TransportError as error:
            if not (repeatable or isinstance(error, _NOT_SENT)) or attempt >= retries:
                raise _unreachable(call, error) from error
            yield Sleep(_pause_seconds(attempt))
            continue
        if response.status_code < 400 or response.status_code in call.accepts:
            return response
        refusal = refused(response, call.missing)
        seconds = _retry_after(response)
        if not repeatable or response.status_code not in (429, 503) or attempt >= retries:
            raise refusal
        if seconds is None or seconds > LONGEST_RETRY_AFTER_SECONDS:
            raise refusal
        yield Sleep(max(seconds, _pause_seconds(attempt)))
    raise AssertionError("unreachable")


def refused(response: httpx.Response, missing: str = "not_found") -> OperationError:
    """The exception for an answer that is an error: by the problem's code, else by the status."""
    problem = _problem(response)
    code = problem.get("code")
    if code not in CODES:
        code = _code_of(response.status_code, missing)
    message = problem.get("detail") or f"{response.request.method} {response.request.url}: {_text(response)}"
    seconds = _retry_after(response)
    return failure(
        code,
        str(message),
        detail=problem.get("context"),
        errors=problem.get("errors"),
        retry_after_seconds=None if seconds is None else round(seconds),
    )


def _with_key(call: Call, policy: Policy) -> Call:
    """A submission with an Idempotency-Key, its caller's or one of our own: sent twice, it still is one job."""
    if not call.keyed:
        return call
    if "Idempotency-Key" in call.headers:
        return replace(call, repeatable=True)
    if not policy.idempotency_keys:
        return replace(call, repeatable=False)
    return replace(call, repeatable=True, headers={**call.headers, "Idempotency-Key": str(uuid.uuid4())})


def _pause_seconds(attempt: int) -> float:
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**attempt)
    return longest * random.uniform(0.75, 1.0)  # noqa: S311 - spreads callers, hides nothing


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "").strip()
    return float(text) if text.isdigit() else None


def _unreachable(call: Call, error: httpx.TransportError) -> OperationError:
    return failure(
        "gateway_unreachable",
        f"{call.method} {call.path}: no answer from the gateway ({type(error).__name__}: {error}); "
        "is it running, and is the URL right?",
    )


def _problem(response: httpx.Response) -> FreeJson:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _code_of(status: int, missing: str) -> str:
    """A code for an answer that names none, as proxies give them."""
    if status == 404:
        return missing
    if status in (502, 503, 504):
        return "gateway_unreachable"
    known = {
        400: "malformed_request", 401: "unauthorized", 403: "forbidden", 405: "method_not_allowed",
        413: "payload_too_large", 415: "unsupported_media_type", 416: "range_not_satisfiable",
        422: "validation_failed", 429: "rate_limited",
    }  # fmt: skip
    return known.get(status, "internal_error")


def _text(response: httpx.Response) -> str:
    return f"{response.status_code} {response.reason_phrase} {response.text[:500]}".strip()
