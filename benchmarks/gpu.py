"""The proof on a machine with a GPU: `python -m benchmarks.gpu REPORT.json`, one command, about ten minutes.

    conformance   tests/devices on the real device, nothing skipped that a GPU can do
    device        copy, fill, and pinned transfers beside plain torch
    stack         gateway, PostgreSQL, Valkey and a worker on gpu_0: models, batches, allocations, a killed training
    inference     a 4096-wide MLP at 512 waiting jobs beside in-process ONNX Runtime at the batch that was formed
    training      a GPT-2-sized model, 200 steps beside a bare loop over the same module
    memory        back to its start after unload and deallocate

Each part is tried by itself; what fails stands in the report with its error.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import running
from benchmarks.measure import Figure, absolute, compare, machine, report, table
from tests.support.stack import RunningStack, eventually

GIB = 2**30
WAIT = {"Prefer": "wait=60"}

#: The sides of the MLP of the inference part, and the jobs that wait for it.
WIDTH, LAYERS, CLIENTS = 4096, 4, 512

#: GPT-2 small: 12 blocks of 768, 12 heads, 50,257 tokens; sequences of 256, four at a time.
BLOCKS, SIDE, HEADS, TOKENS, SEQUENCE, BATCH, STEPS = 12, 768, 12, 50_257, 256, 4, 200


def main() -> int:
    """Runs every part; exit status 1 where one fails or a figure falls short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="the parts to run")
    given = parser.parse_args()
    parts: dict[str, Callable[[], list[Figure]]] = {
        "conformance": conformance, "device": device_figures, "stack": stack_figures, "training": training_figures,
    }  # fmt: skip
    figures: list[Figure] = []
    failed: dict[str, str] = {}
    for name, part in parts.items():
        if given.only and name not in given.only:
            continue
        print(f"\n## {name}", flush=True)
        try:
            taken = part()
            print(table(taken), flush=True)
            figures += taken
        except Exception:  # noqa: BLE001 - the other parts are worth their minutes on a lent machine
            failed[name] = traceback.format_exc()
            print(failed[name], flush=True)
    said = {**report(figures), "gpu": gpu(), "failed": failed}
    given.report.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 0 if not failed and all(figure.holds for figure in figures) else 1


def gpu() -> dict[str, Any]:
    """The GPU's name, driver and memory, and the libraries that drive it."""
    import onnxruntime
    import torch

    from workers.devices import open_device

    about = open_device("cuda", 0).describe()
    return {
        "name": about.name, "driver": about.driver, "total_bytes": about.total_bytes, "machine": machine(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip


def conformance() -> list[Figure]:
    """The device layer's own suite on this GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/devices", "-m", "cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    print(ran.stdout[-3000:])
    last = ran.stdout.strip().splitlines()[-1]
    counts = {
        word.rstrip(","): int(number)
        for number, word in zip(last.split(), last.split()[1:], strict=False)
        if number.isdigit()
    }
    return [
        absolute("conformance tests passed on cuda", "tests", counts.get("passed", 0), at_least=100),
        absolute("conformance tests failed on cuda", "tests", counts.get("failed", 0), at_most=0),
        absolute("conformance tests skipped on cuda", "tests", counts.get("skipped", 0)),
    ]


def device_figures() -> list[Figure]:
    """Memory on the device, timed by CUDA's own events."""
    import torch

    from workers.devices import open_device

    device = open_device("cuda", 0)
    size = 8 * GIB
    first, second = device.allocate(size), device.allocate(size)
    own, other = (torch.empty(size, dtype=torch.uint8, device="cuda:0") for _ in range(2))

    def timed(step: Callable[[], object], moved: int) -> Callable[[], float]:
        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step()
            torch.cuda.synchronize()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            return moved / (start.elapsed_time(end) / 1000) / 1e9

        return measure

    figures = [
        compare("copy of 8 GiB on the device", "GB/s", timed(lambda: device.copy(second, 0, first, 0, size), 2 * size),
                timed(lambda: own.copy_(other), 2 * size), "torch copy_", at_least=0.95),
        compare("clear of 8 GiB on the device", "GB/s", timed(lambda: device.fill(first, 0), size),
                timed(own.zero_, size), "torch zero_", at_least=0.95),
    ]  # fmt: skip
    moved = GIB
    pinned = device.host_buffer(moved)
    host = torch.empty(moved, dtype=torch.uint8, pin_memory=True)

    def wall(step: Callable[[], object]) -> Callable[[], float]:
        def measure() -> float:
            step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            torch.cuda.synchronize()
            return moved / (time.perf_counter() - began) / 1e9

        return measure

    up = wall(lambda: device.write(first, 0, pinned))
    down = wall(lambda: device.read(first, 0, moved, pinned))
    figures += [
        compare("host to device, 1 GiB pinned", "GB/s", up, wall(lambda: own[:moved].copy_(host)), "torch, pinned", at_least=0.8),
        compare("device to host, 1 GiB pinned", "GB/s", down, wall(lambda: host.copy_(own[:moved])), "torch, pinned", at_least=0.8),
        absolute("host to device, 1 GiB pinned", "GB/s", statistics.median(up() for _ in range(5)), at_least=44),
        absolute("device to host, 1 GiB pinned", "GB/s", statistics.median(down() for _ in range(5)), at_least=44),
    ]  # fmt: skip
    for buffer in (first, second):
        device.release(buffer)
    return figures


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


def memory_over_http(stack: RunningStack) -> list[Figure]:
    """Allocations through jobs, pipelined; and what the device holds before and after."""
    client = stack.client
    # The first allocation brings CUDA's own context along, which stays as long as the process.
    client.post(
        "/api/memory/allocate", json={"size_bytes": 4096, "allocation_id": "first"}, headers=WAIT
    ).raise_for_status()
    client.delete("/api/memory/deallocate/first", headers=WAIT).raise_for_status()
    before = used(stack)
    size = 4 * GIB
    wanted = [
        {"kind": "memory.allocate", "request": {"size_bytes": size, "allocation_id": f"big-{n}"}} for n in range(2)
    ]
    client.post("/api/jobs", json={"jobs": wanted}).raise_for_status()
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    client.put("/api/memory/data/big-0?offset=4096", content=content)
    body = {"source": {"allocation_id": "big-0"}, "destination": {"allocation_id": "big-1"}}
    copied = client.post("/api/memory/copy", json=body, headers=WAIT).json()
    assert copied["state"] == "succeeded", copied
    held = used(stack)
    got = client.get("/api/memory/data/big-1", params={"offset": 4096, "size_bytes": len(content)}).content
    for name in ("big-0", "big-1"):
        client.delete(f"/api/memory/deallocate/{name}", headers=WAIT).raise_for_status()
    after = used(stack)
    return [
        absolute("bytes read back equal those written, through two allocations", "", float(got == content), at_least=1),
        absolute("8 GiB of allocations seen by the driver", "GiB", (held - before) / GIB, at_least=7.9),
        absolute("left on the device after deallocation", "MiB", (after - before) / 2**20, at_most=64),
    ]


def inference_over_http(stack: RunningStack) -> list[Figure]:
    """512 jobs wait together; the batcher's batch on the device beside the same batch in process, both device-timed."""
    write_mlp(stack.folder / "models" / "mlp.onnx")
    client = stack.client
    before = used(stack)
    body = {"name": "mlp", "source": {"path": "mlp.onnx"}, "options": {"max_batch_size": CLIENTS, "max_delay_ms": 500}}
    loaded = client.post("/api/inference/load-model", json=body, headers=WAIT).json()
    assert loaded["state"] == "succeeded", loaded
    rows = np.random.default_rng(1).standard_normal((CLIENTS, WIDTH)).astype(np.float32)
    entries = [{"kind": "inference.run", "request": {"model_name": "mlp", "form": "base64", "inputs": {"x": {
        "dtype": "float32", "shape": [1, WIDTH], "base64": base64.b64encode(row.tobytes()).decode()}}}} for row in rows]  # fmt: skip
    per_row, sizes, device_ms = [], [], []
    for _ in range(12):
        jobs = client.post("/api/jobs", json={"jobs": entries}, timeout=120).json()["jobs"]
        done = [client.get(f"/api/jobs/{job['job_id']}", params={"wait": 60}).json() for job in jobs]
        assert {job["state"] for job in done} == {"succeeded"}, done[0]
        size = statistics.median(job["result"]["batch_size"] for job in done)
        sizes.append(size)
        device_ms.append(
            statistics.median(job["result"]["device_ms"] for job in done if job["result"]["batch_size"] == size)
        )
        per_row.append(device_ms[-1] / size)
    # The first rounds bring libraries in and grow the arena to their shapes: the last ones tell.
    formed, device_ms = (
        int(sizes[-1]),
        [ms for ms, size in zip(device_ms, sizes, strict=True) if size == sizes[-1]][-5:],
    )
    bound_ms, host_ms = in_process(stack.folder / "models" / "mlp.onnx", formed)
    first = np.frombuffer(base64.b64decode(done[0]["result"]["outputs"]["y"]["base64"]), np.float32)
    alone = client.post("/api/inference/run", json=entries[0]["request"], headers=WAIT).json()
    single = np.frombuffer(base64.b64decode(alone["result"]["outputs"]["y"]["base64"]), np.float32)
    model_id = loaded["resource"]["id"]
    client.delete(f"/api/inference/unload-model/{model_id}", headers=WAIT).raise_for_status()
    after = used(stack)
    ours = statistics.median(device_ms)
    return [
        absolute(f"batch formed of {CLIENTS} waiting jobs", "rows", formed, at_least=CLIENTS / 2),
        absolute("a joined run equals a single one", "difference", float(np.abs(first - single).max()), at_most=1e-3),
        Figure("MLP throughput at the batch formed", "rows/s", formed / ours * 1000, formed / bound_ms * 1000,
               "in-process ONNX Runtime, I/O binding, tensors resident", bound_ms / ours, "at least 0.9x", bound_ms / ours >= 0.9),
        Figure("MLP throughput at the batch formed", "rows/s", formed / ours * 1000, formed / host_ms * 1000,
               "in-process ONNX Runtime, NumPy in and out", host_ms / ours, "", True),
        absolute("left on the device after unloading", "MiB", (after - before) / 2**20, at_most=64),
    ]  # fmt: skip


def in_process(path: Path, batch: int) -> tuple[float, float]:
    """Milliseconds of one run in this process: with resident tensors, and with NumPy in and out."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=[("CUDAExecutionProvider", {"use_tf32": "0"})])
    x = np.random.default_rng(2).standard_normal((batch, WIDTH)).astype(np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_shape_and_type([batch, WIDTH], np.float32, "cuda", 0))

    def median(step: Callable[[], object]) -> float:
        for _ in range(5):
            step()
        taken = []
        for _ in range(30):
            began = time.perf_counter()
            step()
            taken.append((time.perf_counter() - began) * 1000)
        return statistics.median(taken)

    return median(lambda: session.run_with_iobinding(binding)), median(lambda: session.run(None, {"x": x}))


def training_over_http(stack: RunningStack) -> list[Figure]:
    """A session on the GPU whose worker is killed and comes back: the same losses as one that was left alone."""
    client = stack.client
    rng = np.random.default_rng(3)
    xs, ys = rng.standard_normal((8, 64)).astype(np.float32), rng.integers(0, 10, 8)

    def steps(session_id: str, first: int, last: int) -> list[float]:
        losses = []
        for number in range(first, last + 1):
            body = {
                "session_id": session_id, "sequence": number,
                "inputs": {"input": {"dtype": "float32", "shape": [8, 64], "data": xs.tolist()}},
                "targets": {"dtype": "int64", "shape": [8], "data": ys.tolist()},
            }  # fmt: skip
            done = client.post("/api/training/step", json=body, headers=WAIT).json()
            if done.get("state") != "succeeded":
                done = client.get(f"/api/jobs/{done['job_id']}", params={"wait": 60}).json()
            assert done["state"] == "succeeded", done
            losses.append(done["result"]["loss"])
        return losses

    def begin() -> str:
        layers = [
            {"type": "linear", "in_features": 64, "out_features": 128}, {"type": "relu"}, {"type": "dropout", "p": 0.2},
            {"type": "linear", "in_features": 128, "out_features": 10},
        ]  # fmt: skip
        body = {"model": {"kind": "layers", "layers": layers}, "loss": "cross_entropy",
                "optimizer": {"type": "adamw", "learning_rate": 0.01}, "seed": 7}  # fmt: skip
        made = client.post("/api/training/initialize", json=body, headers=WAIT).json()
        assert made["state"] == "succeeded", made
        return str(made["resource"]["id"])

    whole = steps(begin(), 1, 30)
    broken = begin()
    losses = steps(broken, 1, 15)
    client.post("/api/training/checkpoint", json={"session_id": broken}, headers=WAIT).raise_for_status()
    losses += steps(broken, 16, 20)
    stack.kill("gpu_0")
    stack.start("gpu_0")
    eventually(lambda: client.get(f"/api/training/status/{broken}").json()["state"] == "restored", 90)
    losses += steps(broken, 21, 30)
    for session_id in (broken,):
        client.delete(f"/api/training/session/{session_id}", headers=WAIT).raise_for_status()
    return [
        absolute(
            "losses of a killed session equal the undisturbed one's, bit for bit",
            "",
            float(losses == whole),
            at_least=1,
        )
    ]


def training_figures() -> list[Figure]:
    """A GPT-2-sized session stepping through a dataset beside a bare loop over the same module and optimizer."""
    import torch

    from device_operations.requests.training import Initialize
    from workers.training.dataset import Dataset, Plan
    from workers.training.definition import Sources
    from workers.training.outcomes import StepOptions
    from workers.training.session import Limits, build_session

    block = [
        {"type": "residual", "layers": [{"type": "layer_norm", "normalized_shape": SIDE},
         {"type": "multihead_attention", "embed_dim": SIDE, "num_heads": HEADS, "batch_first": True}]},
        {"type": "residual", "layers": [{"type": "layer_norm", "normalized_shape": SIDE},
         {"type": "linear", "in_features": SIDE, "out_features": 4 * SIDE}, {"type": "gelu"},
         {"type": "linear", "in_features": 4 * SIDE, "out_features": SIDE}]},
    ]  # fmt: skip
    layers = [
        {"type": "embedding", "num_embeddings": TOKENS, "embedding_dim": SIDE},
        *(layer for _ in range(BLOCKS) for layer in block),
        {"type": "layer_norm", "normalized_shape": SIDE},
        {"type": "linear", "in_features": SIDE, "out_features": TOKENS, "bias": False},
        # The mean over the tokens keeps the targets small: what is timed is the model, not its targets' way to the GPU.
        {"type": "adaptive_avg_pool1d", "output_size": 1},
    ]
    spec = Initialize.model_validate(
        {"model": {"kind": "layers", "layers": layers}, "loss": "mse", "deterministic": False,
         "optimizer": {"type": "adamw", "learning_rate": 1e-4}}
    )  # fmt: skip
    device = torch.device("cuda:0")
    session = build_session(spec, Sources(), device, Limits(memory_bytes=None, max_batch_size=64))
    count = sum(parameter.numel() for parameter in session._module.parameters())
    inputs = torch.randint(0, TOKENS, (64, SEQUENCE))
    targets = torch.zeros(64, SEQUENCE, 1)
    module, optimizer = session._module, torch.optim.AdamW(session._module.parameters(), lr=1e-4)
    loss_of = torch.nn.functional.mse_loss
    on_device = inputs.to(device)
    zeros = torch.zeros(BATCH, SEQUENCE, 1, device=device)

    def bare() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        module.train()
        for number in range(STEPS):
            at = BATCH * number % 64
            loss = loss_of(module(on_device[at : at + BATCH]), zeros)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        torch.cuda.synchronize()
        return STEPS / (time.perf_counter() - began)

    sequence = 0

    def ours() -> float:
        nonlocal sequence
        sequence += 1
        run = session.run(
            Dataset({"input": inputs}, targets), Plan(BATCH, steps=STEPS, shuffle=False), StepOptions(), sequence
        )
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in run:
            pass
        torch.cuda.synchronize()
        rate = STEPS / (time.perf_counter() - began)
        run.finish()
        return rate

    return [compare(f"training of {count / 1e6:.0f} M parameters, {STEPS} steps of {BATCH}x{SEQUENCE} tokens", "steps/s",
                    ours, bare, "bare torch loop, same module", at_least=0.98, rounds=3)]  # fmt: skip


def used(stack: RunningStack) -> float:
    """What the driver says is in use on the GPU, once it has settled."""
    from workers.devices import nvml

    time.sleep(0.5)
    usage = nvml.usage(nvml.gpus()[0].index)
    assert usage is not None
    return float(usage.used_bytes)


def write_mlp(path: Path) -> None:
    """Four layers of 4096x4096 float32 with relu between: 256 MiB."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for number in range(LAYERS):
        weights.append(
            numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / 64).astype(np.float32), f"w{number}")
        )
        last = number == LAYERS - 1
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], ["y" if last else f"m{number}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"m{number}"], [f"r{number}"]))
        value = f"r{number}"
    graph = helper.make_graph(
        nodes, "mlp", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])], weights,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    path.parent.mkdir(parents=True, exist_ok=True)
    save(made, str(path))


if __name__ == "__main__":
    sys.exit(main())
