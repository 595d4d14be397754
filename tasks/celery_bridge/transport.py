"""kombu's Redis transport, for a queue whose messages PostgreSQL has on record: several at a time, and past Celery.

kombu takes one message a round trip, keeps a book of unacknowledged ones in Redis, two more round trips a message, and
Celery makes a request of each. A message that a gateway published is on record before it is sent and is published again
if it is lost: such a one goes to the worker's scheduler at once, without book and request. A direct caller's message
goes kombu's and Celery's way, and is in the book until it is recorded. Servers older than Redis 7 lack BLMPOP: there
one message is taken at a time, as kombu does.

Every message is read by `tasks.redis.messages`, wherever it comes from: queues, the book, Celery's remote control. One
that cannot be read, or that makes its receiver fail, is logged, acknowledged and gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from queue import Empty
from time import monotonic
from typing import Any, ClassVar, TypeVar, cast

import orjson
from kombu.asynchronous import Hub
from kombu.connection import Connection
from kombu.transport import redis
from kombu.transport.virtual import base as virtual
from kombu.utils.encoding import bytes_to_str
from redis import Redis
from redis.client import Pipeline, PubSub
from redis.exceptions import RedisError, ResponseError

from tasks.redis import messages
from tasks.redis.key_types import remove_wrong_types, with_types
from tasks.redis.message_fields import REMOTE_CONTROL, Unreadable
from tasks.redis.messages import Payload, RecordedMessage, UnknownTask

T = TypeVar("T")

#: Seconds after which a reader that the event loop has is added to it again.
ADD_AGAIN_SECONDS = 1.0

#: Messages taken in one round trip at most. The scheduler holds many more, so this only bounds one turn of the event
#: loop.
AT_ONCE = 32


class Message(virtual.Message):
    """A message whose body is read already."""

    def __init__(self, payload: Payload, channel: virtual.Channel | None = None, **options: object) -> None:
        super().__init__(payload, channel=channel, **options)
        self._decoded_cache = payload.decoded


class QoS(redis.QoS):
    """Takes no message while the worker holds as many as it may. Its book in Redis may hold anything."""

    def can_consume(self) -> bool:
        """Whether another message may be taken."""
        return bool(super().can_consume()) and Channel.has_room()

    def append(self, message: virtual.Message, delivery_tag: str) -> None:
        """Enters a message in the book."""
        self._in_book(lambda: super(QoS, self).append(message, delivery_tag))

    def ack(self, delivery_tag: str) -> None:
        """Takes a message off the book."""
        self._in_book(lambda: super(QoS, self).ack(delivery_tag))

    def restore_visible(self, *arguments: object, **options: object) -> None:
        """Puts messages back that have been in the book for longer than any worker keeps them."""
        self._in_book(lambda: super(QoS, self).restore_visible(*arguments, **options))

    def restore_by_tag(self, tag: str | bytes, client: Redis | None = None, leftmost: bool = False) -> None:
        """Puts one message of the book back into this device's queue, also if it names another; or refuses it."""

        def restore(pipe: Pipeline) -> None:
            size = pipe.hstrlen(self.unacked_key, tag)
            kept = cast("bytes | None", pipe.hget(self.unacked_key, tag)) if size <= messages.KEPT_BYTES else None
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if kept is None and not size:
                return
            try:
                message = messages.read_kept(kept, size)
            except Unreadable as error:
                messages.refuse(kept or b"", self.unacked_key, error)
                return
            put = pipe.lpush if leftmost else pipe.rpush
            queue = self.channel.home_queue
            put(self.channel._q_for_pri(queue, message.step), orjson.dumps(message.payload(queue)))

        with self.channel.conn_or_acquire(client) as connection:
            self._in_book(lambda: connection.transaction(restore, self.unacked_key))

    def restore_all(self) -> None:
        """Puts everything in the book back: at a worker's start, when no other process writes there."""
        with self.channel.conn_or_acquire() as client:
            for tag in self._in_book(lambda: client.hkeys(self.unacked_key)):
                self.restore_by_tag(tag, client=client)
            client.delete(self.unacked_index_key)

    def _in_book(self, step: Callable[[], T]) -> T:
        expected = {self.unacked_key: "hash", self.unacked_index_key: "zset"}
        with self.channel.conn_or_acquire() as client:
            return with_types(client, expected, step)


class Channel(redis.Channel):
    """Takes several messages of one queue and priority in one round trip."""

    Message = Message
    QoS = QoS

    from_transport_options = (*redis.Channel.from_transport_options, "home_queue")  # type: ignore[assignment]

    #: The device's own queue; every other one carries notices.
    home_queue: str = ""

    #: Set by the worker: whether there is room for more messages.
    has_room: ClassVar[Callable[[], bool]] = staticmethod(lambda: True)

    #: Whether the server has BLMPOP; asked once for each channel.
    _takes_many: bool | None = None

    #: The client for all commands that are answered at once, made when first asked for.
    _usual_client: Any = None

    #: The keys of queues that are read together, in each order in which they are.
    _keys: ClassVar[dict[tuple[str, ...], list[str]]] = {}

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self._takes_many is None:
            version = str(self.client.info("server").get("redis_version", "0"))
            self._takes_many = int(version.partition(".")[0]) >= 7
        if not self._takes_many:
            super()._brpop_start(timeout)
            return
        queues = tuple(self._queue_cycle.consume(len(self.active_queues)))
        if not queues:
            return
        keys = self._keys.get(queues)
        if keys is None:
            keys = self._keys[queues] = list(self._lists(queues))
        connection = self.client.connection
        self._in_poll: Any = connection
        self._brpop_sent_at: Any = monotonic()
        wait_seconds = timeout or self.brpop_timeout or 0
        connection.send_command("BLMPOP", wait_seconds, len(keys), *keys, "RIGHT", "COUNT", AT_ONCE)

    def _lists(self, queues: Iterable[str]) -> dict[str, str]:
        """The keys of queues, the highest priority first, and their type."""
        return {self._q_for_pri(queue, step): "list" for step in self.priority_steps for queue in queues}

    def _brpop_read(self, **options: object) -> bool:
        command = "BLMPOP" if self._takes_many else "BRPOP"
        client = self.client
        try:
            try:
                answer = client.parse_response(client.connection, command, **options)
            except self.connection_errors:
                client.connection.disconnect()
                raise
            except ResponseError as error:
                if "WRONGTYPE" not in str(error):
                    raise
                with self.conn_or_acquire() as other:
                    remove_wrong_types(other, self._lists(self.active_queues))
                raise Empty from None
            if not answer:
                raise Empty
            key, taken = answer
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self._hand_out(queue, key, taken if self._takes_many else [taken])
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _hand_out(self, queue: str, key: bytes, items: list[bytes]) -> None:
        """Delivers in order. What a broken connection leaves over goes back to where it was taken from."""
        for number, item in enumerate(items):
            try:
                self._deliver(item, queue)
            except BaseException:
                with self.conn_or_acquire() as client:
                    client.rpush(key, *reversed(items[number:]))
                raise

    def _deliver(self, item: bytes, queue: str) -> None:
        """Delivers one message, or refuses it: no message's fault reaches Celery's loop."""
        tag = None
        try:
            if queue == self.home_queue:
                message = messages.read(item)
                if isinstance(message, RecordedMessage):
                    self.connection.take(message)
                    return
                payload = message.payload(queue)
            else:
                remote = queue in self.active_fanout_queues
                payload = messages.read_notice(item, queue, REMOTE_CONTROL if remote else None)
            tag = payload["properties"]["delivery_tag"]
            self.connection._deliver(payload, queue)
        except (RedisError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - the next message is read after any error
            messages.refuse(item, queue, error)
            if tag is not None and tag in self.qos._delivered:
                self.qos.ack(tag)
            if isinstance(error, UnknownTask):
                self.connection.unknown_task(error.job_id, error.task)

    def _receive_one(self, c: PubSub) -> bool | None:
        """Reads one message of Celery's remote control, which comes by publish and subscribe."""
        try:
            answer = c.parse_response()
        except self.connection_errors:
            self._in_listen: Any = None
            raise
        if not isinstance(answer, (list, tuple)):
            return None
        message = self._handle_message(c, answer)
        if not bytes_to_str(message["type"]).endswith("message") or not message["data"]:
            return None
        exchange = bytes_to_str(message["channel"]).partition(".")[2].split("/", 1)[0]
        queue = self._fanout_to_queue.get(exchange)
        if queue is not None:
            self._deliver(message["data"], queue)
        return True

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **options: Any) -> None:
        """Publishes as kombu does. orjson writes the message: one of events is long."""
        payload = orjson.dumps(message)
        with self.conn_or_acquire() as client:
            for topic in self._get_publish_topics(exchange, routing_key):
                client.publish(topic, payload)

    def _create_client(self, asynchronous: bool = False) -> Any:
        """A client; for commands that are answered at once always the same: making one takes longer than a command."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._usual_client is None or self._usual_client.connection_pool is not self.pool:
            self._usual_client = super()._create_client()
        return self._usual_client

    def _size(self, queue: str) -> int:
        size = super()._size
        with self.conn_or_acquire() as client:
            return int(with_types(client, self._lists([queue]), lambda: size(queue)))

    def _queue_bind(self, exchange: str, *arguments: object) -> None:
        bind = super()._queue_bind
        expected = {
            self.keyprefix_queue % exchange: "set",
            self.keyprefix_binding_permanent % exchange: "set",
            self.keyprefix_binding_deadlines: "zset",
        }
        with self.conn_or_acquire() as client:
            with_types(client, expected, lambda: bind(exchange, *arguments))


class _Hub:
    """Celery's event loop, for a transport that adds its readers again in each turn.

    Each time costs an exception and a system call for each. What the loop has is added again once a second: a socket
    that was opened anew may have the number of the one before.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._until: dict[int, float] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._hub, name)

    def add_reader(self, fd: int, callback: Callable[..., object], *arguments: object) -> None:
        now = monotonic()
        if fd not in self._hub.readers or self._until.get(fd, 0.0) < now:
            self._hub.add_reader(fd, callback, *arguments)
            self._until[fd] = now + ADD_AGAIN_SECONDS


class Transport(redis.Transport):
    """The transport that `broker_transport` names."""

    Channel = Channel

    #: Set by the worker: takes a recorded job's message.
    take: ClassVar[Callable[[RecordedMessage], None]] = staticmethod(lambda message: None)

    def register_with_event_loop(self, connection: Connection, loop: Hub) -> None:
        """Has the loop read the connection's sockets."""
        super().register_with_event_loop(connection, _Hub(loop))

    #: Set by the worker: reports to Celery that a task, by its id and name, is none that runs here.
    unknown_task: ClassVar[Callable[[str, str], None]] = staticmethod(lambda job_id, task: None)
