"""A whole stack for the length of an example: started with `device-operations up`, stopped whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from device_operations.settings import load, read_stack


@contextmanager
def stack(**settings: object) -> Iterator[dict[str, Any]]:
    """Runs the stack, passes on what it says, and gives the addresses that it noted."""
    # Stopped by its service manager or by hand, the example still stops what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = os.environ | {f"DEVICE_OPERATIONS_{name}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "device_operations", "up"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    ready = threading.Event()
    said: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready "):
                ready.set()
            elif not ready.is_set():
                print("  " + line.rstrip(), flush=True)
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        ready.wait()
        if process.poll() is not None:
            raise SystemExit(f"the stack did not start:\n{''.join(said[-20:])}")
        yield read_stack(load().data_dir)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        print("everything that was started has been stopped", flush=True)
