"""`python -m workers.devices [--json]`: lists the devices that a worker could be started for on this machine."""

from __future__ import annotations

import argparse
import json

from workers.devices import enumerate_devices


def main() -> None:
    """Prints one line a device, or one JSON array."""
    parser = argparse.ArgumentParser(prog="python -m workers.devices", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    found = enumerate_devices()
    if parser.parse_args().json:
        print(json.dumps([device.as_json() for device in found]))
        return
    for device in found:
        size = "size unknown" if device.total_bytes is None else f"{device.total_bytes / 2**30:.1f} GiB"
        print(f"{device.backend}:{device.ordinal}  {device.name}  {size}")


if __name__ == "__main__":
    main()
