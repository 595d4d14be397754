"""docs/pipelines.md, run as it stands: every block in order, against one stack."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.stack import REPOSITORY, RunningStack

GUIDE = REPOSITORY / "docs" / "pipelines.md"


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_every_block_of_the_guide_runs(start_stack: Callable[..., RunningStack], tmp_path: Path) -> None:
    stack = start_stack(MODEL_CACHE_PATH=tmp_path / "models")
    address = stack.http_url.removeprefix("http://")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**stack.environment, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    environment["DEVICE_OPERATIONS_HTTP__PORT"] = address.rpartition(":")[2]
    ran = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        text = block.replace("localhost:8000", address)
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        for found in re.findall(r'\{"job_id".*?(?=\{"job_id"|\Z)', done.stdout, re.DOTALL):
            assert json.JSONDecoder().raw_decode(found)[0]["state"] == "succeeded", found
        ran.append(done.stdout)
    assert len(ran) == 10
    assert (tmp_path / "lighthouse.png").read_bytes().startswith(b"\x89PNG")
    assert "(64, 64) (64, 64, 3) euler" in ran[4]
    assert "(32, 32, 3) (2, 4, 16, 16)" in ran[6]
    assert "the calm sea" in ran[8]
    assert "(2, 8) [1]" in ran[9]
