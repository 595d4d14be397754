"""One table of transitions: the store's statements, and the trigger behind them, allow what it says and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from device_operations.jobs import FOLLOWING, OPEN, TERMINAL, TRANSITIONS, State, new_id
from tasks.database import dumps, open_engine
from tasks.jobs import claims
from tasks.jobs import lost_ends as ends
from tasks.jobs import store as jobs
from tasks.jobs.store import Ending
from tasks.records.states import TRIGGER, trigger
from tasks.statements import Row, execute, row
from tests.support.records import make_device

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def engine(databases: object) -> Iterator[Engine]:
    with databases.migrated() as url:  # type: ignore[attr-defined]
        opened = open_engine(url)
        yield opened
        opened.dispose()


@pytest.fixture(scope="module")
def epoch(engine: Engine) -> int:
    return make_device(engine)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """A transaction that is rolled back."""
    with engine.connect() as opened:
        connection = opened.execution_options(isolation_level="READ COMMITTED")
        with connection.begin() as transaction:
            yield connection
            transaction.rollback()


def record(connection: Connection, state: str, epoch: int | None = None) -> str:
    """A job in `state`, claimed under `epoch`, whose time has come."""
    job_id = new_id()
    execute(
        connection,
        """
        INSERT INTO jobs (id, kind, state, device_id, queue, priority, request, owner, epoch, due_at, finished_at)
        VALUES (%(id)s, 'inference.run', %(state)s, 'cpu_0', 'device.cpu_0', 5, '{}', 'default', %(epoch)s,
            clock_timestamp(), CASE WHEN %(ended)s THEN clock_timestamp() END)
        """,
        {"id": job_id, "state": state, "epoch": epoch, "ended": state in TERMINAL},
    )
    return job_id


def version_of(connection: Connection, job_id: str) -> tuple[str, str]:
    """The job's state, and where its row lies: every UPDATE writes it elsewhere."""
    found = row(connection, "SELECT state, ctid::text AS place FROM jobs WHERE id = %(id)s", {"id": job_id})
    assert found is not None
    return found["state"], found["place"]


def claimed_row(connection: Connection, job_id: str) -> Row:
    found = jobs.asked_of(connection, job_id)
    assert found is not None
    return found


def end_as_claimed(connection: Connection, job_id: str, epoch: int, state: State) -> None:
    jobs.end_running(connection, [Ending(job_id, state)], epoch, {job_id: claimed_row(connection, job_id)})


def end_as_claimed_ahead(connection: Connection, job_id: str, epoch: int, state: State) -> None:
    ending = Ending(job_id, state, started_at=NOW)
    jobs.end_running(connection, [ending], epoch, {job_id: claimed_row(connection, job_id)})


def record_again(connection: Connection, job_id: str, state: State) -> None:
    known = claimed_row(connection, job_id)
    ends.record_again(connection, dumps([{**known, "state": state, "finished_at": None, "epoch": known["epoch"]}]))


def record_unclaimed(connection: Connection, job_id: str, epoch: int, state: State) -> None:
    known = {**claimed_row(connection, job_id), "state": state, "finished_at": None, "epoch": epoch, "attempt": 1}
    ends.record_unclaimed(connection, dumps([known]))


Statement = Callable[[Connection, str, int, State], object]

#: Every statement that changes a state: the transition that it makes, and whether the job is claimed before.
STATEMENTS: dict[str, tuple[str, bool, Statement]] = {
    "mark_reserved": ("receive", False, lambda c, job, epoch, to: jobs.mark_reserved(c, [job])),
    "make_due": ("fall_due", False, lambda c, job, epoch, to: jobs.make_due(c, 10)),
    "claim": ("claim", False, lambda c, job, epoch, to: jobs.claim(c, [job], "cpu_0", epoch)),
    "claim_ahead": ("claim_ahead", False, lambda c, job, epoch, to: claims.claim_ahead(c, [job], "cpu_0", epoch)),
    "mark_begun": ("begin", True, lambda c, job, epoch, to: claims.mark_begun(c, {job: NOW}, epoch)),
    "end_running": ("finish", True, lambda c, job, epoch, to: jobs.end_running(c, [Ending(job, to)], epoch)),
    "end_running, claimed": ("finish", True, end_as_claimed),
    "end_running, claimed ahead": ("finish", True, end_as_claimed_ahead),
    "retry": ("retry", True, lambda c, job, epoch, to: jobs.retry(c, claimed_row(c, job), epoch, {}, 0)),
    "requeue": ("requeue", True, lambda c, job, epoch, to: jobs.requeue(c, [job], died=True)),
    "end_open": ("withdraw", True, lambda c, job, epoch, to: jobs.end_open(c, [Ending(job, to)])),
    "end_open, every state": ("withdraw", True, lambda c, job, epoch, to: jobs.end_open(c, [Ending(job, to)], State)),
    "record_again": ("recover", True, lambda c, job, epoch, to: record_again(c, job, to)),
    "record_unclaimed": ("recover", False, record_unclaimed),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_makes_its_transition_and_no_other(connection: Connection, epoch: int, name: str) -> None:
    transition, claimed, statement = STATEMENTS[name]
    way = TRANSITIONS[transition]
    # Its own guard is meant, not the trigger behind it.
    execute(connection, f"ALTER TABLE jobs DISABLE TRIGGER {TRIGGER}")
    made = set()
    for state in State:
        for wanted in TERMINAL if way.entering <= TERMINAL else [next(iter(way.entering))]:
            job_id = record(connection, state, epoch if claimed else None)
            before = version_of(connection, job_id)
            statement(connection, job_id, epoch, wanted)
            after = version_of(connection, job_id)
            if after != before:
                made.add((state, after[0]))
    assert made == {(state, after) for state in way.leaving for after in way.entering}


def test_every_transition_has_a_statement() -> None:
    assert {transition for transition, _, _ in STATEMENTS.values()} == set(TRANSITIONS)


def refused(connection: Connection, job_id: str, state: str) -> str | None:
    """What the database says to an UPDATE of the job's state that no guard stands before; None where it does it."""
    try:
        with connection.begin_nested():
            changed = execute(
                connection,
                "UPDATE jobs SET state = %(state)s, finished_at = CASE WHEN %(ended)s THEN clock_timestamp() END "
                "WHERE id = %(id)s",
                {"state": state, "ended": state in TERMINAL, "id": job_id},
            )
        assert changed == 1
    except IntegrityError as error:
        return str(error)
    return None


@pytest.mark.parametrize("before", State)
def test_the_database_refuses_every_change_but_the_transitions(connection: Connection, before: State) -> None:
    allowed = set()
    for after in [*State, "unknown"]:
        job_id = record(connection, before)
        error = refused(connection, job_id, after)
        if error is None:
            allowed.add(after)
        else:
            assert f"is {before}, and cannot become {after}" in error
        assert version_of(connection, job_id)[0] == (after if after in allowed else before)
    assert allowed == FOLLOWING[before] | {before}


def test_the_trigger_in_the_database_is_made_from_the_table(connection: Connection) -> None:
    told = (
        f"SELECT pg_get_triggerdef(t.oid) AS trigger, pg_get_functiondef(t.tgfoid) AS function FROM pg_trigger t "
        f"WHERE tgrelid = 'jobs'::regclass AND tgname = '{TRIGGER}'"
    )
    migrated = row(connection, told)
    execute(connection, f"DROP TRIGGER {TRIGGER} ON jobs")
    execute(connection, f"DROP FUNCTION {TRIGGER}()")
    for statement in trigger():
        connection.execute(text(statement))
    assert migrated == row(connection, told), "the table has changed: add a migration with its trigger"
    alone = row(connection, "SELECT count(*) AS triggers FROM pg_trigger WHERE tgrelid = 'jobs'::regclass")
    assert alone == {"triggers": 1}


def test_every_open_state_leads_on_and_no_terminal_one_does() -> None:
    assert set(FOLLOWING) == set(State)
    assert all(FOLLOWING[state] for state in OPEN)
    assert not any(FOLLOWING[state] for state in TERMINAL)
