"""Ends that were announced and lost: each state that a crash of PostgreSQL leaves their rows in, on a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg2
import pytest
from sqlalchemy import Engine

from device_operations.jobs import State
from device_operations.stack.servers import Servers
from tasks.database import open_engine
from tasks.jobs import lifecycle, unflushed
from tasks.jobs import lost_ends as ends
from tasks.jobs import rescue as rescues
from tasks.jobs import store as jobs
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.store import Ending
from tasks.jobs.unflushed import Unflushed
from tasks.statements import Relaxed, Row, execute, transaction
from tests.spine.test_records import new_job
from tests.support.crashing import CrashingPostgres, crashing_postgres
from tests.support.databases import Databases
from tests.support.folders import reachable_folder
from tests.support.records import make_device
from tests.support.stack import eventually


@pytest.fixture(scope="module")
def crashing() -> Iterator[CrashingPostgres]:
    with reachable_folder() as folder, crashing_postgres(folder / "own") as server:
        yield server


@dataclass
class Bench:
    """A database whose log is written late, a device's epoch on it, and what a worker and a gateway hold."""

    engine: Engine
    epoch: int
    relaxed: Relaxed
    kept: Unflushed
    server: CrashingPostgres
    url: str

    def begun(self, waiting_for_the_disk: int) -> Row:
        """A run that was submitted and claimed; of these two steps, the first so many wait for the disk."""
        made = new_job(needs=["model"], request={"model_id": "model"}, webhook_url="http://127.0.0.1:9/")

        def insert(connection: object) -> None:
            jobs.insert(connection, [made])  # type: ignore[arg-type]

        def claim(connection: object) -> list[Row]:
            return jobs.claim(connection, [made.id], "cpu_0", self.epoch)  # type: ignore[arg-type]

        self._step(insert, wait=waiting_for_the_disk > 0)
        (row,) = self._step(claim, wait=waiting_for_the_disk > 1)
        return row

    def _step(self, action: Callable, *, wait: bool) -> list[Row]:
        if not wait:
            return self.relaxed.run(action)
        with self.engine.connect() as connection:
            return action(connection)

    def end(self, row: Row) -> list[Row]:
        return self.kept.end([Ending(row["id"], "succeeded", {"y": 1}, device_ms=2.5)], self.epoch, {row["id"]: row})

    def finish(self, row: Row) -> list[Row]:
        """As the completer does."""
        outcomes, claimed = [Outcome(row["id"], State.SUCCEEDED, {"y": 1}, device_ms=2.5)], {row["id"]: row}
        ended = lifecycle.finish(self.engine, outcomes, claimed, self.epoch, self.kept)
        return ended or lifecycle.recover(self.engine, outcomes, claimed, self.epoch)

    def found(self, row: Row) -> Row | None:
        with self.engine.connect() as connection:
            return jobs.get(connection, row["id"])

    def request(self, row: Row) -> dict | None:
        with self.engine.connect() as connection:
            return jobs.request_of(connection, row["id"])

    def look(self) -> None:
        self.kept._looked_at = 0.0  # not a quarter of a second later
        self.kept.look()

    def lost(self, step: Callable[[], Row], state: str | None) -> Row:
        """What `step` gave, of which a crash left the row in `state`: now and then the server wrote its log in time."""

        def lose() -> Row | None:
            row = step()
            self.server.kill()
            now = self.found(row)
            return row if (now and now["state"]) == state else None

        found: Row = eventually(lose, 60)
        return found


@pytest.fixture(scope="module")
def url(crashing: CrashingPostgres, servers: Servers) -> Iterator[str]:
    with Databases(Servers(crashing.url, servers.redis_url)).migrated() as made:
        yield made


@pytest.fixture
def bench(crashing: CrashingPostgres, url: str) -> Iterator[Bench]:
    engine = open_engine(url)
    yield Bench(engine, make_device(engine), Relaxed(engine), Unflushed(engine), crashing, url)
    engine.dispose()


LOST = [("running", 2), ("queued", 1), (None, 0)]


@pytest.mark.parametrize(("left", "waiting"), LOST)
def test_an_announced_end_that_was_lost_is_recorded_again_as_it_was(
    bench: Bench, left: str | None, waiting: int
) -> None:
    told: dict[str, Row] = {}

    def announce() -> Row:
        row = bench.begun(waiting)
        (ended,) = bench.end(row)
        told[row["id"]] = ended
        return row

    row = bench.lost(announce, left)
    assert row["id"] in bench.kept
    bench.look()
    bench.look()
    assert not len(bench.kept)
    now = bench.found(row)
    assert now is not None
    assert jobs.view(now) == jobs.view(told[row["id"]])
    assert now["epoch"] == bench.epoch
    assert bench.request(row) == {"model_id": "model"}
    with bench.engine.connect() as connection:
        (due,) = ends.rows(connection, "SELECT webhook_due_at FROM jobs WHERE id = %(id)s", {"id": row["id"]})
    assert due["webhook_due_at"], "its caller's webhook is delivered, perhaps once more"
    bench.server.kill()
    assert bench.found(row) == now, "on the disk"


@pytest.mark.parametrize(("left", "waiting"), LOST[1:])
def test_a_run_whose_claim_was_lost_ends_all_the_same(bench: Bench, left: str | None, waiting: int) -> None:
    row = bench.lost(lambda: bench.begun(waiting), left)
    (ended,) = bench.finish(row)
    now = bench.found(row)
    assert now is not None
    assert jobs.view(now) == jobs.view(ended)
    assert (now["state"], now["attempt"], now["result"]) == ("succeeded", 1, {"y": 1})


def test_an_end_that_was_recorded_before_its_connection_broke_is_told(bench: Bench) -> None:
    row = bench.begun(2)
    outcomes, claimed = [Outcome(row["id"], State.SUCCEEDED, {"y": 1})], {row["id"]: row}
    (first,) = lifecycle.finish(bench.engine, outcomes, claimed, bench.epoch)
    assert lifecycle.finish(bench.engine, outcomes, claimed, bench.epoch) == []
    (again,) = lifecycle.recover(bench.engine, outcomes, claimed, bench.epoch)
    assert jobs.view(again) == jobs.view(first)


def test_what_a_death_put_back_is_not_ended_by_the_one_who_held_it(bench: Bench) -> None:
    row = bench.begun(2)
    with bench.engine.connect() as connection:
        jobs.requeue(connection, [row["id"]], died=True)
    assert bench.finish(row) == []
    now = bench.found(row)
    assert now is not None
    assert now["state"] == "queued"


def test_a_lost_claim_of_an_epoch_that_is_over_ends_nothing(bench: Bench) -> None:
    row = bench.lost(lambda: bench.begun(1), "queued")
    with transaction(bench.engine) as connection:
        rescues.rescue(connection, "cpu_0", bench.epoch)
    assert bench.finish(row) == []
    assert (bench.found(row) or {})["state"] == "queued"


def test_ends_on_the_disk_are_forgotten(bench: Bench) -> None:
    row = bench.begun(2)
    bench.end(row)
    bench.look()
    assert row["id"] in bench.kept, "the log's writer comes by once in ten seconds"
    with bench.engine.connect() as connection:
        assert ends.on_disk(connection, row["id"]) is not None
    bench.look()
    assert row["id"] not in bench.kept


def test_a_broken_connection_costs_no_end_although_the_server_lives(bench: Bench) -> None:
    row = bench.begun(2)
    (ended,) = bench.end(row)
    killer = psycopg2.connect(bench.url)
    with killer.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                       "WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
    killer.close()
    bench.look()
    bench.look()
    assert not len(bench.kept)
    now = bench.found(row)
    assert now is not None
    assert jobs.view(now) == jobs.view(ended)
    bench.server.kill()
    assert bench.found(row) == now


def test_too_many_kept_ends_wait_for_the_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unflushed, "KEPT_BYTES", 2000)
    rows = [bench.begun(2) for _ in range(8)]
    for row in rows:
        assert len(bench.end(row)) == 1
    assert 2 <= len(bench.kept) < 8
    bench.server.kill()
    states = [(bench.found(row) or {})["state"] for row in rows]
    assert set(states) == {"succeeded"}, "one that waits has those before it on the disk too"


def test_closing_waits_until_nothing_can_be_lost(bench: Bench) -> None:
    row = bench.begun(0)
    bench.end(row)
    bench.kept.close(seconds=5)
    assert not len(bench.kept)
    bench.server.kill()
    assert (bench.found(row) or {})["state"] == "succeeded"


def test_a_server_that_does_not_tell_its_position_is_given_ends_that_wait(bench: Bench) -> None:
    with bench.engine.connect() as connection:
        execute(connection, "DROP ROLE IF EXISTS plain")
        execute(connection, "CREATE ROLE plain")
        execute(connection, "GRANT ALL ON ALL TABLES IN SCHEMA public TO plain")
        execute(connection, "REVOKE EXECUTE ON FUNCTION pg_current_wal_flush_lsn() FROM public")
    row, next_one = bench.begun(2), bench.begun(2)
    bench.end(row)
    bench.kept.relaxed.run(lambda connection: execute(connection, "SET ROLE plain"))
    bench.look()
    assert not len(bench.kept), "recorded again, and so on the disk"
    bench.end(next_one)
    assert not len(bench.kept)
    bench.server.kill()
    assert {(bench.found(one) or {})["state"] for one in (row, next_one)} == {"succeeded"}


def test_a_claim_whose_answer_never_came_is_found_again(bench: Bench) -> None:
    row = bench.begun(2)
    with bench.engine.connect() as connection:
        assert jobs.claim(connection, [row["id"]], "cpu_0", bench.epoch) == []
        (held,) = ends.held_by(connection, [row["id"]], "cpu_0", bench.epoch, ahead=False)
        assert ends.held_by(connection, [row["id"]], "cpu_0", bench.epoch + 1, ahead=False) == []
    assert held == row


def test_a_202_after_a_wait_is_on_the_disk(bench: Bench) -> None:
    row = bench.begun(0)
    with bench.engine.connect() as connection:
        assert (ends.on_disk(connection, row["id"]) or {})["id"] == row["id"]
    bench.server.kill()
    assert bench.found(row) is not None


def test_whether_an_end_may_be_lost_can_be_asked_from_any_thread(bench: Bench) -> None:
    row = bench.begun(2)
    bench.end(row)
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(row["id"] in bench.kept))
    asking.start()
    asking.join()
    assert answers == [True]
