"""Runs a page's blocks of Python in order, in one process: `python -I guide_runner.py FILE…`.

No block may have imported anything of this project.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OURS = ("device_operations", "tasks", "workers", "api_gateway", "migrations")


def _run(paths: list[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for path in paths:
        exec(compile(Path(path).read_text("utf-8"), path, "exec"), names)
        imported = sorted(set(OURS) & {name.partition(".")[0] for name in sys.modules})
        assert not imported, f"{path} imported {imported}"


if __name__ == "__main__":
    _run(sys.argv[1:])
