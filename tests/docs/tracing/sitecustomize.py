"""Python imports this at its start where this folder is on PYTHONPATH: it notes when named functions are called.

`STATIONS` holds `path/file.py::Qualified.name`, comma separated; `STATIONS_NOTED` the file that a line is appended to at each
call: the time in nanoseconds and the name. Only processes of tests are started so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import CodeType, FrameType
from typing import Any

ROOT = os.environ.get("STATIONS_ROOT", "") + os.sep
WANTED = set(os.environ.get("STATIONS", "").split(","))
FILE = os.open(os.environ.get("STATIONS_NOTED", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

known: dict[CodeType, str | None] = {}


def note(frame: FrameType, event: str, argument: Any) -> None:
    """Called by Python at each call and return of the thread."""
    if event != "call":
        return
    code = frame.f_code
    if code not in known:
        name = f"{code.co_filename.removeprefix(ROOT).replace(os.sep, '/')}::{code.co_qualname}"
        known[code] = name if name in WANTED else None
    name = known[code]
    if name is not None:
        os.write(FILE, f"{time.time_ns()} {name}\n".encode())


if "STATIONS" in os.environ:
    sys.setprofile(note)
    threading.setprofile(note)
