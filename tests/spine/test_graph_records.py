"""The records of models and graphs under several transactions at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.jobs import new_id
from tasks.database import open_engine
from tasks.devices import store as devices
from tasks.inference import effects, graphs, idle, models
from tasks.inference.plan import record_loads
from tasks.jobs.store import NewJob
from tasks.jobs.submit import Plan
from tasks.statements import transaction
from tests.support.records import make_device

BYTES = 1000

FACTS = {
    "inputs": [], "outputs": [], "memory_bytes": 700, "load_ms": 1.0, "provider": "p", "cpu_fallback_ops": 0,
    "batching": {},
    "not_offered": [],
}  # fmt: skip


@pytest.fixture
def engine(databases: Any) -> Iterator[Engine]:
    with databases.migrated() as url:
        made = open_engine(url)
        make_device(made)
        with made.connect() as connection:
            for device_id in ("cpu_0", "cpu_1"):
                devices.set_budget(connection, device_id, 10 * BYTES)
        yield made
        made.dispose()


def load(name: str, key: str, device_id: str = "cpu_0", owner: str = "ada") -> Plan:
    """The plan of a load whose content and options are `key`."""
    model_id = new_id()
    job = NewJob(new_id(), "inference.load_model", device_id, f"device.{device_id}", {}, owner)
    makes = {
        "model_id": model_id, "owner": owner, "name": name, "version": "1", "load_key": key, "content_key": key,
        "model_type": "onnx", "device_id": device_id, "sha256": None, "source": {"path": "a"}, "options": {},
        "pinned": False, "shared": False, "load_job_id": job.id, "blob_ids": [], "estimate_bytes": BYTES,
        "is_there": False, "given": set(),
    }  # fmt: skip
    return Plan(job, together=record_loads, makes=makes)


def recorded(engine: Engine, *plans: Plan) -> list[str]:
    with transaction(engine) as connection:
        record_loads(connection, plans)
    return [plan.makes["model_id"] for plan in plans]


def reserved(engine: Engine, device_id: str = "cpu_0") -> int:
    with engine.connect() as connection:
        return devices.lock_budget(connection, device_id)[1]


def test_a_model_that_joins_a_graph_while_its_last_one_leaves_keeps_its_memory(engine: Engine) -> None:
    (first,) = recorded(engine, load("first", "key"))
    with transaction(engine) as connection:
        effects.settled(connection, first, 1, FACTS)
    assert reserved(engine) == 700
    left = threading.Event()

    def leave() -> None:
        with transaction(engine) as connection:
            effects.let_go(connection, [first], "unloaded")
        left.set()

    leaving = threading.Thread(target=leave)
    with transaction(engine) as connection:
        record_loads(connection, [load("second", "key")])
        leaving.start()
        assert not left.wait(0.5), "it left while another was joining"
    leaving.join()
    with engine.connect() as connection:
        assert graphs.reserved(connection, "cpu_0", "key") == 700
    assert reserved(engine) == 700


@pytest.mark.parametrize("first", ["older", "newer"])
def test_loads_that_end_at_once_on_two_devices_leave_one_meaning(engine: Engine, first: str) -> None:
    older, newer = recorded(engine, load("name", "old", "cpu_0"), load("name", "new", "cpu_1"))
    one, other = (older, newer) if first == "older" else (newer, older)
    done = threading.Event()

    def settle() -> None:
        with transaction(engine) as connection:
            effects.settled(connection, other, 1, FACTS)
        done.set()

    settling = threading.Thread(target=settle)
    with transaction(engine) as connection:
        effects.settled(connection, one, 1, FACTS)
        settling.start()
        assert not done.wait(0.5), "it ended without knowing of the one that ends at the same moment"
    settling.join()
    with engine.connect() as connection:
        known = models.get_many(connection, [older, newer])
    assert (known[older]["replaced_by"], known[newer]["replaced_by"]) == (newer, None)


def test_the_load_that_was_submitted_last_is_meant_whichever_ends_first(engine: Engine) -> None:
    older, newer = recorded(engine, load("name", "old"), load("name", "new"))
    for model_id in (newer, older):
        with transaction(engine) as connection:
            effects.settled(connection, model_id, 1, FACTS)
    with engine.connect() as connection:
        known = models.get_many(connection, [older, newer])
        assert idle.replaced(connection, "cpu_0", -1) == [older]
        assert idle.replaced(connection, "cpu_0", 60) == []
    assert (known[older]["replaced_by"], known[newer]["replaced_by"]) == (newer, None)


def test_what_fails_gives_back_what_was_estimated_unless_another_counts_on_it(engine: Engine) -> None:
    first, second = recorded(engine, load("first", "key"), load("second", "key"))
    assert reserved(engine) == BYTES
    error = failure("model_invalid", "no model").as_job_error()
    for model_id, left in ((first, BYTES), (second, 0)):
        with transaction(engine) as connection:
            model = models.get(connection, model_id)
            assert model is not None
            job = {"id": model["load_job_id"], "resource_id": model_id, "state": "failed", "error": error}
            effects.loaded(connection, job, {}, 1)
        assert reserved(engine) == left
