"""docs/inference.md, run as it stands: every block in order, against one stack."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.stack import REPOSITORY, RunningStack

GUIDE = REPOSITORY / "docs" / "inference.md"


def test_every_block_of_the_guide_runs(start_stack: Callable[..., RunningStack], tmp_path: Path) -> None:
    stack = start_stack(MODEL_CACHE_PATH=tmp_path / "models")
    address = stack.http_url.removeprefix("http://")
    ran = 0
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        text = block.replace("localhost:8000", address)
        if language == "python":
            command = [sys.executable, "-c", f"REDIS_URL = {stack.redis_url!r}\n{text}"]
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        for line in done.stdout.splitlines():
            if line.startswith('{"job_id"'):
                assert json.loads(line)["state"] == "succeeded", line
        ran += 1
    assert ran == 11
