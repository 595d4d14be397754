"""kombu's Redis transport, for a queue whose messages PostgreSQL has on record: several at a time, and past Celery.

kombu takes one message a round trip, keeps a book of unacknowledged ones in Redis, two more round trips a message, and
Celery makes a request of each. A message that a gateway published is on record before it is sent and is published again
if it is lost: such a one goes to the worker's lane at once, without book and request. A direct caller's message goes
kombu's and Celery's way, and is in the book until it is recorded. Servers older than Redis 7 lack BLMPOP: there one
message is taken at a time, as kombu does.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from time import monotonic
from typing import Any, ClassVar

import orjson
from kombu.transport import redis
from kombu.utils.encoding import bytes_to_str

from tasks.queues import NOTED

#: Messages taken in one round trip at most. The lane holds many more, so this only bounds one turn of the event loop.
AT_ONCE = 32


class QoS(redis.QoS):
    """Takes no message while the worker holds as many as it may."""

    def can_consume(self) -> bool:
        """Whether another message may be taken."""
        return bool(super().can_consume()) and Channel.has_room()


class Channel(redis.Channel):
    """Takes several messages of one queue and priority in one round trip."""

    QoS = QoS

    #: Set by the worker: whether there is room for more messages.
    has_room: ClassVar[Callable[[], bool]] = staticmethod(lambda: True)

    #: Whether the server has BLMPOP; asked once for each channel.
    _takes_many: bool | None = None

    def _brpop_start(self, timeout: Any = None) -> None:
        if self._takes_many is None:
            version = str(self.client.info("server").get("redis_version", "0"))
            self._takes_many = int(version.partition(".")[0]) >= 7
        if not self._takes_many:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        keys = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        self._in_poll: Any = self.client.connection
        self._brpop_sent_at: Any = monotonic()
        wait_seconds = timeout or self.brpop_timeout or 0
        self.client.connection.send_command("BLMPOP", wait_seconds, len(keys), *keys, "RIGHT", "COUNT", AT_ONCE)

    def _brpop_read(self, **options: Any) -> bool:
        if not self._takes_many:
            return bool(super()._brpop_read(**options))
        try:
            try:
                answer = self.client.parse_response(self.client.connection, "BLMPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if not answer:
                raise Empty
            key, items = answer
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self._hand_out(queue, key, items)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _hand_out(self, queue: str, key: bytes, items: list[bytes]) -> None:
        """Delivers in order. What a failing delivery leaves over goes back to where it was taken from."""
        for number, item in enumerate(items):
            try:
                self.connection._deliver(orjson.loads(item), queue)
            except BaseException:
                left = items[number + 1 :]
                if left:
                    with self.conn_or_acquire() as client:
                        client.rpush(key, *reversed(left))
                raise


class Transport(redis.Transport):
    """The transport that `broker_transport` names."""

    Channel = Channel

    #: Set by the worker: takes a recorded job's message as it came.
    take: ClassVar[Callable[[dict[str, Any]], None] | None] = None

    def _deliver(self, message: dict[str, Any], queue: str) -> None:
        take = type(self).take
        if take is not None and NOTED in (message.get("headers") or {}):
            take(message)
        else:
            super()._deliver(message, queue)
