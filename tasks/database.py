"""The doorway to PostgreSQL: one engine for a process, connections in autocommit, and JSON by orjson."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import orjson
import psycopg2
import psycopg2.extensions
import psycopg2.extras
import structlog
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError

from device_operations.errors import failure

T = TypeVar("T")
log = structlog.get_logger(__name__)

#: Seconds to wait for a connection before the database counts as unreachable.
CONNECT_TIMEOUT_SECONDS = 5


def open_engine(url: str, *, pool_size: int = 5, max_overflow: int = 10) -> Engine:
    """An engine for `url` (`postgresql://…`). Statements run in autocommit unless `transaction` is used."""
    engine = create_engine(
        dialect_url(url),
        isolation_level="AUTOCOMMIT",
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_pre_ping=False,
        pool_timeout=10,
        # UTC keeps times readable whatever the server's own zone is. Statements are few and fixed, each has an index
        # for its way, and some are prepared: a plan made while a table is empty would else read all of it for ever.
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "application_name": "device-operations",
            # What is prepared is planned once: the server would plan it again for each array, which takes longer.
            "options": "-c timezone=UTC -c lock_timeout=30000 -c enable_seqscan=off "
            "-c plan_cache_mode=force_generic_plan",
        },
        json_serializer=_dumps,
        json_deserializer=orjson.loads,
    )
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "checkout", refuse_closed)
    return engine


def dialect_url(url: str) -> str:
    """`url` with the driver that this project uses named: SQLAlchemy's own choice changes between its releases."""
    return "postgresql+psycopg2://" + url.partition("://")[2]


def _on_connect(connection: psycopg2.extensions.connection, _record: object) -> None:
    """Makes psycopg2 itself give JSON columns as Python values, and None for NULL."""
    psycopg2.extras.register_default_jsonb(connection, globally=False, loads=orjson.loads)
    psycopg2.extras.register_default_json(connection, globally=False, loads=orjson.loads)


def refuse_closed(connection: psycopg2.extensions.connection, _record: object, _proxy: object) -> None:
    """Keeps a connection that the server closed while it lay in the pool from being used: a new one takes its place.

    An idle connection has nothing to be read, and a closed one its end: no question to the server is needed.
    """
    try:
        closed = connection.closed or _has_news(connection.fileno())
    except psycopg2.Error:
        closed = True
    if closed:
        raise DisconnectionError("the server closed this connection")


def _has_news(socket: int) -> bool:
    if sys.platform == "win32":
        return bool(select.select([socket], [], [], 0)[0])
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))


def _dumps(value: object) -> str:
    return orjson.dumps(value).decode()


def dumps(value: object) -> str:
    """JSON text for a `jsonb` parameter. PostgreSQL cannot hold NUL in text: it becomes U+FFFD."""
    text = orjson.dumps(value, default=str).decode()
    return text.replace("\\u0000", "\\ufffd") if "\\u0000" in text else text


def is_disconnect(error: BaseException) -> bool:
    """Whether `error` means that the database went away, so that the same statement may succeed later."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, (OperationalError, InterfaceError)):
        code = getattr(getattr(error, "orig", None), "pgcode", None)
        # 57P: shutting down, in crash recovery, starting up. 08: the connection failed. 53: out of connections, memory
        # or disk. No code: the connection failed before the server could answer.
        return code is None or code.startswith(("57P", "08", "53"))
    return False


def unavailable(error: BaseException) -> Exception:
    """`database_unavailable` for a lost connection, else the error itself."""
    if is_disconnect(error):
        return failure(
            "database_unavailable", "PostgreSQL does not answer; nothing was recorded, try again", retry_after_seconds=2
        )
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def until_reachable(action: Callable[[], T], *, stop: Callable[[], bool] = lambda: False) -> T:
    """Runs `action`, again and again while the database is away, with backoff up to 2 s, until `stop` says so."""
    wait_seconds = 0.05
    while True:
        try:
            return action()
        except (OperationalError, InterfaceError, DBAPIError) as error:
            if stop() or not is_disconnect(error):
                raise
            log.warning("database unreachable", error=str(error.orig).strip(), retry_in_seconds=wait_seconds)
            time.sleep(wait_seconds)
            wait_seconds = min(2.0, wait_seconds * 2)
