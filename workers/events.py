"""When a worker's task events go out: Celery's own events, in turns instead of at once."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.worker.consumer.events import Events

#: Seconds between two messages of events, and after how many events one is sent all the same.
EVENTS_SECONDS = 0.1
EVENTS_AT_ONCE = 1000


class EventsInTurns(bootsteps.StartStopStep):
    """Celery's step that publishes task events ten times a second, all that there are in one message.

    Celery itself publishes them at every turn of its loop, which takes a quarter of this process's time under load.
    """

    requires = (Events,)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timer: Any = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """A connection was made, and with it a new dispatcher. Without an event loop (Windows) nothing is buffered."""
        if consumer.hub is not None:
            consumer.event_dispatcher.buffer_limit = EVENTS_AT_ONCE
            consumer.event_dispatcher.on_send_buffered = None
            self._timer = consumer.hub.call_repeatedly(EVENTS_SECONDS, consumer.event_dispatcher.flush)

    def stop(self, consumer: Any) -> None:
        """The connection ends: what is left goes out."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if consumer.event_dispatcher is not None:
                consumer.event_dispatcher.flush()
