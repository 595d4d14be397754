"""ONNX Runtime sessions on DirectML: the options they must have, one run at a time, and nothing silently on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from workers.devices import Device, open_device
from workers.devices.directml import DirectMLDevice
from workers.devices.onnx.runtime import LoadedGraph, resolve_provider
from workers.devices.values import Provider

Load = Callable[..., LoadedGraph]
IMAGE = np.ones((2, 3, 8, 8), np.float32)


def test_a_session_is_on_directml_with_the_options_that_it_demands(device: Device, load: Load) -> None:
    model = load("convnet")
    session = model._session
    assert session is not None
    settings = session.get_session_options()
    assert session.get_providers()[0] == "DmlExecutionProvider"
    assert settings.enable_mem_pattern is False
    assert settings.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert session._enable_fallback == 0, "ONNX Runtime would go on on the CPU and print a line"
    assert model.cpu_fallback_ops == 0
    assert model.memory_bytes is not None

    assert device.provider().memory_pattern is False, "ONNX Runtime 1.24 corrects it, and says that it must be off"
    model.run({"x": IMAGE})
    run = threading.Thread(target=model.run, args=({"x": IMAGE},))
    with DirectMLDevice(0)._lock:
        run.start()
        run.join(1.0)
        assert run.is_alive(), "a second run on an adapter waits for the first, whichever object made it"
    run.join(30)
    assert not run.is_alive()


def test_an_operator_that_directml_lacks_is_counted(load: Load) -> None:
    model = load("chosen")
    assert model.provider == "DmlExecutionProvider"
    assert model.cpu_fallback_ops == 1
    rows = model.run({"x": np.eye(4, dtype=np.float32), "mask": np.array([True, False, True, False])})["y"]
    assert np.array_equal(rows, np.eye(4, dtype=np.float32)[[0, 2]])  # type: ignore[arg-type]


def test_the_answer_to_a_bad_adapter_is_no_session_on_the_cpu(load: Load) -> None:
    class Elsewhere(DirectMLDevice):
        def provider(self) -> Provider:
            return Provider("DmlExecutionProvider", {"device_id": "7"}, memory_pattern=False)

    with pytest.raises(OperationError) as refused:
        load("linear", on=Elsewhere(0))
    assert refused.value.code == "device_unavailable"
    assert "887A0002" in refused.value.message


def reshaping(rows: int | str) -> bytes:
    """A Reshape with allowzero and a -1, which ONNX Runtime's own DirectML provider gets wrong on any adapter."""
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [4], [2, -1, 2, 4])
    return graphs.build(
        [graphs.node("Reshape", "x shape", "y", allowzero=1)],
        [("x", graphs.FLOAT, [rows, 6, 8])],
        [("y", graphs.FLOAT, [rows, "m", 2, 4])],
        [shape],
    )


@pytest.mark.parametrize(
    ("rows", "code", "hresult"), [(2, "model_invalid", "80070057"), ("n", "out_of_memory", "8007000E")]
)
def test_an_operator_that_fails_says_so_by_its_hresult_and_the_next_model_runs(
    load: Load, rows: int | str, code: str, hresult: str
) -> None:
    with pytest.raises(OperationError) as failed:
        load(reshaping(rows)).run({"x": np.ones((2, 6, 8), np.float32)})
    assert failed.value.code == code
    assert hresult in failed.value.message
    assert "_work" not in failed.value.message, "the build machine's paths say nothing to a caller"
    assert load("linear").run({"x": np.ones((2, 16), np.float32)})["y"].shape == (2, 8)


def test_a_provider_is_resolved_by_name_whatever_package_brings_it() -> None:
    assert resolve_provider("DmlExecutionProvider") == "DmlExecutionProvider"
    with pytest.raises(OperationError, match="onnxruntime-gpu"):
        resolve_provider("CUDAExecutionProvider")


def test_the_cpu_device_works_beside_it(load: Load) -> None:
    model = load("linear", on=open_device("cpu"))
    assert model.provider == "CPUExecutionProvider"
    assert model.run({"x": np.ones((1, 16), np.float32)})["y"].shape == (1, 8)
