"""The device layer alone on a GPU: its conformance suite, and its memory beside plain torch, timed on the device."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.measure import Figure, absolute, compare

GIB = 2**30


def conformance() -> list[Figure]:
    """The device layer's own suite on this GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/devices", "-m", "cuda", "-rs"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    print(ran.stdout[-3000:])
    last = ran.stdout.strip().splitlines()[-1]
    counts = {
        word.rstrip(","): int(number)
        for number, word in zip(last.split(), last.split()[1:], strict=False)
        if number.isdigit()
    }
    return [
        absolute("conformance tests passed on cuda", "tests", counts.get("passed", 0), at_least=100),
        absolute("conformance tests failed on cuda", "tests", counts.get("failed", 0), at_most=0),
        absolute("conformance tests skipped on cuda", "tests", counts.get("skipped", 0), at_most=0),
    ]


def device_figures() -> list[Figure]:
    """Memory on the device, timed by CUDA's own events."""
    import torch

    from workers.devices import open_device

    device = open_device("cuda", 0)
    size = 8 * GIB
    first, second = device.allocate(size), device.allocate(size)
    own, other = (torch.empty(size, dtype=torch.uint8, device="cuda:0") for _ in range(2))

    def timed(step: Callable[[], object], moved: int) -> Callable[[], float]:
        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step()
            torch.cuda.synchronize()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            return moved / (start.elapsed_time(end) / 1000) / 1e9

        return measure

    figures = [
        compare("copy of 8 GiB on the device", "GB/s", timed(lambda: device.copy(second, 0, first, 0, size), 2 * size),
                timed(lambda: own.copy_(other), 2 * size), "torch copy_", at_least=0.95),
        compare("clear of 8 GiB on the device", "GB/s", timed(lambda: device.fill(first, 0), size),
                timed(own.zero_, size), "torch zero_", at_least=0.95),
    ]  # fmt: skip
    moved = GIB
    pinned = device.host_buffer(moved)
    host = torch.empty(moved, dtype=torch.uint8, pin_memory=True)

    def wall(step: Callable[[], object]) -> Callable[[], float]:
        def measure() -> float:
            step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            return moved / (time.perf_counter() - began) / 1e9

        return measure

    up = wall(lambda: device.write(first, 0, pinned))
    down = wall(lambda: device.read(first, 0, moved, pinned))
    figures += [
        compare("host to device, 1 GiB pinned", "GB/s", up, wall(lambda: own[:moved].copy_(host)), "torch, pinned", at_least=0.8),
        compare("device to host, 1 GiB pinned", "GB/s", down, wall(lambda: host.copy_(own[:moved])), "torch, pinned", at_least=0.8),
        absolute("host to device, 1 GiB pinned", "GB/s", statistics.median(up() for _ in range(5)), at_least=44),
        absolute("device to host, 1 GiB pinned", "GB/s", statistics.median(down() for _ in range(5)), at_least=44),
    ]  # fmt: skip
    for buffer in (first, second):
        device.release(buffer)
    return figures
