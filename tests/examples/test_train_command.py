"""`device-operations train` against a running stack, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from examples import digits
from tests.support.stack import REPOSITORY, RunningStack

SPEC = {
    "model": {"kind": "layers", "layers": [{"type": "flatten"}, {"type": "linear", "in_features": 64, "out_features": 10}]},
    "loss": "cross_entropy",
    "optimizer": {"type": "adam", "learning_rate": 0.01},
}  # fmt: skip


class Files:
    """A description and two datasets in a folder."""

    def __init__(self, folder: Path) -> None:
        learned, held_out = digits.load()
        self.spec, self.learned, self.held_out = (
            folder / "spec.json",
            folder / "a.safetensors",
            folder / "b.safetensors",
        )
        self.spec.write_text(json.dumps(SPEC))
        save_file(learned.as_tensors(), self.learned)
        save_file(held_out.as_tensors(), self.held_out)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("digits"))


def train(stack: RunningStack, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "device_operations", "train", *map(str, arguments), "--url", stack.http_url],
        env=stack.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_a_session_is_trained_measured_kept_and_trained_further(stack: RunningStack, files: Files) -> None:
    first: dict[str, Any] = json.loads(
        train(stack, files.spec, "--dataset", files.learned, "--epochs", 4, "--evaluate", files.held_out,
              "--checkpoint", "four", "--json").stdout
    )  # fmt: skip
    assert first["trained"]["steps"] == 4 * 45
    assert first["evaluated"]["accuracy"] > 0.9
    assert (
        stack.client.get(f"/api/training/checkpoints/{first['checkpoint']['checkpoint_id']}").json()["name"] == "four"
    )
    shown = train(stack, "--session", first["session_id"], "--dataset", files.learned, "--steps", 5, "--end").stdout
    assert dict(line.rsplit(None, 1) for line in shown.splitlines())["trained step"] == "185"
    assert stack.client.get(f"/api/training/status/{first['session_id']}").json()["state"] == "ended"


def test_a_failed_job_fails_the_command_with_its_code(stack: RunningStack, files: Files) -> None:
    done = train(stack, files.spec, "--dataset", files.spec, "--json", status=1)
    assert json.loads(done.stderr)["error"]["code"] == "input_mismatch"
    assert stack.client.get("/api/memory/device/cpu_0").json()["training_bytes"] == 0, "its session was left behind"


def test_a_session_that_has_learned_something_stays_when_what_follows_fails(stack: RunningStack, files: Files) -> None:
    done = train(stack, files.spec, "--dataset", files.learned, "--evaluate", files.spec, "--end", status=1)
    assert "no safetensors file" in done.stderr
    session_id = done.stderr.partition("go on with --session ")[2].split()[0]
    assert stack.client.get(f"/api/training/status/{session_id}").json()["step"] == 45
    ended = stack.client.delete(f"/api/training/session/{session_id}", headers={"Prefer": "wait=30"}).json()
    assert ended["state"] == "succeeded"


def test_what_cannot_be_meant_is_refused(stack: RunningStack, files: Files) -> None:
    assert "either SPEC" in train(stack, status=2).stderr
    assert "either --epochs" in train(stack, files.spec, "--epochs", 1, "--steps", 1, status=2).stderr
    assert "is not JSON" in train(stack, files.learned, status=2).stderr
