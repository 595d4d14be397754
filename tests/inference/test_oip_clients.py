"""The protocol's own clients, unmodified, with every datatype: Triton's and KServe's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from onnx import TensorProto

from tests.inference import graphs
from tests.inference.conftest import Api
from tests.support import value_graphs
from tests.support.stack import REPOSITORY

KSERVE = REPOSITORY / ".cache" / "kserve-venv" / "bin" / "python"

ELEMENTS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip
EXAMPLES: dict[str, Any] = {
    "BOOL": np.array([True, False]), "UINT8": np.array([0, 255], np.uint8), "UINT16": np.array([0, 65535], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32), "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "INT8": np.array([-128, 127], np.int8), "INT16": np.array([-(2**15), 2**15 - 1], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32), "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "FP16": np.array([0.1, np.nan, np.inf, -65504], np.float16), "FP32": np.array([0.1, np.nan, -np.inf], np.float32),
    "FP64": np.array([0.1, np.nan, np.inf, 5e-324]), "BYTES": np.array(["déjà", "", "日本語", 'a"b\\\n'], object),
    "BF16": np.array([1.5, np.nan, -np.inf], ml_dtypes.bfloat16),
}  # fmt: skip


@pytest.fixture(scope="module")
def identities(api: Api) -> dict[str, str]:
    """For each datatype a model that gives its input back."""
    for datatype, element in {**ELEMENTS, "BF16": TensorProto.BFLOAT16}.items():
        api.load(value_graphs.cast(element, element), f"identity-{datatype.lower()}")
    return {datatype: f"identity-{datatype.lower()}" for datatype in EXAMPLES}


@pytest.fixture
def client(api: Api) -> Iterator[Any]:
    made = triton.InferenceServerClient(api.stack.http_url.removeprefix("http://"))
    yield made
    made.close()


def plain(array: np.ndarray) -> list[Any]:
    return [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]


#: Triton's client itself sends two datatypes as binary only.
WAYS = [(name, binary) for name in EXAMPLES for binary in (True, False) if binary or name not in ("FP16", "BF16")]


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "json out"])
@pytest.mark.parametrize("shape", [(-1,), (0,)], ids=["elements", "no elements"])
@pytest.mark.parametrize(("datatype", "binary_in"), WAYS)
def test_triton_sends_and_gets_every_datatype(
    client: Any, identities: dict[str, str], datatype: str, shape: tuple[int, ...], binary_in: bool, binary_out: bool
) -> None:
    array = EXAMPLES[datatype] if shape == (-1,) else EXAMPLES[datatype][:0]
    given = triton.InferInput("x", list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary_in)
    asked = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    answer = client.infer(identities[datatype], [given], outputs=asked, request_id="mine")
    assert answer.get_response()["id"] == "mine"
    assert answer.get_output("y")["datatype"] == datatype
    back = answer.as_numpy("y")
    assert back.shape == array.shape
    if datatype == "BYTES":
        assert plain(back) == array.tolist()
    else:
        assert np.array_equal(np.float64(back), np.float64(array), equal_nan=True)
        assert back.dtype == array.dtype


def test_kserves_client_goes_round(api: Api, identities: dict[str, str]) -> None:
    assert KSERVE.exists(), "KServe's client is not installed: make kserve"
    api.load(graphs.everything(), "several")
    models = {datatype: model for datatype, model in identities.items() if datatype != "BF16"}  # it knows no BF16
    script = REPOSITORY / "tests" / "inference" / "kserve_round.py"
    done = subprocess.run(
        [KSERVE, script, api.stack.http_url, json.dumps(models), "several"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "101 tensors went round" in done.stdout
