"""Values beyond plain tensors of numbers, in `/api` and `/v2` alike: NaN, sequences, maps, optional inputs, bfloat16."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import celery
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.inference import graphs
from tests.inference.conftest import Api
from tests.support import value_graphs

WORDS = ["NaN", "Infinity", "-Infinity"]
X = np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)
#: The same as JSON has it, with bare words and with strings.
BARE, QUOTED = "[NaN, Infinity, -Infinity, 1]", '["NaN", "Infinity", "-Infinity", 1]'


@pytest.fixture
def client(api: Api) -> Iterator[Any]:
    made = triton.InferenceServerClient(api.stack.http_url.removeprefix("http://"))
    yield made
    made.close()


def given(name: str, array: np.ndarray, datatype: str, *, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def texts(*values: Any) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = [json.dumps(value) for value in values]
    return array


def values(answer: Any, name: str) -> list[Any]:
    """The JSON values of a BYTES output."""
    return [json.loads(text) for text in answer.as_numpy(name).reshape(-1)]


# ---- NaN and infinities


@pytest.mark.parametrize("elements", [BARE, QUOTED, f"[{BARE}]"])
def test_nan_and_infinities_are_taken_by_v2(api: Api, elements: str) -> None:
    api.load(graphs.affine(), "nan")
    body = f'{{"inputs": [{{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": {elements}}}]}}'
    answer = api.http.post("/v2/models/nan/infer", content=body)
    assert answer.status_code == 200, answer.text
    # Given in the form in which it was sent: bare words are no strict JSON, and strings any client can read.
    told = answer.json()["outputs"][0]["data"]
    assert told == [*WORDS, 3] if elements == QUOTED else all(type(number) is float for number in told)
    assert np.array_equal(np.float32(told), (X * 2 + 1)[0], equal_nan=True)


def test_nan_that_was_not_sent_is_given_as_strings(api: Api) -> None:
    logarithm = graphs.build([graphs.node("Log", "x", "y")], [("x", graphs.FLOAT, ["n"])], [("y", graphs.FLOAT, ["n"])])
    api.load(logarithm, "log")
    body = {"inputs": [{"name": "x", "shape": [3], "datatype": "FP32", "data": [-1, 0, 1]}]}
    answer = api.http.post("/v2/models/log/infer", json=body)
    assert answer.json()["outputs"][0]["data"] == ["NaN", "-Infinity", 0]


@pytest.mark.parametrize("elements", [BARE, QUOTED, f"[{BARE}]"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_infinities_are_taken_and_given_by_api(api: Api, elements: str, dtype: str) -> None:
    kind = graphs.build(
        [graphs.node("Identity", "x", "y")],
        [("x", {"float16": 10, "float32": 1, "float64": 11}[dtype], ["n", 4])],
        [("y", {"float16": 10, "float32": 1, "float64": 11}[dtype], ["n", 4])],
    )
    model_id = api.load(kind)["model_id"]
    tensor = f'{{"dtype": "{dtype}", "shape": [1, 4], "data": {elements}}}'
    for form in ("auto", "data"):
        body = f'{{"model_id": "{model_id}", "form": "{form}", "inputs": {{"x": {tensor}}}}}'
        job = api.http.post("/api/inference/run", content=body, headers={"Prefer": "wait=30"}).json()
        assert job["state"] == "succeeded", job["error"]
        output = job["result"]["outputs"]["y"]
        assert output["data"] == [*WORDS, 1]
        assert np.array_equal(api.as_array(output), X.astype(dtype), equal_nan=True)
        # As it stands in the record, which strict parsers read.
        kept = json.loads(
            api.http.get(f"/api/jobs/{job['job_id']}").content,
            parse_constant=lambda word: pytest.fail(f"{word} stands bare"),
        )
        assert kept["result"]["outputs"]["y"] == output


@pytest.mark.parametrize("size", [4, 40_000], ids=["in the row", "as a blob"])
def test_nan_goes_the_way_of_all_elements(api: Api, size: int) -> None:
    model_id = api.load(graphs.wide(size))["model_id"]
    data = ["NaN", *[1] * (size - 1)]
    job = api.run(model_id, {"x": {"dtype": "float32", "shape": [1, size], "data": data}})
    assert job["state"] == "succeeded", job["error"]
    got = api.arrays(job)["y"]
    assert np.isnan(got[0, 0])
    assert (got[0, 1:] == 2).all()


@pytest.mark.parametrize(
    ("dtype", "element"),
    [("int64", "NaN"), ("bool", "NaN"), ("string", "NaN"), ("float32", "nan"), ("float32", "-NaN"), ("int32", '"NaN"'),
     ("float32", '"inf"'), ("float32", "1e999"), ("float32", '"1"'), ("float32", "+Infinity")],
)  # fmt: skip
def test_only_these_words_and_only_among_floats(api: Api, dtype: str, element: str) -> None:
    model_id = api.load(graphs.affine())["model_id"]
    tensor = f'{{"dtype": "{dtype}", "shape": [1], "data": [{element}]}}'
    body = f'{{"model_id": "{model_id}", "inputs": {{"x": {tensor}}}}}'
    assert api.http.post("/api/inference/run", content=body).status_code in (400, 422)
    name = {"int64": "INT64", "bool": "BOOL", "string": "BYTES", "float32": "FP32", "int32": "INT32"}[dtype]
    api.load(graphs.affine(), "nan")
    body = f'{{"inputs": [{{"name": "x", "shape": [1], "datatype": "{name}", "data": [{element}]}}]}}'
    answer = api.http.post("/v2/models/nan/infer", content=body)
    assert answer.status_code in (400, 422)
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "a", "source": {"path": "x"}, "options": {"max_delay_ms": NaN}}',
        '{"name": NaN, "source": {"path": "x"}}',
        '{"name": "a", "source": {"path": "x"}, "job": {"labels": {"a": Infinity}}}',
        '{"name": "a", "source": {"path": "x"}, "job": {"timeout_seconds": Infinity}}',
        "NaN",
        "[NaN]",
    ],
)
def test_nan_stands_nowhere_else(api: Api, body: str) -> None:
    answer = api.http.post("/api/inference/load-model", content=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "malformed_request"


def test_a_direct_message_may_hold_nan_as_python_writes_it(api: Api) -> None:
    api.load(graphs.affine(), "nan")
    url = api.stack.redis_url
    app = celery.Celery(broker=url, backend=url)
    tensor = {"dtype": "float32", "shape": [1, 4], "data": [float("nan"), float("inf"), float("-inf"), 1.0]}
    run = app.send_task(
        "device_operations.inference.run",
        queue=f"device.{api.stack.device_ids[0]}",
        ignore_result=False,
        kwargs={"request": {"model_name": "nan", "inputs": {"x": tensor}}},
    )
    assert run.get(timeout=30)["outputs"]["y"]["data"] == [*WORDS, 3]
    assert api.job(run.id)["state"] == "succeeded"


# ---- what is no tensor


def classifier() -> tuple[bytes, Any, np.ndarray]:
    """A classifier of scikit-learn, converted with nothing said, and rows for it."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    rows, labels = load_iris(return_X_y=True)
    rows = rows.astype(np.float32)
    fitted = LogisticRegression(max_iter=500).fit(rows, labels)
    return to_onnx(fitted, rows[:1]).SerializeToString(), fitted, rows[::30]


def test_a_classifiers_probabilities_come_as_json(api: Api, client: Any) -> None:
    graph, fitted, rows = classifier()
    loaded = api.load(graph, "iris")
    assert loaded["not_offered"] == []
    assert loaded["batching"]["enabled"] is False
    model = api.model(loaded["model_id"])
    assert model["not_offered"] == []
    (label, probability) = model["outputs"]
    assert label["dtype"] == "int64"
    assert probability == {
        "name": "output_probability", "dtype": "json", "shape": [None], "type": "seq(map(int64,tensor(float)))",
    }  # fmt: skip
    wanted = fitted.predict_proba(rows)

    output = api.run(loaded["model_id"], {"X": rows})["result"]["outputs"]["output_probability"]
    assert (output["dtype"], output["shape"]) == ("json", [len(rows)])
    assert np.allclose([[row[key] for key in "012"] for row in output["data"]], wanted, atol=1e-5)

    (_, described) = client.get_model_metadata("iris")["outputs"]
    assert (described["datatype"], described["shape"]) == ("BYTES", [-1])
    for binary in (True, False):
        asked = [triton.InferRequestedOutput("output_probability", binary_data=binary)]
        answer = client.infer("iris", [given("X", rows, "FP32")], outputs=asked)
        told = values(answer, "output_probability")
        assert np.allclose([[row[key] for key in "012"] for row in told], wanted, atol=1e-5)
    answer = client.infer("iris", [given("X", rows, "FP32")])
    assert answer.as_numpy("output_label").tolist() == fitted.predict(rows).tolist()


def test_many_rows_of_json_are_a_blob(api: Api) -> None:
    graph, fitted, _ = classifier()
    model_id = api.load(graph, "iris")["model_id"]
    rows = np.tile(np.float32([[5, 3, 1, 0.2]]), (2000, 1))
    output = api.run(model_id, {"X": rows})["result"]["outputs"]["output_probability"]
    raw = api.http.get(f"/api/blobs/{output['blob_id']}").content
    length = int.from_bytes(raw[:4], "little")
    first = json.loads(raw[4 : 4 + length])
    assert np.allclose([first[key] for key in "012"], fitted.predict_proba(rows[:1])[0], atol=1e-5)


def test_sequences_go_in_and_out(api: Api, client: Any) -> None:
    loaded = api.load(value_graphs.sequence_alone(), "sequence")
    sent = [[1.5, "NaN"], [[2]], [], 3]
    tensor = {"dtype": "json", "shape": [4], "data": sent}
    outputs = api.run(loaded["model_id"], {"s": tensor})["result"]["outputs"]
    assert outputs["same"] == {"dtype": "json", "shape": [4], "data": sent}
    assert outputs["length"]["data"] == [4]

    for binary in (True, False):
        answer = client.infer(
            "sequence", [given("s", texts([1.5, float("nan")], [[2]], [], 3), "BYTES", binary=binary)]
        )
        first, *others = values(answer, "same")
        assert first[0] == 1.5 and np.isnan(first[1])
        assert others == [[[2]], [], 3]
    assert values(client.infer("sequence", [given("s", texts(), "BYTES")]), "same") == []
    with pytest.raises(InferenceServerException, match="element 1"):
        client.infer("sequence", [given("s", texts([1], ["a"]), "BYTES")])


def test_runs_with_sequences_are_not_joined(api: Api) -> None:
    graph = value_graphs.graph(
        [value_graphs.node("Identity", "s", "same")], [value_graphs.sequence("s")], [value_graphs.sequence("same")]
    )
    loaded = api.load(graph, options={"max_batch_size": 8, "max_delay_ms": 100})
    assert loaded["batching"]["enabled"] is False
    sent = [{"s": {"dtype": "json", "shape": [1], "data": [k]}} for k in range(3)]
    jobs = [api.run(loaded["model_id"], inputs, wait=0) for inputs in sent]
    assert [api.job(job["job_id"])["result"]["outputs"]["same"]["data"] for job in jobs] == [[0], [1], [2]]


def test_many_elements_of_a_sequence_go_in(api: Api) -> None:
    loaded = api.load(value_graphs.sequence_alone(), "sequence")
    sent = [[float(n)] * 10 for n in range(3000)]
    job = api.run(loaded["model_id"], {"s": {"dtype": "json", "shape": [3000], "data": sent}}, outputs=["length"])
    assert job["result"]["outputs"]["length"]["data"] == [3000]


@pytest.mark.parametrize("shape", [[1, 1], [2], []])
def test_json_has_one_side_its_number(api: Api, shape: list[int]) -> None:
    model_id = api.load(value_graphs.sequence_alone(), "sequence")["model_id"]
    body = {"model_id": model_id, "inputs": {"s": {"dtype": "json", "shape": shape, "data": [[1]]}}}
    assert api.post("/api/inference/run", body).status_code == 422


def test_a_map_goes_in(api: Api, client: Any) -> None:
    api.load(value_graphs.of_a_map(), "map")
    assert client.get_model_metadata("map")["inputs"] == [
        {
            "name": "m",
            "datatype": "BYTES",
            "shape": [1],
            "parameters": {"dtype": "map(string,tensor(float))"},
        }
    ]
    answer = client.infer("map", [given("m", texts({"b": 2.5}), "BYTES")])
    assert answer.as_numpy("y").tolist() == [[0, 2.5]]


def test_a_session_keeps_tensors_only(api: Api) -> None:
    model_id = api.load(value_graphs.sequence_alone(), "sequence")["model_id"]
    answer = api.post("/api/inference/sessions", {"model_id": model_id, "state": {"same": "s"}})
    assert answer.status_code == 422
    assert "only tensors" in answer.json()["detail"]


# ---- what may be left out


def test_an_optional_tensor_may_be_left_out_and_may_not_come(api: Api, client: Any) -> None:
    loaded = api.load(value_graphs.of_an_optional(), "optional")
    (described,) = client.get_model_metadata("optional")["inputs"]
    assert described["parameters"] == {"optional": True}
    without = client.infer("optional", [])
    assert [output["name"] for output in without.get_response()["outputs"]] == ["there"]
    assert without.as_numpy("there").tolist() is False
    answer = client.infer("optional", [given("x", np.float32([1, 2]), "FP32")])
    assert answer.as_numpy("same").tolist() == [1, 2]
    assert api.run(loaded["model_id"], {})["result"]["outputs"]["same"] is None


def test_an_initializer_that_is_an_input_is_overridden(api: Api, client: Any) -> None:
    loaded = api.load(value_graphs.with_default(), "with-default")
    assert loaded["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["n", 4]},
        {"name": "w", "dtype": "float32", "shape": [4], "optional": True},
    ]
    assert [one.get("optional") for one in client.get_model_config("with-default")["input"]] == [None, True]
    x, w = np.ones((1, 4), np.float32), np.full(4, 5, np.float32)
    assert client.infer("with-default", [given("x", x, "FP32")]).as_numpy("y").tolist() == [[1, 2, 3, 4]]
    both = [given("x", x, "FP32"), given("w", w, "FP32")]
    assert client.infer("with-default", both).as_numpy("y").tolist() == [[5, 5, 5, 5]]
    assert api.outputs(loaded["model_id"], {"x": x, "w": w})["y"].tolist() == [[5, 5, 5, 5]]
    assert api.outputs(loaded["model_id"], {"x": x})["y"].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(InferenceServerException, match="'w' has shape"):
        client.infer("with-default", [given("x", x, "FP32"), given("w", w[:3], "FP32")])


def test_runs_with_weights_of_their_own_are_not_joined(api: Api) -> None:
    # Rows of w as many as the batch has: by their shapes alone these runs could be joined.
    w = np.ones((1, 4), np.float32)
    graph = value_graphs.graph(
        [value_graphs.node("Mul", "x w", "y")],
        [value_graphs.tensor("x", shape=["n", 4]), value_graphs.tensor("w", shape=["m", 4])],
        [value_graphs.tensor("y", shape=["n", 4])],
        [value_graphs.numpy_helper.from_array(w, "w")],
    )
    loaded = api.load(graph, options={"max_batch_size": 8, "max_delay_ms": 200})
    jobs = [
        api.run(loaded["model_id"], {"x": np.ones((1, 4), np.float32), "w": np.full((1, 4), k, np.float32)}, wait=0)
        for k in range(4)
    ]
    for k, job in enumerate(jobs):
        ended = api.job(job["job_id"])
        assert api.arrays(ended)["y"].tolist() == [[k] * 4]
        assert ended["result"]["batch_size"] == 1


def test_a_state_that_feeds_an_initializer_begins_with_it(api: Api) -> None:
    graph = value_graphs.graph(
        [value_graphs.node("Add", "x w", "total")],
        [value_graphs.tensor("x", shape=[4]), value_graphs.tensor("w", shape=[4])],
        [value_graphs.tensor("total", shape=[4])],
        [value_graphs.numpy_helper.from_array(np.float32([10, 20, 30, 40]), "w")],
    )
    model_id = api.load(graph)["model_id"]
    session = api.post("/api/inference/sessions", {"model_id": model_id, "state": {"total": "w"}}).json()
    for expected in ([11, 21, 31, 41], [12, 22, 32, 42]):
        got = api.outputs(None, {"x": np.ones(4, np.float32)}, session_id=session["session_id"])["total"]
        assert got.tolist() == expected


# ---- floats that NumPy has not


def test_bfloat16_passes_as_bytes_and_as_numbers(api: Api, client: Any) -> None:
    loaded = api.load(value_graphs.cast(value_graphs.BFLOAT16, value_graphs.FLOAT), "from-bf16")
    api.load(value_graphs.cast(value_graphs.FLOAT, value_graphs.BFLOAT16), "to-bf16")
    assert client.get_model_metadata("from-bf16")["inputs"] == [{"name": "x", "datatype": "BF16", "shape": [-1]}]
    x = np.float32([1.5, -2, np.inf])
    half = x.astype(ml_dtypes.bfloat16)
    assert client.infer("from-bf16", [given("x", half, "BF16")]).as_numpy("y").tolist() == x.tolist()
    for binary in (True, False):
        asked = [triton.InferRequestedOutput("y", binary_data=binary)]
        assert client.infer("to-bf16", [given("x", x, "FP32")], outputs=asked).as_numpy("y").tolist() == x.tolist()
    numbers = {"inputs": [{"name": "x", "shape": [3], "datatype": "BF16", "data": [1.5, -2, "Infinity"]}]}
    told = api.http.post("/v2/models/from-bf16/infer", json=numbers).json()
    assert told["outputs"][0]["data"] == [1.5, -2, "Infinity"]

    raw = base64.b64encode(x.astype(ml_dtypes.bfloat16).tobytes()).decode()
    for tensor in (
        {"dtype": "bfloat16", "shape": [3], "data": [1.5, -2, "Infinity"]},
        {"dtype": "bfloat16", "shape": [3], "base64": raw},
    ):
        assert api.outputs(loaded["model_id"], {"x": tensor})["y"].tolist() == x.tolist()
    model_id = api.model_id("to-bf16")
    output = api.run(model_id, {"x": x})["result"]["outputs"]["y"]
    assert output == {"dtype": "bfloat16", "shape": [3], "data": [1.5, -2, "Infinity"]}
    output = api.run(model_id, {"x": x}, form="base64")["result"]["outputs"]["y"]
    assert output == {"dtype": "bfloat16", "shape": [3], "base64": raw}
    answer = api.post(
        "/api/inference/run",
        {"model_id": loaded["model_id"], "inputs": {"x": {"dtype": "float16", "shape": [1], "data": [1]}}},
    )
    assert answer.status_code == 422


def test_bfloat16_lies_on_the_device(api: Api) -> None:
    model_id = api.load(value_graphs.cast(value_graphs.BFLOAT16, value_graphs.FLOAT))["model_id"]
    made = api.post("/api/memory/allocate", {"shape": [3], "dtype": "bfloat16"}).json()
    allocation_id = made["resource"]["id"]
    assert made["result"]["size_bytes"] == 6
    x = np.float32([1.5, -2, 4]).astype(ml_dtypes.bfloat16)
    api.http.put(f"/api/memory/data/{allocation_id}", content=x.tobytes(), headers={"Prefer": "wait=30"})
    tensor = {"dtype": "bfloat16", "shape": [3], "allocation_id": allocation_id}
    assert api.outputs(model_id, {"x": tensor})["y"].tolist() == [1.5, -2, 4]


def test_floats_of_eight_bits_pass_as_their_bytes(api: Api, client: Any) -> None:
    loaded = api.load(value_graphs.cast(value_graphs.FLOAT8, value_graphs.FLOAT), "from-fp8")
    api.load(value_graphs.cast(value_graphs.FLOAT, value_graphs.FLOAT8), "to-fp8")
    x = np.float32([1.5, -2, 448]).astype(ml_dtypes.float8_e4m3fn)
    (described,) = client.get_model_metadata("from-fp8")["inputs"]
    assert (described["datatype"], described["parameters"]) == ("UINT8", {"dtype": "float8_e4m3fn"})
    for binary in (True, False):
        answer = client.infer("from-fp8", [given("x", x.view(np.uint8), "UINT8", binary=binary)])
        assert answer.as_numpy("y").tolist() == [1.5, -2, 448]
        asked = [triton.InferRequestedOutput("y", binary_data=binary)]
        answer = client.infer("to-fp8", [given("x", x.astype(np.float32), "FP32")], outputs=asked)
        assert answer.as_numpy("y").tobytes() == x.tobytes()
    tensor = {"dtype": "float8_e4m3fn", "shape": [3], "data": [1.5, -2, 448]}
    assert api.outputs(loaded["model_id"], {"x": tensor})["y"].tolist() == [1.5, -2, 448]


def test_what_has_no_form_is_named_with_its_reason(api: Api, client: Any) -> None:
    loaded = api.load(value_graphs.beside(value_graphs.INT4), "beside")
    (lost,) = api.model(loaded["model_id"])["not_offered"]
    assert (lost["name"], lost["side"]) == ("odd", "output")
    assert "tensor(int4)" in lost["reason"]
    assert [one["name"] for one in client.get_model_metadata("beside")["outputs"]] == ["plain"]
    answer = client.infer("beside", [given("x", np.float32([1]), "FP32")])
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["plain"]


def test_training_takes_numpys_dtypes_only(api: Api) -> None:
    layers = [{"type": "linear", "name": "fc", "in_features": 2, "out_features": 1}]
    made = api.post(
        "/api/training/initialize",
        {
            "model": {"kind": "layers", "layers": layers},
            "loss": "mse",
            "optimizer": {"type": "sgd", "learning_rate": 0.1},
        },
    ).json()
    tensor = {"dtype": "bfloat16", "shape": [1, 2], "data": [1, 2]}
    target = {"dtype": "float32", "shape": [1, 1], "data": [1]}
    body = {"session_id": made["resource"]["id"], "inputs": {"input": tensor}, "targets": target}
    answer = api.post("/api/training/step", body)
    assert (answer.status_code, answer.json()["code"]) == (422, "dtype_unsupported")
