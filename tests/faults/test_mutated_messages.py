"""Thousands of messages, each made from a readable one by some change: the worker serves on, and nothing is left."""

from __future__ import annotations

import base64
import copy
import json
import zlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.device_queue import DeviceQueue
from tests.support.messages import direct, raw, recorded
from tests.support.repetitions import FACTOR, repetitions
from tests.support.stack import RunningStack

MESSAGES = repetitions(5000)
AT_ONCE = 250

#: How much more memory the worker may hold in the end, in bytes.
GROWTH_BYTES = 150 << 20

_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "a\0b", "\ud800", "\udfff\ud800", "x" * 300, "9" * 5000, "device_operations.memory.copy"]
    ),
    st.sampled_from(["base64", "utf-16", "zip", "application/x-gzip", "application/x-python-serialize", "gpu_0", "/"]),
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    _TEXTS,
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**400]),
)
JUNK = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4), max_leaves=8
)
_DEPTHS = st.sampled_from([10, 300, 900, 1100, 50_000])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place within JSON, as what holds it and its key."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A message of a caller or of a gateway after one or more changes of structure, types, encodings or bytes."""
    envelope = draw(st.sampled_from([direct, recorded]))()
    if "request" in envelope:
        for _ in range(draw(st.integers(1, 3))):
            _change(draw, envelope)
        message = raw(envelope)
        return _bytes(draw, message) if draw(st.integers(0, 4)) == 0 else message
    body = json.loads(base64.b64decode(envelope["body"]))
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, draw(st.sampled_from([envelope, body])))
    text = json.dumps(body).encode()
    how = draw(st.sampled_from(["whole"] * 4 + ["bytes of the body", "compressed", "plain", "deep", "untouched"]))
    if how == "bytes of the body":
        text = _bytes(draw, text)
    elif how == "compressed":
        text = zlib.compress(text)
        if isinstance(envelope.get("headers"), dict):
            envelope["headers"]["compression"] = "application/x-gzip"
    elif how == "deep":
        text = text.replace(b"null", (b"[" * (depth := draw(_DEPTHS))) + b"]" * depth, 1)
    if how == "plain":
        envelope["body"] = text.decode()
        if isinstance(envelope.get("properties"), dict):
            envelope["properties"]["body_encoding"] = "utf-8"
    elif how != "untouched" and "body" in envelope:
        envelope["body"] = base64.b64encode(text).decode()
    message = raw(envelope)
    return _bytes(draw, message) if draw(st.integers(0, 4)) == 0 else message


def _change(draw: st.DrawFn, value: Any) -> None:
    """Changes one place within JSON."""
    found = list(places(value))
    if not found:
        return
    holder, key = draw(st.sampled_from(found))
    change = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "swap"]))
    if change == "replace":
        holder[key] = draw(JUNK)
    elif change == "remove":
        del holder[key]
    elif change == "wrap":
        holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}, [holder[key]] * 3]))
    else:
        other, name = draw(st.sampled_from(found))
        # Copies, so that nothing holds itself.
        holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])


def _bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Cuts, overwrites, inserts or repeats bytes."""
    at = draw(st.integers(0, len(data)))
    piece = draw(st.binary(max_size=8))
    how = draw(st.sampled_from(["cut", "behead", "overwrite", "insert", "repeat"]))
    if how == "cut":
        return data[:at]
    if how == "behead":
        return data[at:]
    if how == "overwrite":
        return data[:at] + piece + data[at + len(piece) :]
    return data[:at] + (piece if how == "insert" else data[: at // 2]) + data[at:]


@pytest.mark.timeout(600 * FACTOR)
@pytest.mark.slow
def test_thousands_of_changed_messages_stop_no_worker_and_leave_nothing_behind(stack: RunningStack) -> None:
    queue = DeviceQueue(stack)
    queue.serves()
    process = psutil.Process(stack.process("cpu_0").pid)
    held = process.memory_info().rss
    waiting: list[bytes] = []
    sent = 0

    def put() -> None:
        nonlocal sent
        sent += len(waiting)
        queue.put(waiting, priority=sent // AT_ONCE % 10)
        waiting.clear()
        try:
            queue.settle(60)
            queue.serves()
        except Exception as error:
            raise AssertionError(f"after {sent}: {queue.left()}: {stack.log('cpu_0')[-3000:]}") from error

    @settings(
        max_examples=MESSAGES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutated())
    def collect(message: bytes) -> None:
        waiting.append(message)
        if len(waiting) == AT_ONCE:
            put()

    collect()
    put() if waiting else queue.settle()
    assert sent == MESSAGES
    assert stack.is_running("cpu_0")
    assert process.is_running()
    assert process.memory_info().rss - held < GROWTH_BYTES
    log = queue.log()
    assert not [line for line in log if "exception" in line]
    assert len(queue.refusals()) > MESSAGES // 5, "most changes make a message unreadable"
    assert len(log) < 3 * MESSAGES
    # And after a restart nothing of it comes back.
    refused = len(queue.refusals())
    stack.restart("cpu_0")
    stack.wait_ready()
    queue.settle()
    queue.serves()
    assert len(queue.refusals()) == refused
    queue.close()
