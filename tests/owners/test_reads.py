"""Whose a thing is costs no read: what a request names is looked up as often as before, found or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from device_operations.errors import OperationError
from device_operations.jobs import Kind, new_id
from device_operations.requests.kinds import parse
from device_operations.settings import Settings
from tasks.blobs.store import BlobStore
from tasks.database import open_engine
from tasks.devices.directory import Directory
from tasks.planning.context import Context
from tasks.planning.planner import plan
from tests.owners.things import BATCH, FLOATS, Things
from tests.support.stack import RunningStack

Reads = Callable[[], int]


@pytest.fixture
def context(owned: RunningStack, tmp_path: Path) -> Iterator[Context]:
    """Bob's context of planning in this process, whose directory is fresh."""
    engine = open_engine(owned.database_url)
    directory = Directory(engine, Settings())
    directory.refresh()
    yield Context(engine, Settings(), directory, BlobStore(f"file://{tmp_path}"), "bob")
    engine.dispose()


def test_a_run_and_a_step_on_ones_own_read_nothing(context: Context, bob: Things) -> None:
    running = {"model_id": bob.ids["model"], "inputs": {"x": FLOATS, "before": FLOATS}}
    stepping = {"session_id": bob.ids["training session"], **BATCH}
    context.directory.refresh()
    plan(context, Kind.TRAINING_STEP, parse(Kind.TRAINING_STEP, stepping))
    with _counting(context.engine) as reads:
        plan(context, Kind.INFERENCE_RUN, parse(Kind.INFERENCE_RUN, running))
        plan(context, Kind.TRAINING_STEP, parse(Kind.TRAINING_STEP, stepping))
    assert reads() == 0


@pytest.mark.parametrize(
    ("kind", "request_of"),
    [
        (Kind.TRAINING_STEP, lambda thing_id: {"session_id": thing_id, **BATCH}),
        (Kind.TRAINING_CHECKPOINT, lambda thing_id: {"session_id": thing_id}),
        (Kind.INFERENCE_CLOSE_SESSION, lambda thing_id: {"session_id": thing_id}),
        (Kind.MEMORY_READ, lambda thing_id: {"allocation_id": thing_id}),
    ],
)
def test_anothers_takes_the_same_one_read_as_what_is_not_there(
    kind: Kind, request_of: Callable[[str], dict[str, object]], context: Context, zelda: Things
) -> None:
    noun = {"training": "training session", "inference": "inference session", "memory": "allocation"}
    theirs = zelda.ids[noun[kind.value.partition(".")[0]]]
    # Its owner used it before in this process: what is remembered of it must not show.
    context.directory.training_session(zelda.ids["training session"], zelda_asks(context))
    for thing_id in (theirs, new_id()):
        for _ in range(2):
            with _counting(context.engine) as reads, pytest.raises(OperationError):
                plan(context, kind, parse(kind, request_of(thing_id)))
            assert reads() == 1, thing_id


def zelda_asks(context: Context) -> Context:
    """The same planning for the other owner."""
    return Context(context.engine, context.settings, context.directory, context.blobs, "zelda")


@contextmanager
def _counting(engine: Engine) -> Iterator[Reads]:
    """How often a connection was taken: every look-up takes one."""
    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1

    event.listen(engine, "checkout", count)
    try:
        yield lambda: taken
    finally:
        event.remove(engine, "checkout", count)
