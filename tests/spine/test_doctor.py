"""The doctor: what works is said with figures, what does not with a remedy, and both stand in the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers import doctor
from workers.devices import Device, open_device


def run(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, dict]:
    environment = os.environ | {f"DEVICE_OPERATIONS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "device_operations", "doctor", "--report", str(folder / "report.json"), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    report = folder / "report.json"
    return ended.returncode, ended.stdout + ended.stderr, json.loads(report.read_text()) if report.exists() else {}


def test_a_machine_in_order_passes_every_check(tmp_path: Path, database_url: str, redis_url: str) -> None:
    status, said, report = run(
        tmp_path, DATABASE_URL=database_url, REDIS_URL=redis_url, DATA_DIR=str(tmp_path / "data")
    )
    assert status == 0, said
    checks = {(one["subject"], one["check"]) for one in report["findings"] if one["well"]}
    assert {("cpu:0", check) for check in doctor.CHECKS} <= checks
    assert {("postgresql", "answers"), ("redis", "answers"), ("blob store", "can be listed")} <= checks
    assert "resumed bit for bit" in said
    assert report["packages"]["numpy"]


def test_what_does_not_answer_is_said_with_a_remedy_and_fails(tmp_path: Path) -> None:
    status, said, report = run(
        tmp_path, DATABASE_URL="postgresql://a:b@127.0.0.1:9/none", REDIS_URL="redis://127.0.0.1:9/0",
        DATA_DIR=str(tmp_path / "data"),
    )  # fmt: skip
    assert status == 1
    failed = {one["subject"]: one["remedy"] for one in report["findings"] if not one["well"]}
    assert set(failed) == {"postgresql", "redis"}
    assert all(failed.values())
    assert "FAIL  postgresql" in said


def test_the_devices_that_the_setting_names_are_tried_and_no_others(tmp_path: Path) -> None:
    status, said, report = run(tmp_path, DEVICES="cpu:2,directml:7", DATA_DIR=str(tmp_path / "data"))
    assert status == 1, "a device that was named and is not there"
    tried = {one["subject"]: one["well"] for one in report["findings"] if ":" in one["subject"]}
    assert tried == {"cpu:0": True, "cpu:1": True, "directml:7": False}, said
    (missing,) = [one for one in report["findings"] if one["subject"] == "directml:7"]
    assert "DEVICES" in missing["remedy"]
    assert "cpu:2" in said


@pytest.mark.parametrize("wrong", ["fill", "copy"])
def test_a_device_that_changes_bytes_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device: Device = open_device("cpu", 0)
    monkeypatch.setattr(type(device), f"_{wrong}", lambda *_: None)
    assert not doctor._tried("cpu:0", "memory", lambda: doctor.CHECKS["memory"](device)).well
