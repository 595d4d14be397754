"""The image demo as a user runs it: from a prompt to a PNG, with words that say what the weights are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from device_operations.settings import PREFIX
from device_operations.stack.state import free_port
from tests.support.folders import reachable_folder
from tests.support.stack import REPOSITORY


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_demo_makes_an_image_and_leaves_nothing_running(tmp_path: Path) -> None:
    with reachable_folder() as folder:
        own = {"DATA_DIR": folder, "DEVICES": "cpu:1", "HTTP__PORT": free_port(), "FLOWER__PORT": free_port()}
        environment = os.environ | {PREFIX + name: str(value) for name, value in own.items()}
        done = subprocess.run(
            [sys.executable, "-m", "examples.image"],
            env=environment | {"PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with Image.open(tmp_path / "demo-image.png") as image:
        assert image.size == (128, 128)
    assert "random" in done.stdout
    assert re.search(r"step \d+ of 20, [\d.]+ s left", done.stdout)
    assert "everything that was started has been stopped" in done.stdout
