"""What DirectML's failures are called, from the genuine libraries' own errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from workers.devices import Device
from workers.devices.directml import LARGEST_ALLOCATION_BYTES

ROOT = Path(__file__).parents[2]

#: Removes the device between two runs of a model, and prints the error that our layer raises for the second.
REMOVE = """
import json, os, pathlib, sys, numpy
from device_operations.errors import OperationError
from workers.devices import open_device
model = open_device("directml").open_model(pathlib.Path(sys.argv[1]))
image = numpy.ones((2, 3, 8, 8), numpy.float32)
model.run({"x": image})
pathlib.Path(os.environ["RIG_REMOVED_FILE"]).touch()
try:
    model.run({"x": image})
except OperationError as error:
    print(json.dumps(error.as_job_error()), flush=True)
"""


@pytest.mark.skipif("RIG_REMOVED_FILE" not in os.environ, reason="only the rig can remove a device on demand")
def test_a_removed_device_is_lost_for_the_process_and_the_job_is_retryable(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graphs.convnet())
    removed = Path(os.environ["RIG_REMOVED_FILE"])
    try:
        # A child process: its device is removed for as long as it lives.
        child = subprocess.run(
            [sys.executable, "-c", REMOVE, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
        assert removed.exists(), child.stderr
    finally:
        removed.unlink(missing_ok=True)
    error = json.loads(child.stdout.splitlines()[-1])
    assert (error["code"], error["retryable"]) == ("device_lost", True)
    assert "887A0005" in error["message"], "ONNX Runtime's own error"


@pytest.mark.parametrize(
    ("text", "code", "retryable"),
    [
        ("... Exception(2) tid(24) 887A0005 The GPU device instance has been suspended.", "device_lost", True),
        ("887A0006 The GPU will not respond to more commands", "device_lost", True),
        ("887A0020 The driver encountered an internal error", "device_lost", True),
        ("Exception(8) tid(24) 887A0002 ", "device_unavailable", True),
        ("Exception(1) tid(24) 8007000E Not enough memory resources are available", "out_of_memory", True),
        (
            "Could not allocate tensor with 4294967296 bytes. There is not enough GPU memory",
            "out_of_memory",
            True,
        ),
        ("DML allocator out of memory", "out_of_memory", True),
        ("Exception(4) tid(24) 80004005 Call failed.", "run_failed", False),
        ("Call failed.", "run_failed", False),
    ],
)
def test_each_hresult_has_its_code(device: Device, text: str, code: str, retryable: bool) -> None:
    named = device.classify(RuntimeError(text))
    assert (named.code, named.retryable) == (code, retryable)
    assert str(device) in named.message or device.describe().name in named.message


def test_an_error_of_torch_has_a_code_too(device: Device) -> None:
    import torch

    one = torch.ones(8, 64).to(device.torch_device())
    with pytest.raises(RuntimeError) as raised:
        (one @ one).cpu()
    assert device.classify(raised.value).code in ("internal_error", "run_failed")


def test_more_than_one_tensor_can_hold_is_refused_before_torch_is_asked(device: Device) -> None:
    for size in (LARGEST_ALLOCATION_BYTES + 1, 1 << 45):
        with pytest.raises(OperationError) as refused:
            device.allocate(size)
        assert refused.value.code == "out_of_memory"
        assert str(LARGEST_ALLOCATION_BYTES) in refused.value.message


def test_a_dtype_that_would_abort_the_process_never_reaches_torch(device: Device) -> None:
    with pytest.raises(OperationError) as refused:
        device.tensor_view(device.allocate(64), "bfloat16", (1,))
    assert refused.value.code == "dtype_unsupported"
    assert bytes(device.read(device.allocate(3))) == b"\0\0\0"


def test_float_tensors_can_be_cut_filled_and_copied_on_the_device(device: Device) -> None:
    import torch

    host = torch.arange(4096, dtype=torch.float32)
    there = host.to(device.torch_device())
    filled = torch.empty(4096, device=device.torch_device()).fill_(7)
    filled[257:768].copy_(there[7:518])
    device.synchronize()
    expected = np.full(4096, 7, np.float32)
    expected[257:768] = np.arange(7, 518)
    assert np.array_equal(filled.cpu().numpy(), expected)


def test_operators_that_torch_runs_on_the_cpu_are_named() -> None:
    code = (
        "import torch\n"
        "from workers.devices import open_device\n"
        "device = open_device('directml')\n"
        "x = torch.ones(3, 5).to(device.torch_device())\n"
        "assert device.cpu_fallback_operators == ()\n"
        "x.clone().lerp_(x, 0.5)\n"
        "print(device.cpu_fallback_operators)"
    )
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.strip() == "('aten::lerp.Scalar_out',)"
