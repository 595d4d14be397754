"""How statements are run: plain driver SQL on a SQLAlchemy connection, rows as dictionaries, and transactions."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

import psycopg2
from sqlalchemy import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPICursor, DBAPIModule
from sqlalchemy.exc import DBAPIError

#: A row as the driver gives it. Its type is that of the statement: functions that return rows name a `TypedDict`.
Row: TypeAlias = Any
T = TypeVar("T")

#: A parameter of a statement, as psycopg2 has them: `%(name)s`.
_PARAMETER = re.compile(r"%\((\w+)\)s")


def rows(connection: Connection, sql: str, parameters: Mapping[str, object] | None = None) -> list[Any]:
    """Runs one statement and gives its rows.

    On psycopg2's own cursor: SQLAlchemy's result takes longer to make than most of these statements take to run.
    """
    cursor = connection.connection.cursor()
    try:
        cursor.execute(sql, parameters or {})
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]
    except psycopg2.Error as error:
        raise _as_sqlalchemy(connection, cursor, sql, error) from error
    finally:
        cursor.close()


def row(connection: Connection, sql: str, parameters: Mapping[str, object] | None = None) -> Any | None:
    """Runs one statement and gives its first row, or None."""
    found = rows(connection, sql, parameters)
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement that each connection prepares once, where the server takes longer to plan it than to run it.

    `name` is the server's name for it; `types` gives each parameter's PostgreSQL type, of which nothing is guessed.
    """

    name: str
    sql: str
    types: Mapping[str, str]
    _execution: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = ", ".join(f"%({name})s" for name in self.types)
        object.__setattr__(self, "_execution", f"EXECUTE {self.name} ({parameters})")

    def rows(self, connection: Connection, parameters: Mapping[str, object], *, before: str = "") -> list[Any]:
        """Runs the statement and gives its rows. Statements `before` it go along, in the same transaction."""
        prepared = connection.connection.info
        if self.name not in prepared:
            numbers = {name: f"${number}" for number, name in enumerate(self.types, start=1)}
            sql = _PARAMETER.sub(lambda found: numbers[found[1]], self.sql)
            execute(connection, f"PREPARE {self.name} ({', '.join(self.types.values())}) AS {sql}")
            prepared[self.name] = True
        return rows(connection, before + self._execution, parameters)


def execute(connection: Connection, sql: str, parameters: Mapping[str, object] | None = None) -> int:
    """Runs one statement and gives the number of rows that it touched."""
    return connection.exec_driver_sql(sql, dict(parameters or {})).rowcount


class Relaxed:
    """A connection of its own, in autocommit, whose commits do not wait for the disk.

    A crash of PostgreSQL may lose the last half second of what it writes. So it is for what is kept elsewhere, found
    out, or may be lost: docs/operations.md lists each use with what its loss means. A training step, or whatever else
    changes something on a device, is claimed and ended with commits that wait, which bring all before them to the disk.

    `on_broken` is called, under the same lock as each action, when the connection is given up: what was committed on
    it may be lost from then on.
    """

    def __init__(self, engine: Engine, on_broken: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def run(self, action: Callable[[Connection], T]) -> T:
        """What `action` gives. After an error the connection is replaced by the next call's."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._engine.connect()
                    execute(self._connection, "SET synchronous_commit = off")
                    # Never back to the pool with that setting.
                    self._connection.detach()
                return action(self._connection)
            except Exception:
                if self._connection is not None:
                    self._connection.invalidate()
                    self._connection.close()
                    self._connection = None
                self._on_broken()
                raise


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction on its own connection: committed at the end of the block, rolled back when it raises."""
    with engine.connect() as opened:
        try:
            connection = opened.execution_options(isolation_level="READ COMMITTED")
        except psycopg2.Error as error:  # the one thing that SQLAlchemy does not raise as its own
            raise _as_sqlalchemy(opened, None, "BEGIN", error) from error
        with connection.begin():
            yield connection


def _as_sqlalchemy(connection: Connection, cursor: DBAPICursor | None, sql: str, error: psycopg2.Error) -> DBAPIError:
    """The error as SQLAlchemy would raise it. After a lost connection every pooled one counts as lost too."""
    raised = cast(DBAPIModule.Error, error)
    is_lost = connection.dialect.is_disconnect(raised, connection.connection.dbapi_connection, cursor)
    if is_lost:
        connection.invalidate(error)
        connection.engine.dispose(close=False)
    known = DBAPIError.instance(
        sql, None, error, psycopg2.Error, connection_invalidated=is_lost, dialect=connection.dialect
    )
    assert isinstance(known, DBAPIError)
    return known
