"""`python -m benchmarks [NAME …] [--json FILE]`: runs benchmarks and prints their table; exit status 1 if one falls short."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.measure import Figure, machine, report, table

#: What a plain `make bench` runs, in this order. Each module has `run() -> list[Figure]`.
NAMES = ["spine", "memory", "inference", "training"]


def main() -> int:
    """Runs the benchmarks named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, help="write the report to this file")
    given = parser.parse_args()
    figures: list[Figure] = []
    print(f"machine: {machine()}")
    for name in given.names or NAMES:
        print(f"\n## {name}\n", flush=True)
        taken: list[Figure] = importlib.import_module(f"benchmarks.{name}").run()
        print(table(taken), flush=True)
        figures += taken
    if given.json is not None:
        given.json.write_text(json.dumps(report(figures), indent=1) + "\n", encoding="utf-8")
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
