"""What the doctor tries on each device: its facts, memory, inference and training; each check raises if it fails."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from workers.devices import Device
from workers.devices.arrays import Array

#: Bytes that the memory check copies: enough to time, small enough for any device.
MEMORY_BYTES = 64 * 2**20


def _facts(device: Device) -> str:
    about, reading = device.describe(), device.memory()
    free = "unknown" if reading.free_bytes is None else f"{reading.free_bytes / 2**30:.1f} GiB"
    total = "unknown" if about.total_bytes is None else f"{about.total_bytes / 2**30:.1f} GiB"
    return f"{about.name}, driver {about.driver or 'unknown'}, {free} of {total} free, {', '.join(about.providers)}"


def _memory(device: Device) -> str:
    """Allocate, write, copy, fill, read and free, with the contents compared at each step."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, MEMORY_BYTES, np.uint8)
    first, second = device.allocate(MEMORY_BYTES), device.allocate(MEMORY_BYTES)
    try:
        assert not np.frombuffer(device.read(first, 0, 4096), np.uint8).any(), "new memory is not zeroed"
        device.write(first, 0, content.data)
        device.copy(second, 0, first, 0, MEMORY_BYTES)
        device.synchronize()
        began = time.perf_counter()
        device.copy(second, 0, first, 0, MEMORY_BYTES)
        device.synchronize()
        took = time.perf_counter() - began
        device.copy(second, 1, second, 0, 4096)
        expected = content.copy()
        expected[1:4097] = content[:4096]
        device.fill(second, 7, 8192, 4096)
        expected[8192:12288] = 7
        got = np.frombuffer(device.read(second, 0, MEMORY_BYTES), np.uint8)
        assert np.array_equal(got, expected), "what was read is not what was written"
    finally:
        device.release(first)
        device.release(second)
    rate = MEMORY_BYTES / took / 1e9
    return f"{MEMORY_BYTES >> 20} MiB right after write, copy, fill and read; copied at {rate:.1f} GB/s"


def _inference(device: Device) -> str:
    """A small convolution net on the device, its output compared with NumPy's."""
    with tempfile.TemporaryDirectory() as folder:
        path, weight = _write_model(Path(folder))
        model = device.open_model(path)
        x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
        model.run({"x": x})
        began = time.perf_counter()
        got = np.asarray(model.run({"x": x})["y"])
        took_ms = (time.perf_counter() - began) * 1000
        apart = float(np.abs(got - _expected(x, weight)).max())
        fallbacks = "an unknown number of" if model.cpu_fallback_ops is None else model.cpu_fallback_ops
        provider = model.provider
        model.close()
    assert apart < 1e-3, f"the output is {apart} off"
    return f"{provider}: {took_ms:.2f} ms, largest difference {apart:.1e}, {fallbacks} operators on the CPU"


def _training(device: Device) -> str:
    """Ten steps of a linear model, a checkpoint, and its resumption, compared to the bit."""
    from device_operations.requests.training import Initialize
    from workers.training import checkpoints
    from workers.training.model.definition import Sources
    from workers.training.model.ports import Batch
    from workers.training.outcomes import StepOptions
    from workers.training.session import Limits, build_session

    layers = [{"type": "linear", "name": "fc", "in_features": 4, "out_features": 2}]
    spec = Initialize.model_validate(
        {
            "model": {"kind": "layers", "layers": layers},
            "loss": "cross_entropy",
            "optimizer": {"type": "sgd", "learning_rate": 0.1},
        }
    )
    rng = np.random.default_rng(2)
    batch = Batch({"input": rng.standard_normal((8, 4)).astype(np.float32)}, rng.integers(0, 2, 8))
    limits = Limits(memory_bytes=None, max_batch_size=32)
    session = build_session(spec, Sources(), device.torch_device(), limits)
    losses = [session.perform(batch, StepOptions(), number).loss for number in range(1, 6)]
    with tempfile.TemporaryDirectory() as folder:
        written = checkpoints.write(session.snapshot(), Path(folder) / "checkpoint.safetensors")
        again = build_session(spec, Sources(), device.torch_device(), limits)
        again.restore(checkpoints.read(written.path, written.sha256))
    began = time.perf_counter()
    straight = [session.perform(batch, StepOptions(), number).loss for number in range(6, 11)]
    took_ms = (time.perf_counter() - began) * 1000 / 5
    resumed = [again.perform(batch, StepOptions(), number).loss for number in range(6, 11)]
    assert straight == resumed, "the resumed session went another way"
    assert (straight[-1] or 0) < (losses[0] or 0), "the loss did not fall"
    return f"{took_ms:.2f} ms a step, loss {losses[0]:.4f} to {straight[-1]:.4f}, resumed bit for bit"


def _write_model(folder: Path) -> tuple[Path, Array]:
    from onnx import TensorProto, helper, numpy_helper, save

    weight = (np.random.default_rng(3).standard_normal((4, 3, 3, 3)) * 0.3).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    path = folder / "model.onnx"
    save(made, str(path))
    return path, weight


def _expected(x: Array, weight: Array) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = x.shape[2], x.shape[3]
    made: Array = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + rows, j : j + columns], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    return np.maximum(made, 0)


#: What is tried on each device, by the name that the table gives it.
CHECKS: dict[str, Callable[[Device], str]] = {
    "opens": _facts, "memory": _memory, "inference": _inference, "training": _training,
}  # fmt: skip
