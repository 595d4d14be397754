"""A running stack with two small models loaded, and the client on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device_operations import Client
from tests.support import graphs
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def loaded(stack: RunningStack) -> RunningStack:
    """The module's stack with the models `tiny` (y = 2x + 1) and `slow` (as long as its input `rounds` says)."""
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    graphs.slow(stack.folder / "models" / "slow.onnx")
    with Client(stack.http_url) as client:
        for name in ("tiny", "slow"):
            client.result(client.inference.load_model(name, f"{name}.onnx", wait=30))
    return stack


@pytest.fixture
def client(loaded: RunningStack) -> Iterator[Client]:
    """A client that was told where the gateway is."""
    with Client(loaded.http_url) as made:
        yield made
