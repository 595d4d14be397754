"""The fixtures that other tests stand on do what they say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
import redis

from tests.support.databases import Databases
from tests.support.stack import RunningStack, eventually, is_running


def tables(url: str) -> set[str]:
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {row[0] for row in cursor.fetchall()}


def test_a_migrated_database_has_the_tables_and_an_empty_one_none(databases: Databases) -> None:
    with databases.migrated() as migrated, databases.empty() as empty:
        assert {"jobs", "devices", "alembic_version"} <= tables(migrated)
        assert tables(empty) == set()
    with pytest.raises(psycopg2.OperationalError, match="does not exist"):
        tables(migrated)


def test_each_database_is_its_own(databases: Databases) -> None:
    with databases.migrated() as one, databases.migrated() as other:
        with contextlib.closing(psycopg2.connect(one)) as connection, connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE only_here ()")
        assert "only_here" in tables(one)
        assert "only_here" not in tables(other)


def test_each_redis_url_is_empty_and_its_own(databases: Databases) -> None:
    with redis.Redis.from_url(databases.redis_url()) as one, redis.Redis.from_url(databases.redis_url()) as other:
        one.set("only", "here")
        assert other.keys() == []


def test_the_stack_answers(stack: RunningStack) -> None:
    assert stack.device_ids == ["cpu_0"]
    assert stack.client.get("/readyz").status_code == 200


def test_a_killed_worker_that_is_started_again_is_waited_for(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(devices="cpu:2", gateways=2, LEASE_SECONDS=2, API_KEYS="alice:open-sesame:admin")
    assert len(stack.gateway_urls) == 2
    before = stack.process("cpu_1").pid
    stack.kill("cpu_1")
    assert not is_running(before)
    stack.start("cpu_1")
    stack.wait_ready()
    device = stack.client.get("/api/devices/cpu_1").json()
    assert (device["state"], device["epoch"]) == ("online", 2)
    assert "worker starts" in stack.log("cpu_1")
    stack.restart("gateway", "cpu_0")
    stack.wait_ready()
    everything = [stack.process(name).pid for name in ("gateway", "gateway-2", "cpu_0", "cpu_1")]
    stack.close()
    assert not [pid for pid in everything if is_running(pid)]


def test_a_part_that_cannot_start_is_said_with_its_log(start_stack: Callable[..., RunningStack]) -> None:
    with pytest.raises(AssertionError, match=r"(cpu_0|gateway) ended while starting[\s\S]*LEASE_SECONDS is '0'"):
        start_stack(LEASE_SECONDS=0)


def test_eventually_fails_with_the_last_answer() -> None:
    with pytest.raises(AssertionError, match="the last answer was 0"):
        eventually(lambda: 0, seconds=0.1)


def test_the_real_models_are_there(models_dir: Path) -> None:
    assert (models_dir / "minilm" / "model.onnx").stat().st_size == 22_928_619
    assert len(list((models_dir / "rapidocr").glob("*.onnx"))) == 3
