"""How statements are run: plain driver SQL on a SQLAlchemy connection, rows as dictionaries, and transactions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine

Row = dict[str, Any]


def rows(connection: Connection, sql: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
    """Runs one statement and gives its rows."""
    result = connection.exec_driver_sql(sql, dict(parameters or {}))
    return [dict(row) for row in result.mappings()]


def row(connection: Connection, sql: str, parameters: Mapping[str, Any] | None = None) -> Row | None:
    """Runs one statement and gives its first row, or None."""
    found = rows(connection, sql, parameters)
    return found[0] if found else None


def execute(connection: Connection, sql: str, parameters: Mapping[str, Any] | None = None) -> int:
    """Runs one statement and gives the number of rows that it touched."""
    return connection.exec_driver_sql(sql, dict(parameters or {})).rowcount


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction on its own connection: committed at the end of the block, rolled back when it raises."""
    with engine.connect() as opened:
        connection = opened.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            yield connection
