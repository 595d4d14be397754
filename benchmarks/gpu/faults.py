"""What goes wrong on a real GPU: its memory runs out in a run and in a step, and a kernel takes the context with it.

The same worker goes on after the first two; the third ends its process, as a lost device does, and the next one takes
over with the models that were loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import WAIT
from benchmarks.measure import Figure, absolute
from tests.support.stack import RunningStack, eventually

#: float32 values of the intermediate tensor that no GPU holds, and of one that any does.
TOO_MANY, FEW = 10**12, 1000

#: The rows of the table that a trained graph gathers from.
ROWS = 10

#: The process's status after the loss of its device.
DEVICE_LOST = 75


def faults_over_http(stack: RunningStack) -> list[Figure]:
    """Each fault as a job over HTTP: what the job says, and whether the device serves the next one."""
    epoch = _device(stack)["epoch"]
    write_filler(stack.folder / "models" / "filler.onnx")
    loaded = _done(stack, "inference/load-model", {"name": "filler", "source": {"path": "filler.onnx"}})
    model_id = loaded["resource"]["id"]
    full = _fill(stack, model_id, TOO_MANY)
    after_run = _fill(stack, model_id, FEW)
    step, after_step = _steps(stack)
    same = _device(stack)["epoch"] == epoch
    lost = _gather_outside(stack)
    eventually(lambda: not stack.is_running("gpu_0"), 60)
    status = stack.process("gpu_0").poll()
    stack.kill("gpu_0")
    stack.start("gpu_0")
    stack.wait_ready(120)
    again = _fill(stack, model_id, FEW)
    return [
        absolute("a run beyond the GPU's memory fails as out_of_memory", "", _is(full, "out_of_memory"), at_least=1),
        absolute("the next run of that model succeeds", "", _is(after_run, None), at_least=1),
        absolute("a step beyond the GPU's memory fails as out_of_memory", "", _is(step, "out_of_memory"), at_least=1),
        absolute("the next step of that session succeeds", "", _is(after_step, None), at_least=1),
        absolute("the same worker served all of them", "", float(same), at_least=1),
        absolute("a kernel's assertion fails its job as device_lost", "", _is(lost, "device_lost"), at_least=1),
        absolute(f"the worker's process ended with status {DEVICE_LOST}", "", float(status == DEVICE_LOST), at_least=1),
        absolute("the next worker runs the model loaded before, by itself", "", _is(again, None), at_least=1),
    ]


def _fill(stack: RunningStack, model_id: str, count: int) -> dict[str, Any]:
    inputs = {"count": {"dtype": "int64", "shape": [1], "data": [count]}}
    done = _done(stack, "inference/run", {"model_id": model_id, "inputs": inputs})
    if done["state"] == "succeeded":
        assert done["result"]["outputs"]["sum"]["data"] == [count], done
    return done


def _steps(stack: RunningStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step whose activations take more than any GPU has (160 GB), then one of a single row in the same session."""
    rows, side = 32, 50_000_000
    layers = [
        {"type": "linear", "in_features": 1, "out_features": side},
        *({"type": "sigmoid"} for _ in range(24)),
        {"type": "linear", "in_features": side, "out_features": 1},
    ]
    begun = _done(stack, "training/initialize", {
        "model": {"kind": "layers", "layers": layers}, "loss": "mse",
        "optimizer": {"type": "sgd", "learning_rate": 0.01},
    })  # fmt: skip
    session_id = begun["resource"]["id"]

    def step(count: int) -> dict[str, Any]:
        inputs = {"dtype": "float32", "shape": [count, 1], "data": np.ones((count, 1)).tolist()}
        targets = {"dtype": "float32", "shape": [count, 1], "data": np.ones((count, 1)).tolist()}
        return _done(
            stack, "training/step", {"session_id": session_id, "inputs": {"input": inputs}, "targets": targets}
        )

    both = step(rows), step(1)
    stack.client.delete(f"/api/training/session/{session_id}", headers=WAIT).raise_for_status()
    return both


def _gather_outside(stack: RunningStack) -> dict[str, Any]:
    """A step whose graph computes an index that its table does not have, which only the kernel can see."""
    write_gatherer(stack.folder / "models" / "gatherer.onnx")
    begun = _done(stack, "training/initialize", {
        "model": {"kind": "onnx", "path": "gatherer.onnx"}, "loss": "mse",
        "optimizer": {"type": "sgd", "learning_rate": 0.01},
    })  # fmt: skip
    return _done(stack, "training/step", {
        "session_id": begun["resource"]["id"],
        "inputs": {"at": {"dtype": "int64", "shape": [2], "data": [1, ROWS]}},
        "targets": {"dtype": "float32", "shape": [2, 4], "data": np.zeros((2, 4)).tolist()},
    })  # fmt: skip


def _done(stack: RunningStack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = stack.client.post(f"/api/{path}", json=body, headers=WAIT)
    assert answer.is_success, answer.text
    job: dict[str, Any] = answer.json()
    while job["finished_at"] is None:
        job = stack.client.get(f"/api/jobs/{job['job_id']}", params={"wait": 50}).json()
    return job


def _device(stack: RunningStack) -> dict[str, Any]:
    (device,) = stack.client.get("/api/devices").json()["devices"]
    return dict(device)


def _is(job: dict[str, Any], code: str | None) -> float:
    """1 where the job succeeded, or failed by `code`; what it said otherwise is printed."""
    told = job["error"] and job["error"]["code"]
    if told != code or (code is None and job["state"] != "succeeded"):
        print(f"wanted {code}, got {job}")
        return 0.0
    return 1.0


def write_filler(path: Path) -> None:
    """A graph that fills a tensor of `count` ones and adds them up."""
    from onnx import TensorProto, helper

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Expand", ["one", "count"], ["ones"]),
        helper.make_node("ReduceSum", ["ones"], ["sum"], keepdims=1),
    ]
    _save(path, nodes, helper.make_tensor_value_info("count", TensorProto.INT64, [1]),
          helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]), [one])  # fmt: skip


def write_gatherer(path: Path) -> None:
    """A graph that adds one to its indices and gathers those rows of a table."""
    from onnx import TensorProto, helper

    given = [
        helper.make_tensor("table", TensorProto.FLOAT, [ROWS, 4], [0.5] * ROWS * 4),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    nodes = [helper.make_node("Add", ["at", "one"], ["next"]), helper.make_node("Gather", ["table", "next"], ["rows"])]
    _save(path, nodes, helper.make_tensor_value_info("at", TensorProto.INT64, ["n"]),
          helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 4]), given)  # fmt: skip


def _save(path: Path, nodes: list[Any], takes: Any, gives: Any, initializers: list[Any]) -> None:
    from onnx import helper, save

    graph = helper.make_graph(nodes, path.stem, [takes], [gives], initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    path.parent.mkdir(parents=True, exist_ok=True)
    save(made, str(path))
