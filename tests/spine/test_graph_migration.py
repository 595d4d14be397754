"""Upgrading a database in which a model had several names, and going back."""

from __future__ import annotations

from typing import Any

import pytest
from alembic.command import downgrade, upgrade
from sqlalchemy import Engine

from migrations.__main__ import configuration
from tasks.database import dumps, open_engine
from tasks.devices import store as devices
from tasks.inference import effects, models
from tasks.inference.content import load_key
from tasks.statements import Row, execute, rows, transaction

OPTIONS = {"max_batch_size": 8, "max_delay_ms": 0.0, "warmup": False, "free_dimensions": {"n": 1},
           "graph_optimization": "all", "intra_op_threads": None}  # fmt: skip


def add(engine: Engine, model_id: str, state: str, key: str, aliases: list[list[str]], **more: Any) -> None:
    values = {
        "model_id": model_id, "name": model_id, "state": state, "key": key, "aliases": dumps(aliases),
        "options": dumps(OPTIONS), "reserved": 0 if state == "unloaded" else 1000, **more,
    }  # fmt: skip
    with engine.connect() as connection:
        execute(
            connection,
            """
            INSERT INTO models (model_id, name, version, aliases, model_type, device_id, state, content_key, source,
                options, pinned, owner, load_job_id, reserved_bytes, memory_bytes, run_count)
            VALUES (%(model_id)s, %(name)s, '1', %(aliases)s::jsonb, 'onnx', 'cpu_0', %(state)s, %(key)s,
                '{"path": "a.onnx"}', %(options)s::jsonb, true, 'ada', 'job', %(reserved)s, 1000, 7)
            """,
            values,
        )


def named(engine: Engine) -> list[Row]:
    with engine.connect() as connection:
        return rows(connection, "SELECT * FROM models ORDER BY name, version")


@pytest.fixture
def old(databases: Any) -> Any:
    """A database before the upgrade: the configuration for alembic, and an engine."""
    with databases.empty() as url:
        config = configuration(url)
        upgrade(config, "0004")
        engine = open_engine(url)
        with engine.connect() as connection:
            devices.set_budget(connection, "cpu_0", 10_000)
            devices.adjust_reservation(connection, "cpu_0", 3000)
        add(engine, "first", "lost", "key-1", [["second", "7"], ["third", "1"]])
        add(engine, "under-way", "loading", "key-2", [["fourth", "1"]])
        add(engine, "alone", "loaded", "key-3", [])
        add(engine, "past", "unloaded", "key-1", [["past-too", "1"]])
        yield config, engine
        engine.dispose()


def test_each_name_becomes_a_model_on_the_graph_that_it_had(old: Any) -> None:
    config, engine = old
    upgrade(config, "head")
    found = named(engine)
    assert [(one["name"], one["version"], one["state"], one["content_key"]) for one in found] == [
        ("alone", "1", "loaded", "key-3"),
        ("first", "1", "lost", "key-1"),
        ("fourth", "1", "lost", "key-2"),
        ("past", "1", "unloaded", "key-1"),
        ("second", "7", "lost", "key-1"),
        ("third", "1", "lost", "key-1"),
        ("under-way", "1", "loading", "key-2"),
    ]
    by_name = {one["name"]: one for one in found}
    assert (by_name["first"]["run_count"], by_name["second"]["run_count"]) == (7, 0)
    assert by_name["second"]["pinned"]
    # Who could run it still can; what has left is its owner's alone.
    assert {one["shared"] for one in found if one["state"] != "unloaded"} == {True}
    assert not by_name["past"]["shared"]
    assert all(one["load_key"] == load_key(one["content_key"], one["options"]) for one in found)
    with engine.connect() as connection:
        graphs = rows(connection, "SELECT content_key, reserved_bytes FROM graphs ORDER BY 1")
        assert [tuple(graph.values()) for graph in graphs] == [("key-1", 1000), ("key-2", 1000), ("key-3", 1000)]
        known = models.same_load(connection, "cpu_0", "ada", "second", "7", load_key("key-1", OPTIONS))
    assert known is not None
    # Each leaves by itself, and the memory with the last.
    for names, reserved in ((["first", "second"], 3000), (["third"], 2000), (["alone", "fourth"], 1000)):
        with transaction(engine) as connection:
            effects.let_go(connection, [by_name[name]["model_id"] for name in names], "unloaded")
            assert devices.lock_budget(connection, "cpu_0") == (10_000, reserved)


def test_going_back_makes_the_names_aliases_again(old: Any) -> None:
    config, engine = old
    upgrade(config, "head")
    downgrade(config, "0004")
    found = {one["name"]: one for one in named(engine)}
    live = {name for name, one in found.items() if one["state"] != "unloaded"}
    assert len(live) == 3
    kept = next(found[name] for name in ("first", "second", "third") if name in live)
    names = {(kept["name"], kept["version"]), *((name, version) for name, version in kept["aliases"])}
    assert names == {("first", "1"), ("second", "7"), ("third", "1")}
    assert [found[name]["reserved_bytes"] for name in sorted(live)] == [1000] * 3
    upgrade(config, "head")
    assert {one["name"] for one in named(engine) if one["state"] != "unloaded"} == {
        "first", "second", "third", "under-way", "fourth", "alone",
    }  # fmt: skip
