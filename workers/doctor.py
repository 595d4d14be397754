"""`device-operations doctor`: tries what a worker needs on this machine: memory, inference and training on each device.

    services    PostgreSQL, Redis, the blob store: as set, with a remedy where they do not answer
    devices     facts, memory, inference, training, checkpoint: run directly on the device layer, no queue between

It prints a table, writes a report that can be attached to an issue, and exits with 1 where something fails. On a
machine with a device that is new to the project, it is the acceptance test.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from device_operations.devices import DeviceSpec, spell_devices
from device_operations.errors import OperationError
from device_operations.settings import Settings, SettingsError, load
from workers.devices import Device, enumerate_devices, open_device
from workers.devices.arrays import Array

#: Bytes that the memory check copies: enough to time, small enough for any device.
MEMORY_BYTES = 64 * 2**20

#: Packages whose versions decide what works.
PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-windowsml", "torch", "torch-directml",
    "numpy", "celery", "kombu", "redis", "sqlalchemy", "psycopg2-binary", "obstore",
)  # fmt: skip

#: What to do about an error, by its code.
REMEDIES = {
    "device_unavailable": "install the extra for this device (cuda, directml, windowsml), or name another in DEVICES",
    "out_of_memory": "close what else uses the device's memory",
    "device_lost": "update the driver, then try again; a device that is lost again and again is faulty",
    "dtype_unsupported": "use another dtype: see the device's capabilities",
    "model_invalid": "the ONNX Runtime here is older than the model; install the version of the lock file",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: whether it went well, what was seen, and what to do where it did not."""

    subject: str
    check: str
    well: bool
    seen: str
    remedy: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Runs every check; exit status 1 where one fails."""
    parser = argparse.ArgumentParser(prog="device-operations doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the report instead of the table")
    parser.add_argument("--report", type=Path, default=None, help="where the report goes (a file in this folder)")
    given = parser.parse_args(arguments)
    findings = [*check_services(), *check_devices(_named_devices())]
    report = {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "findings": [asdict(finding) for finding in findings],
    }
    path = given.report or Path(f"device-operations-doctor-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if given.as_json:
        print(json.dumps(report))
    else:
        _print(findings)
        print(f"\nreport: {path}")
    return 0 if all(finding.well for finding in findings) else 1


def check_services() -> Iterator[Finding]:
    """The settings, and each service that they name."""
    try:
        settings = load()
    except SettingsError as error:
        yield Finding("settings", "read", False, str(error), "correct the setting")
        return
    yield Finding("settings", "read", True, f"data folder {settings.data_dir}")
    yield _tried(
        "blob store", "can be listed", lambda: _blobs(settings), "check BLOBS__URL, its credentials and rights"
    )
    if settings.database_url is None and settings.redis_url is None:
        yield Finding("servers", "set", True, "no URLs are set and no stack runs: `device-operations up` runs its own")
        return
    yield _tried(
        "postgresql", "answers", lambda: _postgresql(settings), "start it, or set DATABASE_URL; `up` runs its own"
    )
    yield _tried("redis", "answers", lambda: _redis(settings), "start it, or set REDIS_URL; `up` runs its own")


def _named_devices() -> tuple[DeviceSpec, ...]:
    """The devices that DEVICES names; none where it is `auto`, or the settings cannot be read, which is reported."""
    try:
        return load().devices
    except SettingsError:
        return ()


def check_devices(named: tuple[DeviceSpec, ...] = ()) -> Iterator[Finding]:
    """The devices that DEVICES names, and no others; where it names none, every device of this machine."""
    if named:
        specs = named
        yield Finding("devices", "named", True, f"DEVICES is {spell_devices(named)}: these are tried, and no others")
    else:
        found = enumerate_devices()
        specs = tuple(DeviceSpec(one.backend, one.ordinal) for one in found)
        if not any(one.backend != "cpu" for one in specs):
            yield Finding("devices", "graphics device", True, "none found: jobs run on the CPU")
    for spec in specs:
        subject = str(spec)
        try:
            device = open_device(spec.backend, spec.ordinal)
        except Exception as error:  # noqa: BLE001 - the report shows any exception of a driver
            yield _failed(subject, "opens", error)
            continue
        for check, attempt in CHECKS.items():
            yield _tried(subject, check, partial(attempt, device))


# ---- what is tried on a device


def _facts(device: Device) -> str:
    about, reading = device.describe(), device.memory()
    free = "unknown" if reading.free_bytes is None else f"{reading.free_bytes / 2**30:.1f} GiB"
    total = "unknown" if about.total_bytes is None else f"{about.total_bytes / 2**30:.1f} GiB"
    return f"{about.name}, driver {about.driver or 'unknown'}, {free} of {total} free, {', '.join(about.providers)}"


def _memory(device: Device) -> str:
    """Allocate, write, copy, fill, read and free, with the contents compared at each step."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, MEMORY_BYTES, np.uint8)
    first, second = device.allocate(MEMORY_BYTES), device.allocate(MEMORY_BYTES)
    try:
        assert not np.frombuffer(device.read(first, 0, 4096), np.uint8).any(), "new memory is not zeroed"
        device.write(first, 0, content.data)
        device.copy(second, 0, first, 0, MEMORY_BYTES)
        device.synchronize()
        began = time.perf_counter()
        device.copy(second, 0, first, 0, MEMORY_BYTES)
        device.synchronize()
        took = time.perf_counter() - began
        device.copy(second, 1, second, 0, 4096)
        expected = content.copy()
        expected[1:4097] = content[:4096]
        device.fill(second, 7, 8192, 4096)
        expected[8192:12288] = 7
        got = np.frombuffer(device.read(second, 0, MEMORY_BYTES), np.uint8)
        assert np.array_equal(got, expected), "what was read is not what was written"
    finally:
        device.release(first)
        device.release(second)
    rate = MEMORY_BYTES / took / 1e9
    return f"{MEMORY_BYTES >> 20} MiB right after write, copy, fill and read; copied at {rate:.1f} GB/s"


def _inference(device: Device) -> str:
    """A small convolution net on the device, its output compared with NumPy's."""
    with tempfile.TemporaryDirectory() as folder:
        path, weight = _write_model(Path(folder))
        model = device.open_model(path)
        x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
        model.run({"x": x})
        began = time.perf_counter()
        got = np.asarray(model.run({"x": x})["y"])
        took_ms = (time.perf_counter() - began) * 1000
        apart = float(np.abs(got - _expected(x, weight)).max())
        fallbacks = "an unknown number of" if model.cpu_fallback_ops is None else model.cpu_fallback_ops
        provider = model.provider
        model.close()
    assert apart < 1e-3, f"the output is {apart} off"
    return f"{provider}: {took_ms:.2f} ms, largest difference {apart:.1e}, {fallbacks} operators on the CPU"


def _training(device: Device) -> str:
    """Ten steps of a linear model, a checkpoint, and its resumption, compared to the bit."""
    from device_operations.requests.training import Initialize
    from workers.training import checkpoints
    from workers.training.model.definition import Sources
    from workers.training.model.ports import Batch
    from workers.training.outcomes import StepOptions
    from workers.training.session import Limits, build_session

    layers = [{"type": "linear", "name": "fc", "in_features": 4, "out_features": 2}]
    spec = Initialize.model_validate(
        {
            "model": {"kind": "layers", "layers": layers},
            "loss": "cross_entropy",
            "optimizer": {"type": "sgd", "learning_rate": 0.1},
        }
    )
    rng = np.random.default_rng(2)
    batch = Batch({"input": rng.standard_normal((8, 4)).astype(np.float32)}, rng.integers(0, 2, 8))
    limits = Limits(memory_bytes=None, max_batch_size=32)
    session = build_session(spec, Sources(), device.torch_device(), limits)
    losses = [session.perform(batch, StepOptions(), number).loss for number in range(1, 6)]
    with tempfile.TemporaryDirectory() as folder:
        written = checkpoints.write(session.snapshot(), Path(folder) / "checkpoint.safetensors")
        again = build_session(spec, Sources(), device.torch_device(), limits)
        again.restore(checkpoints.read(written.path, written.sha256))
    began = time.perf_counter()
    straight = [session.perform(batch, StepOptions(), number).loss for number in range(6, 11)]
    took_ms = (time.perf_counter() - began) * 1000 / 5
    resumed = [again.perform(batch, StepOptions(), number).loss for number in range(6, 11)]
    assert straight == resumed, "the resumed session went another way"
    assert (straight[-1] or 0) < (losses[0] or 0), "the loss did not fall"
    return f"{took_ms:.2f} ms a step, loss {losses[0]:.4f} to {straight[-1]:.4f}, resumed bit for bit"


def _write_model(folder: Path) -> tuple[Path, Array]:
    from onnx import TensorProto, helper, numpy_helper, save

    weight = (np.random.default_rng(3).standard_normal((4, 3, 3, 3)) * 0.3).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    path = folder / "model.onnx"
    save(made, str(path))
    return path, weight


def _expected(x: Array, weight: Array) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = x.shape[2], x.shape[3]
    made: Array = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + rows, j : j + columns], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    return np.maximum(made, 0)


#: What is tried on each device, by the name that the table gives it.
CHECKS: dict[str, Callable[[Device], str]] = {
    "opens": _facts, "memory": _memory, "inference": _inference, "training": _training,
}  # fmt: skip


# ---- what is tried of the services


def _postgresql(settings: Settings) -> str:
    from tasks.database import open_engine
    from tasks.statements import row

    with open_engine(settings.require_database_url()).connect() as connection:
        found = row(connection, "SELECT current_setting('server_version') AS version, to_regclass('jobs') AS jobs")
    assert found is not None
    assert found["jobs"] is not None, "it has no tables yet: run `device-operations migrate`"
    return f"version {found['version']}, migrated"


def _redis(settings: Settings) -> str:
    from tasks.redis.publish import connect

    client = connect(settings.require_redis_url())
    about: dict[str, Any] = client.info()
    policy = about.get("maxmemory_policy")
    assert policy == "noeviction", f"its maxmemory-policy is {policy}, and must be noeviction"
    return f"version {about.get('valkey_version') or about['redis_version']}, noeviction"


def _blobs(settings: Settings) -> str:
    from tasks.blobs.store import BlobStore

    store = BlobStore(str(settings.blobs.url))
    store.check()
    return store.url.partition("?")[0]


# ---- reporting


def _tried(subject: str, check: str, attempt: Callable[[], str], remedy: str = "") -> Finding:
    try:
        return Finding(subject, check, True, attempt())
    except Exception as error:  # noqa: BLE001 - the report shows any exception
        return _failed(subject, check, error, remedy)


def _failed(subject: str, check: str, error: BaseException, remedy: str = "") -> Finding:
    seen = " ".join(
        (error.message if isinstance(error, OperationError) else f"{type(error).__name__}: {error}").split()
    )
    code = error.code if isinstance(error, OperationError) else ""
    return Finding(subject, check, False, seen[:600], REMEDIES.get(code, remedy) or "attach the report to an issue")


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _print(findings: list[Finding]) -> None:
    wide = max(len(finding.subject) for finding in findings)
    long = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.well else "FAIL"
        print(f"{mark}  {finding.subject:<{wide}}  {finding.check:<{long}}  {finding.seen}")
        if finding.remedy and not finding.well:
            print(f"      {'':<{wide}}  {'':<{long}}  → {finding.remedy}")


if __name__ == "__main__":
    sys.exit(main())
