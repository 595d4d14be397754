"""The proof on a machine with a GPU: `python -m benchmarks.gpu REPORT.json`, one command, about ten minutes.

    conformance   tests/devices on the real device, nothing skipped
    device        copy, fill, and pinned transfers beside plain torch
    stack         gateway, PostgreSQL, Valkey and a worker on gpu_0: allocations, a killed training session, and a
                  4096-wide MLP at 512 waiting jobs beside in-process ONNX Runtime at the batch that was formed
    faults        memory running out in a run and in a step, and a kernel that takes the context with it
    training      a GPT-2-sized model, 200 steps beside a bare loop over the same module
    two           two workers on two GPUs, where the machine has two: placement, and copies from one to the other
    sdxl          Stable Diffusion XL in its full size, about eight minutes more; see `benchmarks.gpu.sdxl`

Each part is tried by itself; what fails stands in the report with its error, and what could not be run with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import running
from benchmarks.gpu.device import conformance, device_figures
from benchmarks.gpu.faults import faults_over_http
from benchmarks.gpu.inference import inference_over_http
from benchmarks.gpu.memory import memory_over_http
from benchmarks.gpu.sdxl import sdxl_figures
from benchmarks.gpu.training import training_figures, training_over_http
from benchmarks.gpu.two import NotHere, two_gpus
from benchmarks.measure import Figure, absolute, machine, report, table


def main() -> int:
    """Runs every part; exit status 1 where one fails or a figure falls short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("report", type=Path)
    parts: dict[str, Callable[[], list[Figure]]] = {
        "conformance": conformance, "device": device_figures, "stack": stack_figures, "faults": fault_figures,
        "training": training_figures, "two": two_gpus, "sdxl": sdxl_figures,
    }  # fmt: skip
    parser.add_argument("--only", nargs="*", default=[], choices=[*parts, []], metavar="PART", help="the parts to run")
    given = parser.parse_args()
    figures: list[Figure] = []
    failed: dict[str, str] = {}
    not_run: dict[str, str] = {name: "not asked for" for name in parts if given.only and name not in given.only}
    for name, part in parts.items():
        if name in not_run:
            continue
        print(f"\n## {name}", flush=True)
        try:
            taken = part()
            print(table(taken), flush=True)
            figures += taken
        except NotHere as missing:
            not_run[name] = str(missing)
            print(f"not run: {missing}", flush=True)
        except Exception:  # noqa: BLE001 - the other parts are worth their minutes on a lent machine
            failed[name] = traceback.format_exc()
            print(failed[name], flush=True)
    said = {**report(figures), "gpu": gpu(), "failed": failed, "not_run": not_run}
    given.report.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 0 if not failed and all(figure.holds for figure in figures) else 1


def gpu() -> dict[str, Any]:
    """The GPUs' name, driver and memory, and the libraries that drive them."""
    import onnxruntime
    import torch

    from workers.devices import open_device
    from workers.devices.adapters import nvml

    about = open_device("cuda", 0).describe()
    return {
        "name": about.name, "count": len(nvml.gpus()), "driver": about.driver, "total_bytes": about.total_bytes,
        "machine": machine(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip


def stack_figures() -> list[Figure]:
    """The whole product on this machine, with its worker on gpu_0."""
    with running.servers() as servers, running.stack(servers, "cuda:0", LEASE_SECONDS=10) as stack:
        figures = [*memory_over_http(stack), *inference_over_http(stack), *training_over_http(stack)]
        (device,) = stack.client.get("/api/devices").json()["devices"]
        print(json.dumps(device))
        figures.append(
            absolute("the worker's device is gpu_0 on cuda", "", float(device["backend"] == "cuda"), at_least=1)
        )
    return figures


def fault_figures() -> list[Figure]:
    """The whole product again, on a GPU that fails it."""
    with running.servers() as servers, running.stack(servers, "cuda:0", LEASE_SECONDS=10) as stack:
        return faults_over_http(stack)


if __name__ == "__main__":
    sys.exit(main())
