"""One conformance suite for every backend: the tests here run once for each backend that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.devices import graphs
from tests.devices.torch_on_cpu import TorchOnCpu
from workers.devices import Device, enumerate_devices, open_device, torch_memory
from workers.devices.libraries import installed
from workers.devices.onnx.runtime import LoadedGraph

#: Where there is torch and no GPU, what the torch backends share is run on the CPU (see torch_on_cpu).
HERE = sorted({found.backend for found in enumerate_devices()} | ({"torch"} if installed("torch") else set()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.cuda], "directml": [pytest.mark.directml]}
        params = [pytest.param(name, marks=marks.get(name, ())) for name in HERE]
        metafunc.parametrize("backend", params, scope="session")


@pytest.fixture(scope="session")
def device(backend: str) -> Device:
    return TorchOnCpu(0) if backend == "torch" else open_device(backend, 0)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves within a buffer go through many blocks, so that a few thousand bytes show what gigabytes do."""
    monkeypatch.setattr(torch_memory, "_MOVE_BYTES", 1000)


@pytest.fixture(scope="session")
def cpu() -> Device:
    return open_device("cpu", 0)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a graph of `graphs` to a file of its own."""

    def write(content: bytes, name: str = "model.onnx") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="session")
def opened(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], LoadedGraph]]:
    """A model of `graphs` by its function's name, loaded once for all tests: some backends give no session back."""
    models: dict[str, LoadedGraph] = {}
    folder = tmp_path_factory.mktemp("models")

    def once(name: str) -> LoadedGraph:
        if name not in models:
            path = folder / f"{name}.onnx"
            path.write_bytes(getattr(graphs, name)())
            models[name] = device.open_model(path)
        return models[name]

    yield once
    for model in models.values():
        model.close()
