"""What the worker adds to Celery's consumer: its control queue, and stopping in order on signals."""

from __future__ import annotations

import signal
from collections.abc import Callable

from celery import Celery, bootsteps
from celery.worker import state
from kombu.entity import Queue
from kombu.messaging import Consumer

from tasks.redis.messages import Wake, read_wake
from tasks.redis.queues import control_queue
from workers.celery_bridge.events import Untyped


def stop_early_on_signals() -> None:
    """Stops in order also before Celery listens to signals itself; and on Windows, which sends Ctrl-Break, after."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    def stop_warm(*_: object) -> None:
        state.should_stop = 0

    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), leave)
    if hasattr(signal, "SIGBREAK"):
        signal.signal(signal.SIGBREAK, stop_warm)


def control_step(device_id: str, receive: Callable[[Wake], None]) -> type[bootsteps.ConsumerStep]:
    """Celery's consumer step that reads the device's control queue, on a channel of its own."""

    class Control(bootsteps.ConsumerStep):
        def get_consumers(self, channel: Untyped) -> list[Consumer]:
            queue = Queue(control_queue(device_id), durable=False, no_ack=True)
            return [Consumer(channel, [queue], callbacks=[self.on_message], accept=["json"], no_ack=True)]

        def on_message(self, body: object, message: object) -> None:
            receive(read_wake(body))

    return Control


def restore_unacked(app: Celery) -> None:
    """Puts back what the device's last worker had received and not acknowledged: kombu keeps it by device."""
    with app.connection_for_read() as connection:
        connection.default_channel.qos.restore_all()
