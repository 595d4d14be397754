"""docs/training.md, run as it stands: every block in order, against one stack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.stack import REPOSITORY, RunningStack

GUIDE = REPOSITORY / "docs" / "training.md"


@pytest.mark.slow
def test_every_block_of_the_guide_runs(start_stack: Callable[..., RunningStack], tmp_path: Path) -> None:
    stack = start_stack()
    address = stack.http_url.removeprefix("http://")
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran, printed = 0, ""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        text = block.replace("localhost:8000", address)
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        assert '"failed"' not in done.stdout, done.stdout
        printed += done.stdout
        ran += 1
    assert ran == 6
    assert '["succeeded",180,' in printed and '["ready",180,' in printed, printed
