"""`python -m workers --device gpu_0`: the worker of one device of this machine."""

from __future__ import annotations

import argparse
import sys

import structlog

from device_operations.devices import device
from device_operations.errors import OperationError
from device_operations.folders import keep_private
from device_operations.settings import SettingsError, load
from tasks.logs import configure

#: The exit status when the device cannot be taken: a live worker holds it, or its backend cannot open it.
UNAVAILABLE_STATUS = 69


#: Seconds after which a thread that computes in Python lets another have the interpreter. The device's thread comes out
#: of a run and wants it at once; Python's own 5 ms is half a run of many a model.
SWITCH_SECONDS = 0.0005


def main(arguments: list[str] | None = None) -> int:
    """Runs the worker; every reason not to start is one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--device", required=True, help="the device to own: gpu_0, cpu_0, node-a.gpu_0")
    given = parser.parse_args(arguments)
    try:
        settings = load()
        configure(settings, "worker")
        keep_private()
        named = device(settings, given.device)
        # Loaded here, so that a wrong setting is reported before Celery and ONNX Runtime are.
        from workers.service import Service

        sys.setswitchinterval(SWITCH_SECONDS)
        return Service(settings, named).run()
    except (SettingsError, LookupError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2
    except OperationError as error:
        structlog.get_logger(__name__).error("worker cannot start", code=error.code, error=error.message)
        return UNAVAILABLE_STATUS


if __name__ == "__main__":
    sys.exit(main())
