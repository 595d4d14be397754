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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from device_operations.devices import DeviceSpec, spell_devices
from device_operations.errors import OperationError
from device_operations.settings import Settings, SettingsError, load
from workers.device_checks import CHECKS
from workers.devices import enumerate_devices, open_device

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
