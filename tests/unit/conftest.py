"""Unit tests need no server: a test here that asks for one fails, and belongs elsewhere."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def servers() -> None:
    """In place of the servers of all other tests."""
    pytest.fail("a unit test asks for PostgreSQL and Redis: move it to a folder whose tests need them")
