"""Training over HTTP on a whole stack.

training        module    the routes of a stack that the folder's tests share and leave running as it was
mortal          function  the same of another, whose worker may be killed: a lease is 3 s there; it trusts programs
start_training  function  starts a stack of the test's own and gives its routes

Sessions that a test left open are ended after it (`mortal`), or after its module (`training`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.databases import Databases
from tests.support.stack import RunningStack
from tests.training_service.calls import Training


@pytest.fixture(scope="package")
def shared_stack(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running(databases, tmp_path_factory.mktemp("shared")) as stack:
        yield stack


@pytest.fixture(scope="package")
def mortal_stack(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running(databases, tmp_path_factory.mktemp("mortal"), LEASE_SECONDS=3, TRAINING__TRUST_PROGRAMS=True) as stack:
        yield stack


@contextmanager
def running(databases: Databases, folder: Path, **settings: object) -> Iterator[RunningStack]:
    with ExitStack() as stopping:
        url = stopping.enter_context(databases.migrated())
        stack = RunningStack(folder, url, databases.redis_url(), settings=settings)
        stopping.callback(stack.close)
        stack.start()
        stack.wait_ready()
        yield stack


@pytest.fixture(scope="module")
def training(shared_stack: RunningStack) -> Iterator[Training]:
    made = Training(shared_stack)
    yield made
    made.end_all()


@pytest.fixture
def mortal(mortal_stack: RunningStack) -> Iterator[Training]:
    made = Training(mortal_stack)
    yield made
    mortal_stack.wait_ready()
    made.end_all()


@pytest.fixture
def start_training(start_stack: Callable[..., RunningStack]) -> Callable[..., Training]:
    return lambda **settings: Training(start_stack(**settings))
