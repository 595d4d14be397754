"""Statements: rows as dictionaries, and errors as SQLAlchemy raises them, lost connections above all."""

from __future__ import annotations

import psycopg2
import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, ProgrammingError

from tasks.database import is_disconnect, open_engine, refuse_closed
from tasks.statements import row, rows, transaction


def test_rows_are_dictionaries_of_python_values(database_url: str) -> None:
    with open_engine(database_url).connect() as connection:
        sql = """SELECT '{"a": 1}'::jsonb AS json, ARRAY['x'] AS texts, %(text)s::text AS text"""
        assert rows(connection, sql, {"text": "100 %"}) == [{"json": {"a": 1}, "texts": ["x"], "text": "100 %"}]


def test_a_wrong_statement_is_not_a_lost_connection(database_url: str) -> None:
    with open_engine(database_url).connect() as connection:
        with pytest.raises(ProgrammingError) as refused:
            rows(connection, "SELECT * FROM nowhere")
        assert not is_disconnect(refused.value)
        assert rows(connection, "SELECT 1 AS one") == [{"one": 1}]


def test_a_transaction_keeps_all_or_nothing(database_url: str) -> None:
    engine = open_engine(database_url)
    insert = "INSERT INTO resource_order (resource_id) VALUES (%(id)s) RETURNING resource_id"
    with transaction(engine) as connection:
        rows(connection, insert, {"id": "kept"})
    with pytest.raises(ZeroDivisionError), transaction(engine) as connection:
        rows(connection, insert, {"id": "dropped"})
        raise ZeroDivisionError
    with engine.connect() as connection:
        assert rows(connection, "SELECT resource_id FROM resource_order") == [{"resource_id": "kept"}]


def test_after_a_lost_connection_every_pooled_one_is_made_anew(database_url: str) -> None:
    engine = open_engine(database_url)
    event.remove(engine, "checkout", refuse_closed)
    first, second = engine.connect(), engine.connect()
    pids = [_pid(connection) for connection in (first, second)]
    second.close()
    _kill(database_url, pids)
    with pytest.raises(DBAPIError) as lost:
        rows(first, "SELECT 1 AS one")
    assert lost.value.connection_invalidated
    assert is_disconnect(lost.value)
    # The same connection connects again, and the pool does not hand out the other one, which was killed too.
    assert _pid(first) not in pids
    with engine.connect() as third:
        assert _pid(third) not in pids
    first.close()


def test_a_transaction_on_a_lost_connection_says_so(database_url: str) -> None:
    engine = open_engine(database_url)
    event.remove(engine, "checkout", refuse_closed)
    with engine.connect() as connection:
        pid = _pid(connection)
    _kill(database_url, [pid])
    with pytest.raises(DBAPIError) as lost, transaction(engine) as connection:
        rows(connection, "SELECT 1 AS one")
    assert is_disconnect(lost.value)
    with transaction(engine) as connection:
        assert rows(connection, "SELECT 1 AS one") == [{"one": 1}]


def test_a_connection_that_was_closed_in_the_pool_is_not_handed_out(database_url: str) -> None:
    engine = open_engine(database_url)
    several = [engine.connect() for _ in range(3)]
    pids = [_pid(connection) for connection in several]
    for connection in several:
        connection.close()
    _kill(database_url, pids)
    again = [engine.connect() for _ in range(3)]
    living = {_pid(connection) for connection in again}
    assert not living & set(pids)
    for connection in again:
        connection.close()
    with engine.connect() as connection:
        assert _pid(connection) in living, "one that lives is kept"


def _kill(database_url: str, pids: list[int]) -> None:
    """Ends servers' ends of connections, and waits until they are gone."""
    killer = psycopg2.connect(database_url)
    with killer.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid", [pids])
    killer.close()


def _pid(connection: object) -> int:
    found = row(connection, "SELECT pg_backend_pid() AS pid")  # type: ignore[arg-type]
    assert found is not None
    return int(found["pid"])
