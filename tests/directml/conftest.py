"""Tests of the DirectML backend on the genuine Windows libraries: on Windows, or in the rig by `make test-directml`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.devices import graphs
from workers.devices import Device, open_device
from workers.devices.onnx.runtime import LoadedGraph

WINDOWS = sys.platform == "win32"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.directml)
            if not WINDOWS and item.path.name != "test_worker.py":
                item.add_marker(
                    pytest.mark.skip(reason="needs Windows' libraries: make test-directml runs it in the rig")
                )


@pytest.fixture(scope="session")
def device() -> Device:
    return open_device("directml", 0)


@pytest.fixture
def load(device: Device, tmp_path: Path) -> Callable[..., LoadedGraph]:
    """Loads a graph: by the name of a function of `graphs`, or as bytes. A session's memory is gone until the end."""

    def loaded(graph: str | bytes, on: Device = device) -> LoadedGraph:
        path = tmp_path / "model.onnx"
        path.write_bytes(getattr(graphs, graph)() if isinstance(graph, str) else graph)
        return on.open_model(path)

    return loaded
