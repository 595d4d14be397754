"""The libraries that drive devices: whether one is here, and what its errors say."""

from __future__ import annotations

import importlib.util
import re


def tidy(error: BaseException) -> str:
    """An error's text on one line, without NULs (PostgreSQL refuses them) and paths of its library's build machine."""
    text = " ".join(str(error).replace("\0", "").split())
    text = re.sub(r"[A-Z]:\\_work\\\S+ \(caller: \w+\) Exception\(\d+\) tid\(\w+\) ", "", text)
    return re.sub(r"/onnxruntime_src/\S+:\d+ ", "", text)[:600]


def installed(module: str) -> bool:
    """Whether `module` can be imported here, without importing it."""
    return importlib.util.find_spec(module) is not None
