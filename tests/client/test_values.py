"""The client with values that are no plain tensors of numbers: sequences, optional outputs, long text, bfloat16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from device_operations import Client
from tests.support import value_graphs
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def values(stack: RunningStack) -> RunningStack:
    made = {
        "sequence": value_graphs.sequence_alone(),
        "optional": value_graphs.of_an_optional(),
        "text": value_graphs.cast(value_graphs.STRING, value_graphs.STRING),
        "half": value_graphs.cast(value_graphs.FLOAT, value_graphs.BFLOAT16),
        "whole": value_graphs.cast(value_graphs.BFLOAT16, value_graphs.FLOAT),
    }
    folder = stack.folder / "models"
    folder.mkdir(exist_ok=True)
    with Client(stack.http_url) as client:
        for name, graph in made.items():
            Path(folder / f"{name}.onnx").write_bytes(graph)
            client.result(client.inference.load_model(name, f"{name}.onnx", wait=30))
    return stack


@pytest.mark.parametrize("count", [2, 20_000], ids=["in the result", "as a blob"])
def test_a_sequence_comes_as_a_list(values: RunningStack, count: int) -> None:
    sent = [[1.5, float(number)] for number in range(count)]
    with Client(values.http_url) as client:
        given = {"s": {"dtype": "json", "shape": [count], "data": sent}}
        outputs = client.inference.run(given, model_name="sequence").outputs
    assert outputs["same"] == sent
    assert outputs["length"].tolist() == count


def test_an_optional_output_without_a_value_is_none(values: RunningStack) -> None:
    with Client(values.http_url) as client:
        assert client.inference.run({}, model_name="optional").outputs["same"] is None


@pytest.mark.parametrize("length", [3, 50_000], ids=["in the result", "as a blob"])
def test_text_comes_as_text(values: RunningStack, length: int) -> None:
    sent = np.array(["ä" * length, ""], object)
    with Client(values.http_url) as client:
        assert client.inference.run({"x": sent}, model_name="text").outputs["y"].tolist() == sent.tolist()


@pytest.mark.parametrize("count", [3, 50_000], ids=["in the request", "as a blob"])
def test_bfloat16_goes_and_comes(values: RunningStack, count: int) -> None:
    x = np.resize(np.float32([1.5, -2, np.inf]), count)
    with Client(values.http_url) as client:
        half = client.inference.run({"x": x}, model_name="half").outputs["y"]
        assert half.dtype == ml_dtypes.bfloat16
        assert client.inference.run({"x": half}, model_name="whole").outputs["y"].tolist() == x.tolist()
