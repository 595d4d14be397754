"""Stable Diffusion XL in its full size: the pipeline beside a bare loop over its own sessions, torch, and over HTTP.

    python -m benchmarks.gpu.sdxl REPORT.json                 everything, about eight minutes on an H100
    python -m benchmarks.gpu.sdxl REPORT.json --tiny          a tiny model on the CPU: that it runs at all
    python -m benchmarks.gpu.sdxl REPORT.json --only loop http --folder FOLDER

    make    weights drawn at random, exported; torch compiles meanwhile
    loop    the pipeline in this process beside the bare loop, and the UNet's graph alone, joined and as exported
    torch   diffusers in torch, eager and compiled
    http    gateway, PostgreSQL, Valkey and a worker: images, cancelling, an urgent run, memory
    scale   two and four workers on as many GPUs, where the machine has them

The report is written after each stage: a machine that is taken back leaves what was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import sdxl_http, sdxl_loop
from benchmarks.gpu.two import NotHere
from benchmarks.measure import Figure, report, table


class Stages:
    """The stages of one run over one folder, with what they found."""

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        self.folder = folder
        self.tiny = tiny
        self.figures: list[Figure] = []
        self.facts: dict[str, Any] = {}

    def make(self) -> None:
        """Exports in two processes, with torch compiling in a third."""
        self.folder.mkdir(parents=True, exist_ok=True)
        more = ["--tiny"] if self.tiny else []
        module = [sys.executable, "-m", "benchmarks.gpu.sdxl_models", str(self.folder)]
        began = time.perf_counter()
        self._start_torch(more)
        exports = [subprocess.Popen([*module, part, *more]) for part in ("unet", "rest")]
        failed = [process.args for process in exports if process.wait()]
        if failed:
            raise RuntimeError(f"failed: {failed}")
        self.facts["export_seconds"] = time.perf_counter() - began

    def _start_torch(self, more: list[str]) -> None:
        with (self.folder / "torch.log").open("w") as log:
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.sdxl_torch", str(self.folder), *more],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def loop(self) -> None:
        """See `sdxl_loop`."""
        if (self.folder / "torch.log").exists() and not self._awaited("torch.ready", 240):
            print("torch is not ready; it may disturb what is measured", flush=True)
        self.figures += sdxl_loop.figures(self.folder, self.facts, tiny=self.tiny)

    def torch(self) -> None:
        """diffusers in torch, in the process that compiled it."""
        (self.folder / "go").touch()
        file = self.folder / "torch.json"
        if not self._awaited("torch.json", 200, lambda: "done" in json.loads(file.read_text())):
            print((self.folder / "torch.log").read_text()[-2000:], flush=True)
        known = self.facts["torch"] = json.loads(file.read_text())
        ours = self.facts.get("ours_seconds")
        for what, wanted in (("eager", 1.0), ("compiled", None)):
            if ours is None or f"{what}_image" not in known:
                continue
            base = known[f"{what}_image"]
            holds = wanted is None or ours / base <= wanted
            said = f"at most {wanted:g}x" if wanted else ""
            self.figures.append(
                Figure("an image of 1024x1024 in 30 steps", "s", ours, base, f"diffusers, torch {what}", ours / base,
                       said, holds)
            )  # fmt: skip

    def http(self) -> None:
        """See `sdxl_http`."""
        self.figures += sdxl_http.figures(self.folder, self.facts, tiny=self.tiny)

    def scale(self) -> None:
        """See `sdxl_http.scaling`."""
        self.figures += sdxl_http.scaling(self.folder, self.facts, tiny=self.tiny)

    def _awaited(self, name: str, seconds: float, also: Callable[[], bool] = lambda: True) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (self.folder / name).exists() and also():
                return True
            time.sleep(0.3)
        return False


STAGES = ("make", "loop", "torch", "http", "scale")


def main() -> int:
    """Runs the stages; exit status 1 where one fails or a figure falls short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sdxl", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="*", default=STAGES, choices=STAGES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stages = Stages(given.folder or Path(scratch), tiny=given.tiny)
        said = run(stages, given.only, given.report)
    return 0 if not said["failed"] and all(figure.holds for figure in stages.figures) else 1


def run(stages: Stages, names: tuple[str, ...] | list[str] = STAGES, file: Path | None = None) -> dict[str, Any]:
    """What the stages found, written to `file` after each of them."""
    failed: dict[str, str] = {}
    not_run = {name: "not asked for" for name in STAGES if name not in names}
    said: dict[str, Any] = {}
    for name in names:
        began = time.perf_counter()
        print(f"\n## {name}", flush=True)
        before = len(stages.figures)
        try:
            getattr(stages, name)()
        except NotHere as missing:
            not_run[name] = str(missing)
        except Exception:  # noqa: BLE001 - the other stages are worth their minutes on a lent machine
            failed[name] = traceback.format_exc()
            print(failed[name], flush=True)
        print(table(stages.figures[before:]), f"\n{name} took {time.perf_counter() - began:.1f} s", flush=True)
        said = {**report(stages.figures), "facts": stages.facts, "failed": failed, "not_run": not_run}
        if not stages.tiny:
            said["gpu"] = gpu()
        if file is not None:
            file.write_text(json.dumps(said, indent=1, default=float) + "\n", encoding="utf-8")
    return said


def gpu() -> dict[str, Any]:
    """The GPU and the libraries that drive it."""
    import onnxruntime
    import torch
    from diffusers import __version__ as diffusers_version

    from workers.devices.adapters import nvml

    here = nvml.gpus()
    return {
        "name": here[0].name, "count": len(here), "driver": here[0].driver, "total_bytes": here[0].total_bytes,
        "torch": torch.__version__, "cuda": torch.version.cuda, "onnxruntime": onnxruntime.__version__,
        "diffusers": diffusers_version,
    }  # fmt: skip


def sdxl_figures() -> list[Figure]:
    """Every stage, as a part of `benchmarks.gpu`."""
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(Path(folder), tiny=False)
        said = run(stages)
    print(json.dumps(said["facts"], default=float))
    if said["failed"]:
        raise RuntimeError(str(said["failed"]))
    return [replace(figure, name=f"sdxl: {figure.name}") for figure in stages.figures]


if __name__ == "__main__":
    sys.exit(main())
