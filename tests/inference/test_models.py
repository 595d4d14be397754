"""Models: loaded, shared, inspected, unloaded, evicted, brought back."""

from __future__ import annotations

import numpy as np

from tests.inference import graphs
from tests.inference.conftest import Api


def test_a_model_loads_runs_and_tells_what_it_is(api: Api) -> None:
    model = api.load(graphs.affine(), "affine")
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(api.outputs(model["model_id"], {"x": x})["y"], x * 2 + 1)
    assert np.array_equal(api.outputs(None, {"x": x}, model_name="affine")["y"], x * 2 + 1)
    told = api.model(model["model_id"])
    assert told["state"] == "loaded"
    assert told["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 4]}]
    assert told["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["n", 4]}]
    assert told["provider"] == "CPUExecutionProvider"
    assert told["memory_bytes"] > 0
    assert told["load_ms"] > 0
    assert told["batching"]["enabled"]
    assert model["model_id"] in [m["model_id"] for m in api.http.get("/api/inference/models").json()["models"]]
