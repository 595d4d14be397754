"""A 4096-wide MLP over HTTP at 512 waiting jobs, beside in-process ONNX Runtime at the batch that the batcher formed.

Two times of ours come out of the jobs' own results: `graph_ms`, the graph by CUDA's events, and `device_ms`, from the
rows lying together on the host until the outputs lie there. Each stands beside ONNX Runtime's of the same extent, both
with I/O binding and both at the same pace, since a GPU that idled between two batches runs the next one slower than one
that is never let go; the ratios across extents, and to ONNX Runtime back to back, are told as well.
"""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import WAIT
from benchmarks.gpu.memory import used
from benchmarks.measure import Figure, absolute
from tests.support.stack import RunningStack

#: The sides of the MLP, and the jobs that wait for it.
WIDTH, LAYERS, CLIENTS = 4096, 4, 512

#: Runs of the yardstick at the product's pace in each round: between two batches of ours lie the submission, the claims
#: and the records of 512 jobs, and the GPU idles before each of these as long as that took.
PACED = 3

#: Rounds of 512 jobs: the first bring libraries in and grow the arena to their shapes, the last ones tell.
WARM_UP, ROUNDS = 5, 7

Rows = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Round:
    """One round in milliseconds: the product's times, then ONNX Runtime's in this process, right after."""

    batch: int
    graph: float | None
    device: float
    paced_graph: float
    paced_pinned: float
    resident_graph: float
    resident: float
    pinned: float
    plain: float


def inference_over_http(stack: RunningStack) -> list[Figure]:
    """512 jobs wait together; the batch formed of them on the device beside the same batch in process."""
    path = stack.folder / "models" / "mlp.onnx"
    write_mlp(path)
    rows: Rows = np.random.default_rng(1).standard_normal((CLIENTS, WIDTH)).astype(np.float32)
    # First without ONNX Runtime in this process, so that what is left on the GPU is the worker's alone. The first model
    # of a process brings CUDA's libraries in, which stay with it.
    standing = []
    for _ in range(2):
        model_id = _load(stack)
        for _ in range(2):
            _together(stack, _entries(model_id, rows))
        _unload(stack, model_id)
        standing.append(used())
    left = standing[1] - standing[0]
    model_id = _load(stack)
    entries = _entries(model_id, rows)
    rounds: list[Round] = []
    in_process: InProcess | None = None
    for number in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        results = _together(stack, entries)
        pace_seconds = time.perf_counter() - began
        batch = int(statistics.median(result["batch_size"] for result in results))
        if number < WARM_UP:
            continue
        if in_process is None or in_process.batch != batch:
            in_process = InProcess(path, rows[:batch])
        whole = [result for result in results if result["batch_size"] == batch]
        graphs = [result["graph_ms"] for result in whole if "graph_ms" in result]
        rounds.append(
            Round(
                batch,
                statistics.median(graphs) if graphs else None,
                statistics.median(result["device_ms"] for result in whole),
                *in_process.times(pace_seconds),
            )
        )
    print(json.dumps([[name, *(getattr(one, name) for one in rounds)] for name in Round.__slots__]))
    outputs = np.concatenate([_output(result) for result in results])
    wanted = InProcess(path, rows).outputs()
    began = time.perf_counter()
    singles = [_alone(stack, entries[0]) for _ in range(20)]
    single_pace = (time.perf_counter() - began) / len(singles)
    alone_ms = statistics.median(result["device_ms"] for result in singles[5:])
    one_row = InProcess(path, rows[:1])
    difference = float(np.abs(outputs - wanted).max())
    single = float(np.abs(_output(singles[-1]) - outputs[:1]).max())
    _, paced_one, *_, bound_one, plain_one = one_row.times(single_pace)
    _unload(stack, model_id)
    return [
        absolute(f"batch formed of {CLIENTS} waiting jobs", "rows", rounds[-1].batch, at_least=CLIENTS / 2),
        absolute("a joined run equals a single one", "difference", single, at_most=1e-3),
        absolute(f"all {CLIENTS} outputs equal in-process ONNX Runtime's", "difference", difference, at_most=1e-3),
        *_compared(rounds),
        *(Figure("one row alone, device_ms", "ms", alone_ms, base, base_is, alone_ms / base, "", True) for base, base_is in (
            (paced_one, "ONNX Runtime in process, I/O binding, the row in and out through pinned memory, at the same pace"),
            (bound_one, "the same, back to back"),
            (plain_one, "ONNX Runtime in process, NumPy in and out, back to back"),
        )),
        absolute("left on the device by loading, running and unloading a second time", "MiB", left / 2**20, at_most=64),
    ]  # fmt: skip


def _compared(rounds: list[Round]) -> list[Figure]:
    """The MLP's figures: like beside like is held to 0.9, and what compares two extents is told."""
    resident = "ONNX Runtime in process, I/O binding, tensors resident"
    moved = "ONNX Runtime in process, I/O binding, the same rows in and out through pinned memory"
    pace = "at the same pace"
    with_transfers = "MLP at the batch formed, graph and transfers (device_ms)"
    figures = []
    if all(one.graph for one in rounds):
        figures = [
            _beside("MLP at the batch formed, graph alone (graph_ms)", rounds, lambda one: one.graph or 0.0,
                    lambda one: one.paced_graph, f"{resident}, by CUDA's events, {pace}", at_least=0.9),
            _beside("MLP at the batch formed, graph alone (graph_ms)", rounds, lambda one: one.graph or 0.0,
                    lambda one: one.resident_graph, f"{resident}, by CUDA's events, back to back"),
            _beside("MLP at the batch formed, graph alone (graph_ms)", rounds, lambda one: one.graph or 0.0,
                    lambda one: one.resident, f"{resident}, by the host's clock"),
        ]  # fmt: skip
    told = sum(one.graph is not None for one in rounds)
    return [
        absolute("rounds whose runs tell the graph's own time", "rounds", told, at_least=len(rounds)),
        *figures,
        _beside(with_transfers, rounds, lambda one: one.device, lambda one: one.paced_pinned, f"{moved}, {pace}",
                at_least=0.9),
        _beside(with_transfers, rounds, lambda one: one.device, lambda one: one.pinned, f"{moved}, back to back"),
        _beside(with_transfers, rounds, lambda one: one.device, lambda one: one.resident, f"{resident}: no transfers"),
        _beside(with_transfers, rounds, lambda one: one.device, lambda one: one.plain,
                "ONNX Runtime in process, NumPy in and out"),
        _beside(f"the limit set by the bus: {moved}", rounds, lambda one: one.pinned, lambda one: one.resident,
                f"{resident}: no transfers"),
    ]  # fmt: skip


def _beside(
    name: str,
    rounds: list[Round],
    ours: Callable[[Round], float],
    base: Callable[[Round], float],
    base_is: str,
    at_least: float | None = None,
) -> Figure:
    """Rows a second of both, and the median of the rounds' ratios; more than 1 is faster than the yardstick."""
    rates = [(one.batch / ours(one) * 1e3, one.batch / base(one) * 1e3) for one in rounds]
    ratio = statistics.median(mine / other for mine, other in rates)
    return Figure(
        name, "rows/s", statistics.median(mine for mine, _ in rates), statistics.median(other for _, other in rates),
        base_is, ratio, f"at least {at_least:g}x" if at_least else "", at_least is None or ratio >= at_least,
        list(rates),
    )  # fmt: skip


def _entries(model_id: str, rows: Rows) -> list[dict[str, Any]]:
    """A job for each row."""
    tensors = [
        {"dtype": "float32", "shape": [1, WIDTH], "base64": base64.b64encode(row.tobytes()).decode()} for row in rows
    ]
    return [
        {"kind": "inference.run", "request": {"model_id": model_id, "form": "base64", "inputs": {"x": tensor}}}
        for tensor in tensors
    ]


def _load(stack: RunningStack) -> str:
    body = {"name": "mlp", "source": {"path": "mlp.onnx"}, "options": {"max_batch_size": CLIENTS, "max_delay_ms": 500}}
    loaded = stack.client.post("/api/inference/load-model", json=body, headers=WAIT).json()
    assert loaded["state"] == "succeeded", loaded
    return str(loaded["resource"]["id"])


def _unload(stack: RunningStack, model_id: str) -> None:
    stack.client.delete(f"/api/inference/unload-model/{model_id}", headers=WAIT).raise_for_status()


def _together(stack: RunningStack, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    jobs = stack.client.post("/api/jobs", json={"jobs": entries}, timeout=120).json()["jobs"]
    done = [stack.client.get(f"/api/jobs/{job['job_id']}", params={"wait": 60}).json() for job in jobs]
    assert {job["state"] for job in done} == {"succeeded"}, done[0]
    return [job["result"] for job in done]


def _alone(stack: RunningStack, entry: dict[str, Any]) -> dict[str, Any]:
    done = stack.client.post("/api/inference/run", json=entry["request"], headers=WAIT).json()
    assert done["state"] == "succeeded", done
    result: dict[str, Any] = done["result"]
    return result


def _output(result: dict[str, Any]) -> Rows:
    return np.frombuffer(base64.b64decode(result["outputs"]["y"]["base64"]), np.float32).reshape(-1, WIDTH)


class InProcess:
    """ONNX Runtime in this process on given rows: resident, moved through pinned memory by the shortest code, plain."""

    def __init__(self, path: Path, rows: Rows) -> None:
        import onnxruntime as ort
        import torch

        self.batch = len(rows)
        self._torch, self._rows = torch, rows
        self._stream = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call, unused-ignore]
        # TF32 off, as in the product: float32 means float32 in both.
        options = {"use_tf32": "0", "device_id": "0", "user_compute_stream": str(self._stream.cuda_stream)}
        self._session = ort.InferenceSession(str(path), providers=[("CUDAExecutionProvider", options)])
        self._x, self._y = (torch.empty(rows.shape, device="cuda:0") for _ in range(2))
        self._in, self._out = (torch.empty(rows.shape, pin_memory=True) for _ in range(2))
        self._in.copy_(torch.from_numpy(rows))
        self._x.copy_(self._in)
        torch.cuda.synchronize()
        self._binding = self._session.io_binding()
        self._binding.bind_input("x", "cuda", 0, np.float32, rows.shape, self._x.data_ptr())
        self._binding.bind_output("y", "cuda", 0, np.float32, rows.shape, self._y.data_ptr())
        self._run()

    def times(self, pace_seconds: float) -> tuple[float, float, float, float, float, float]:
        """Milliseconds: at the product's pace the graph by CUDA's events, and moved through pinned memory; back to back
        the graph by CUDA's events, and by the host's clock resident, moved through pinned memory, plain.
        """
        return (
            _paced(self._graph, pace_seconds),
            _paced(_timed(self._moved), pace_seconds),
            _median(self._graph),
            _median(_timed(self._run)),
            _median(_timed(self._moved)),
            _median(_timed(lambda: self._session.run(None, {"x": self._rows}))),
        )

    def outputs(self) -> Rows:
        """What the rows give."""
        self._moved()
        return np.array(self._out.numpy())

    def _run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def _moved(self) -> None:
        with self._torch.cuda.stream(self._stream):
            self._x.copy_(self._in, non_blocking=True)
            self._run()
            self._out.copy_(self._y, non_blocking=True)
            self._stream.synchronize()

    def _graph(self) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        self._run()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end))


def _timed(step: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3

    return measure


def _median(measure: Callable[[], float]) -> float:
    for _ in range(5):
        measure()
    return statistics.median(measure() for _ in range(30))


def _paced(measure: Callable[[], float], pace_seconds: float) -> float:
    measure()
    taken = []
    for _ in range(PACED):
        time.sleep(pace_seconds)
        taken.append(measure())
    return statistics.median(taken)


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
