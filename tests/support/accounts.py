"""Running as somebody else, for tests that are root: the account `nobody`, with a Python that it can run."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.stack import REPOSITORY


def as_nobody() -> dict[str, Any]:
    """Options of `subprocess.run`, and `python`: the start of a command. Skips the test where nobody has no Python.

    This Python may lie below /root: then the system's, if it is the same version, with our packages.
    """
    import pwd

    account = pwd.getpwnam("nobody")
    options: dict[str, Any] = {
        "user": account.pw_uid,
        "group": account.pw_gid,
        "extra_groups": [],
        "env": {
            **os.environ,
            "HOME": "/nonexistent",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *(path for path in sys.path if "site-packages" in path)]),
        },
    }
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            check = [python, "-c", "import psutil, psycopg2, redis, device_operations"]
            done = subprocess.run(check, capture_output=True, check=False, cwd="/", **options)
        except OSError:
            continue
        if done.returncode == 0:
            return options | {"python": [python]}
    pytest.skip("the account nobody reaches no Python of this version, or not this checkout")
