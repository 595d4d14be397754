"""Which devices this machine offers, by name: reads the `DEVICES` setting and asks the device layer about `auto`.

It never loads a device library: `python -m workers.devices --json` looks, in a process of its own.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_operations.wire.json_types import FreeJson

if TYPE_CHECKING:
    from device_operations.settings import Settings

BACKENDS = ("cuda", "directml", "cpu")

#: How long the look for devices may take: loading a GPU library for the first time takes seconds.
PROBE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One entry of the `DEVICES` setting: a backend and its own number for the adapter."""

    backend: str
    ordinal: int

    def __str__(self) -> str:
        return f"{self.backend}:{self.ordinal}"


@dataclass(frozen=True, slots=True)
class NamedDevice:
    """One device as callers name it, and how to reach it: `gpu_0`, or `node-a.gpu_0` where a node is set."""

    device_id: str
    backend: str
    ordinal: int


def device_ids(settings: Settings) -> list[NamedDevice]:
    """This machine's devices under the names that callers use, in order; `auto` looks for them (seconds, once)."""
    return name_devices(settings.devices or found_devices(), settings.node)


def device(settings: Settings, device_id: str) -> NamedDevice:
    """The device of that name on this machine. Raises `LookupError` naming those that are there."""
    devices = device_ids(settings)
    for known in devices:
        if known.device_id == device_id:
            return known
    names = ", ".join(known.device_id for known in devices) or "none"
    raise LookupError(f"no device {device_id!r} on this machine; there is {names} (see DEVICE_OPERATIONS_DEVICES)")


def parse_devices(value: object) -> tuple[DeviceSpec, ...]:
    """Reads `auto` (an empty tuple), or a list such as `cuda:0,cuda:1`, `directml:0`, `cpu:2` (two CPU devices)."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, Iterable):
        raise ValueError("not a list of devices")
    entries = list(value)
    if entries == ["auto"] or not entries:
        return ()
    specs = [spec for entry in entries for spec in _parse_entry(entry)]
    repeated = {str(spec) for spec in specs if specs.count(spec) > 1}
    if repeated:
        raise ValueError(f"{', '.join(sorted(repeated))} is given twice")
    return tuple(specs)


def _parse_entry(entry: object) -> list[DeviceSpec]:
    if isinstance(entry, DeviceSpec):
        return [entry]
    match = re.fullmatch(r"(cuda|directml|cpu)(?::(\d{1,3}))?", str(entry))
    if match is None:
        raise ValueError(f"{entry!r} is no device")
    backend, number = match[1], match[2]
    if backend != "cpu":
        return [DeviceSpec(backend, int(number or 0))]
    count = int(number or 1)
    if not 1 <= count <= 64:
        raise ValueError(f"{entry!r} asks for {count} devices on the CPU, not 1 to 64")
    return [DeviceSpec("cpu", ordinal) for ordinal in range(count)]


def spell_devices(specs: Iterable[DeviceSpec]) -> str:
    """The setting's text for these devices; reading it back gives the same devices."""
    listed = list(specs)
    on_cpu = sum(spec.backend == "cpu" for spec in listed)
    texts = [str(spec) for spec in listed if spec.backend != "cpu"] + ([f"cpu:{on_cpu}"] if on_cpu else [])
    return ",".join(texts) or "auto"


def name_devices(specs: Iterable[DeviceSpec], node: str | None = None) -> list[NamedDevice]:
    """Gives each adapter its name: `gpu_N` after its own number, the next free one where two backends share it."""
    taken: set[str] = set()
    named = []
    for spec in specs:
        kind, number = ("cpu" if spec.backend == "cpu" else "gpu"), spec.ordinal
        while f"{kind}_{number}" in taken:
            number += 1
        taken.add(f"{kind}_{number}")
        device_id = f"{kind}_{number}" if node is None else f"{node}.{kind}_{number}"
        named.append(NamedDevice(device_id, spec.backend, spec.ordinal))
    return named


def found_devices() -> tuple[DeviceSpec, ...]:
    """Every GPU that a provider sees, or one CPU without a GPU."""
    gpus = [
        DeviceSpec(str(entry["backend"]), int(entry.get("ordinal", 0)))
        for entry in probe()
        if entry.get("backend") in ("cuda", "directml")
    ]
    return tuple(gpus) or (DeviceSpec("cpu", 0),)


@functools.cache
def probe() -> tuple[FreeJson, ...]:
    """What the device layer sees, one object a device, as `python -m workers.devices --json` prints it.

    A look that fails is an error, not "no GPU": falling back to the CPU must be said by a person (`DEVICES=cpu`).
    """
    command = [sys.executable, "-m", "workers.devices", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"the look for devices failed (exit status {done.returncode}): {done.stderr.strip()[-500:]}; "
            "name them in DEVICE_OPERATIONS_DEVICES, for example cpu, to do without"
        )
    answer = json.loads(done.stdout)
    return tuple(answer["devices"] if isinstance(answer, dict) else answer)
