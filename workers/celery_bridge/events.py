"""A worker's events: what Flower and `celery events` hear of it, in turns instead of at once.

Celery sends task events at every turn of its loop, which takes a quarter of the process's time under load. Here all
that there are go out together, ten times a second.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import orjson
from celery import bootsteps
from celery.events import EventDispatcher
from celery.utils.time import utcoffset
from celery.worker.consumer.events import Events
from kombu.serialization import registry

from device_operations.wire.json_text import loads
from device_operations.wire.json_types import JsonObject

#: An object of Celery's or kombu's, which have no types.
Untyped: TypeAlias = Any

#: The same JSON as Celery's own, made and read in a fifth of the time, direct callers' messages among it.
SERIALIZER = "device-operations-json"
registry.register(SERIALIZER, lambda body: orjson.dumps(body).decode(), loads, "application/json", "utf-8")

#: Seconds between two messages of events, and how many events one message has at most.
EVENTS_SECONDS = 0.1
EVENTS_AT_ONCE = 1000

#: Events that are kept while Redis is away; the oldest go first.
KEPT = 20_000


class Dispatcher(EventDispatcher):
    """Celery's dispatcher, which also sends the events of jobs that have no request of Celery's."""

    #: Set by the worker: how many such jobs hold the device now.
    active: Callable[[], int] = staticmethod(lambda: 0)

    _noted: ClassVar[deque[JsonObject]] = deque(maxlen=KEPT)

    @classmethod
    def note(cls, what: str, job_id: str, **fields: object) -> None:
        """Notes an event of a job, as Celery names them (`task-started`, …). Any thread may; nothing waits."""
        cls._noted.append({"type": what, "uuid": job_id, "timestamp": time.time(), **fields})

    def send(self, type: str, **fields: Untyped) -> object:  # noqa: A002 - Celery's own name for it
        """Sends one event of Celery's own; a heartbeat counts all jobs that run."""
        if type == "worker-heartbeat":
            fields["active"] = fields.get("active", 0) + Dispatcher.active()
        return super().send(type, **fields)

    def send_noted(self) -> None:
        """Sends what was noted and what Celery itself has buffered."""
        self.flush()
        if not self.enabled:
            self._noted.clear()
            return
        common = {"hostname": self.hostname, "utcoffset": utcoffset(), "pid": self.pid}
        while self._noted:
            count = min(len(self._noted), EVENTS_AT_ONCE)
            events = [{**self._noted.popleft(), **common, "clock": self.clock.forward()} for _ in range(count)]
            with self.mutex:
                self._publish(events, self.producer, "task.multi")


class EventsInTurns(bootsteps.StartStopStep):
    """Celery's step that publishes task events ten times a second, all that there are in one message."""

    requires = (Events,)

    def __init__(self, consumer: Untyped, **options: object) -> None:
        self._timer: Untyped = None
        super().__init__(consumer, **options)

    def start(self, consumer: Untyped) -> None:
        """A connection was made, and with it a new dispatcher. Without an event loop (Windows) Celery buffers none."""
        if consumer.hub is not None:
            consumer.event_dispatcher.buffer_limit = EVENTS_AT_ONCE
            consumer.event_dispatcher.on_send_buffered = None
        self._timer = consumer.timer.call_repeatedly(EVENTS_SECONDS, consumer.event_dispatcher.send_noted)

    def stop(self, consumer: Untyped) -> None:
        """The connection ends: what is left goes out."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if consumer.event_dispatcher is not None:
                consumer.event_dispatcher.send_noted()
