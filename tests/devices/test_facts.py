"""What a device says of itself, what its errors are called, and what loading the device layer costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from device_operations.errors import OperationError, failure
from tests.devices import graphs
from workers.devices import BACKENDS, Device, Found, enumerate_devices, open_device
from workers.devices.arrays import DTYPES
from workers.devices.cpu import CpuDevice
from workers.devices.onnx.runtime import resolve_provider
from workers.devices.values import Provider

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str) -> str:
    """The output of a fresh interpreter, in which nothing of this test's process is loaded."""
    run = [sys.executable, "-c", code, *arguments]
    return subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout


def test_a_device_describes_itself(device: Device, backend: str) -> None:
    about = device.describe()
    assert (about.backend, about.ordinal) == (backend, 0)
    assert about.name.strip()
    assert "\0" not in about.name, "PostgreSQL refuses a NUL"
    assert about.total_bytes is None or about.total_bytes > 0
    assert set(about.capabilities["dtypes"]) <= set(DTYPES)
    for name in ("zero_copy", "training", "inference", "foreach", "returns_memory"):
        assert isinstance(about.capabilities[name], bool)
    json.dumps(dict(about.capabilities))


def test_a_reading_says_none_and_never_0_for_what_is_unknown(device: Device) -> None:
    reading = device.memory()
    assert reading.total_bytes is None or reading.total_bytes > 0
    assert reading.process_bytes is None or reading.process_bytes >= 0
    if reading.total_bytes is not None and reading.free_bytes is not None:
        assert 0 <= reading.free_bytes <= reading.total_bytes
    assert reading.busy_share is None or 0 <= reading.busy_share <= 1


def test_every_device_found_can_be_opened() -> None:
    found = enumerate_devices()
    assert found[-1].backend == "cpu"
    for device in found:
        assert open_device(device.backend, device.ordinal).describe().name == device.name


def test_an_unknown_backend_is_refused_with_those_that_exist() -> None:
    with pytest.raises(OperationError) as refused:
        open_device("abacus")
    assert refused.value.code == "device_unavailable"
    assert all(name in refused.value.message for name in BACKENDS)


@pytest.mark.parametrize("missing", [name for name in BACKENDS if name not in {f.backend for f in enumerate_devices()}])
def test_a_backend_that_this_machine_lacks_says_what_is_missing(missing: str) -> None:
    with pytest.raises(OperationError) as refused:
        open_device(missing)
    assert refused.value.code == "device_unavailable"
    assert len(refused.value.message) > 40


def test_the_devices_are_listed_on_the_command_line() -> None:
    run = [sys.executable, "-m", "workers.devices", "--json"]
    listed = json.loads(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, timeout=120).stdout)
    assert [Found(**device) for device in listed] == enumerate_devices()


def test_importing_the_device_layer_loads_no_device_library() -> None:
    loaded = python("import sys, workers.devices; print(sorted({m.split('.')[0] for m in sys.modules}))")
    assert "torch" not in loaded
    assert "onnxruntime" not in loaded


def test_the_cpu_device_runs_models_without_torch_and_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graphs.linear())
    told = python(
        "import sys, numpy, psutil, pathlib\n"
        "sys.modules['torch'] = None  # as if it were not installed\n"
        "from workers.devices import open_device\n"
        "device = open_device('cpu')\n"
        "device.describe(), device.memory(), device.fill(device.allocate(100), 3)\n"
        "device.open_model(pathlib.Path(sys.argv[1])).run({'x': numpy.zeros((1, 16), numpy.float32)})\n"
        "print(psutil.Process().memory_info().rss)",
        str(path),
    )
    # ONNX Runtime's DirectML build loads Direct3D with it.
    assert int(told) < (400 if sys.platform == "win32" else 130) << 20


def test_a_provider_that_is_not_there_is_refused_and_never_replaced_by_the_cpu(tmp_path: Path) -> None:
    class Hopeful(CpuDevice):
        def provider(self) -> Provider:
            return Provider("CoreMLExecutionProvider")

    path = tmp_path / "model.onnx"
    path.write_bytes(graphs.linear())
    for ask in (lambda: Hopeful().open_model(path), lambda: resolve_provider("CoreMLExecutionProvider")):
        with pytest.raises(OperationError) as refused:
            ask()
        assert refused.value.code == "device_unavailable"
        assert "CoreMLExecutionProvider was asked" in refused.value.message


# ---- the names of errors


def test_errors_that_have_a_name_keep_it(device: Device) -> None:
    known = failure("input_mismatch", "as it was")
    assert device.classify(known) is known


def test_a_memory_error_is_out_of_memory_and_tells_what_is_held(device: Device) -> None:
    named = device.classify(MemoryError())
    assert named.code == "out_of_memory"
    assert named.retryable
    assert "Allocations hold" in named.message


@pytest.mark.parametrize("error", [RuntimeError("who knows"), KeyboardInterrupt(), SystemExit(3), KeyError("k")])
def test_anything_else_is_internal_and_says_its_type(device: Device, error: BaseException) -> None:
    named = device.classify(error)
    assert named.code == "internal_error"
    assert type(error).__name__ in named.message


def test_no_text_of_a_library_brings_a_nul_into_the_database(device: Device) -> None:
    assert "\0" not in device.classify(RuntimeError("a\0b")).message
