"""schemathesis against a whole running stack: no fault inside, and no answer that the API's description does not name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import graphs
from tests.support.repetitions import FACTOR, repetitions
from tests.support.stack import REPOSITORY, RunningStack

#: Examples of each operation, and cases in all at least.
EXAMPLES = repetitions(3)
CASES = 1000

HERE = Path(__file__).parent


@pytest.mark.timeout(700 * FACTOR)
@pytest.mark.slow
def test_every_route_answers_what_the_description_says(
    start_stack: Callable[..., RunningStack], tmp_path: Path
) -> None:
    stack = start_stack(API_KEYS="root:key-of-root-is-long:admin", QUEUE__MAX_LENGTH=100_000)
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    load = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    stack.client.post("/api/inference/load-model", json=load, headers={"Prefer": "wait=30"}).raise_for_status()
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"),
            "run", f"{stack.http_url}/openapi.json", "--max-examples", str(EXAMPLES),
        ],
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzzing.hooks", "PYTHONPATH": str(REPOSITORY), "TEST_API_KEY": "key-of-root-is-long", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600 * FACTOR,
        check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-30_000:] + done.stderr[-3000:]
    found = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert found is not None
    assert int(found[1].replace(",", "")) >= CASES
    assert "Traceback" not in stack.log("gateway")
