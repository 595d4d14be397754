"""Training over HTTP on a whole stack."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.stack import RunningStack
from tests.training_service.calls import Training


@pytest.fixture(scope="module")
def training(stack: RunningStack) -> Training:
    """The training routes of the module's stack."""
    return Training(stack)


@pytest.fixture
def start_training(start_stack: Callable[..., RunningStack]) -> Callable[..., Training]:
    """Starts a stack of the test's own and gives its training routes."""
    return lambda **settings: Training(start_stack(**settings))
