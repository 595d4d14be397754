"""The training demo: what it draws, and the whole of it as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from device_operations.settings import PREFIX
from device_operations.stack.state import free_port
from examples.training import CURVE_COLUMNS, CURVE_ROWS, curve, draw
from tests.support.folders import reachable_folder
from tests.support.stack import REPOSITORY


def test_the_curve_falls_from_its_highest_block_to_its_lowest() -> None:
    lines = curve([4.0, 3.0, 2.0, 1.0])
    assert len(lines) == CURVE_ROWS
    heads, bars = zip(*(line.split("┤") for line in lines), strict=True)
    assert heads[0].split() == ["4.00"]
    filled = [sum(row[column : column + 1] == "█" for row in bars) for column in range(4)]
    assert filled == [6, 4, 3, 1]


def test_a_long_curve_is_as_wide_as_its_columns() -> None:
    assert {len(line.split("┤")[1]) for line in curve([1.0] * 1000)} == {CURVE_COLUMNS}


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    assert draw([2.0, 1.0, 0.5], tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_the_demo_reads_the_digits_and_leaves_nothing_running() -> None:
    with reachable_folder() as folder:
        own = {"DATA_DIR": folder, "DEVICES": "cpu:1", "HTTP__PORT": free_port(), "FLOWER__PORT": free_port()}
        done = subprocess.run(
            [sys.executable, "-m", "examples.training"],
            env=os.environ | {PREFIX + name: str(value) for name, value in own.items()},
            cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        read = re.search(r"accuracy on held-out digits: ([\d.]+)%", done.stdout)
        assert read is not None, done.stdout
        assert float(read[1]) >= 97
        assert (folder / "loss.png").stat().st_size > 1000
        assert "everything that was started has been stopped" in done.stdout
        assert not (folder / "stack.json").exists()
