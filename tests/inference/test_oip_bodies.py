"""What bodies of the Open Inference Protocol may look like, and with what the others are refused."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api
from tests.support import value_graphs

URL = "/v2/models/affine/infer"
GOOD = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
X = np.array([[1, 2, 3, 4]], np.float32)
Y = X * 2 + 1

#: Bodies come the same way into the application with and without what reaches into uvicorn's insides.
pytestmark = pytest.mark.parametrize(
    "stack", [{}, {"HTTP__FAST_PATH": False}], indirect=True, ids=["fast", "plain"], scope="module"
)


@pytest.fixture(scope="module", autouse=True)
def _models(api: Api) -> None:
    api.load(graphs.affine(), "affine")
    api.load(graphs.difference(), "two-inputs")
    api.load(value_graphs.with_default(), "with-default")
    api.load(value_graphs.cast(value_graphs.STRING, value_graphs.STRING), "open-text")
    one_text = value_graphs.graph(
        [value_graphs.node("Identity", "x", "y")],
        [value_graphs.tensor("x", value_graphs.STRING, [1])],
        [value_graphs.tensor("y", value_graphs.STRING, [1])],
    )
    api.load(one_text, "one-text")
    open_sides = value_graphs.graph(
        [value_graphs.node("Relu", "x", "y")],
        [value_graphs.tensor("x", value_graphs.FLOAT, ["n", "m"])],
        [value_graphs.tensor("y", value_graphs.FLOAT, ["n", "m"])],
    )
    api.load(open_sides, "open-sides")


@pytest.fixture(autouse=True)
def _the_next_run_succeeds(api: Api) -> Any:
    yield
    assert api.http.post(URL, json={"inputs": [GOOD]}).json()["outputs"][0]["data"] == Y.reshape(-1).tolist()


def raw(api: Api, model: str, body: bytes) -> httpx.Response:
    return api.http.post(f"/v2/models/{model}/infer", content=body, headers={"Inference-Header-Content-Length": "0"})


def parts(answer: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """The JSON of an answer, and the bytes behind it."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.content[:length]), answer.content[length:]


# ---- requests that are nothing but bytes


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_raw_bytes_are_the_only_inputs_elements(api: Api, rows: int) -> None:
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    told, behind = parts(raw(api, "affine", x.tobytes()))
    assert [output["shape"] for output in told["outputs"]] == [[rows, 4]]
    assert np.array_equal(np.frombuffer(behind, np.float32).reshape(rows, 4), x * 2 + 1)


def test_an_optional_input_is_left_out_of_raw_bytes(api: Api) -> None:
    _, behind = parts(raw(api, "with-default", X.tobytes()))
    assert np.frombuffer(behind, np.float32).tolist() == [1, 4, 9, 16]


def test_raw_bytes_of_text_are_one_string(api: Api) -> None:
    text = "déjà\nvu".encode()
    for model in ("one-text", "open-text"):
        told, behind = parts(raw(api, model, text))
        assert told["outputs"][0]["shape"] == [1]
        assert behind == struct.pack("<I", len(text)) + text


@pytest.mark.parametrize(
    ("model", "body", "text"),
    [
        ("affine", bytes(15), "multiples of 16 bytes, 15 came"),
        ("two-inputs", bytes(16), "has 2"),
        ("open-sides", bytes(16), "2 sides open"),
        ("one-text", b"\xff\xfe", "UTF-8"),
    ],
)
def test_raw_bytes_that_leave_the_shape_open_are_refused(api: Api, model: str, body: bytes, text: str) -> None:
    answer = raw(api, model, body)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error"}
    assert text in answer.json()["error"]


# ---- compressed bodies

BODY = json.dumps({"inputs": [GOOD]}).encode()


def bare_deflate(plain: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(plain) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:20]) + gzip.compress(BODY[20:])),
        ("gzip", gzip.compress(b"") + gzip.compress(BODY) + gzip.compress(b"") + bytes(512)),
        ("GZIP", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", bare_deflate(BODY)),
        ("identity", BODY),
    ],
    ids=[
        "gzip",
        "two streams",
        "empty streams and padding",
        "upper case",
        "deflate",
        "deflate without its frame",
        "none",
    ],
)
def test_a_compressed_body_is_taken(api: Api, encoding: str, body: bytes) -> None:
    answer = api.http.post(URL, content=body, headers={"Content-Encoding": encoding})
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == Y.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", BODY, 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(BODY)[:-4], 400),
        ("gzip", gzip.compress(BODY) + b"more", 400),
        ("gzip", gzip.compress(BODY) + gzip.compress(BODY)[:12], 400),
        ("gzip", gzip.compress(b"") * 10_000 + gzip.compress(BODY), 400),
        ("gzip", gzip.compress(bytes(33 << 20)) * 2, 413),
        ("deflate", zlib.compress(BODY) + b"more", 400),
        ("deflate", zlib.compress(BODY)[:-2], 400),
        ("deflate", zlib.compress(bytes(65 << 20)), 413),
        ("br", BODY, 415),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY)), 415),
    ],
    ids=[
        "no gzip",
        "nothing",
        "cut off",
        "more behind",
        "second stream cut off",
        "too many streams",
        "two bombs",
        "more behind deflate",
        "deflate cut off",
        "deflate bomb",
        "another encoding",
        "two encodings",
    ],
)
def test_a_body_that_is_not_what_it_says_is_refused(api: Api, encoding: str, body: bytes, status: int) -> None:
    answer = api.http.post(URL, content=body, headers={"Content-Encoding": encoding})
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}


# ---- fields that are null, absent or wrong


@pytest.mark.parametrize(
    "body",
    [
        {"parameters": None, "inputs": [GOOD]},
        {"inputs": [GOOD], "outputs": None, "id": None},
        {"inputs": [{**GOOD, "parameters": None}]},
        {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": None}]},
        {"inputs": [{**GOOD, "data": [[1, 2, 3, 4]]}]},
    ],
)
def test_a_field_that_is_null_is_as_one_that_is_absent(api: Api, body: dict[str, Any]) -> None:
    answer = api.http.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == Y.reshape(-1).tolist()


def test_null_parameters_load_and_unload_too(api: Api) -> None:
    api.save(graphs.affine(4.0), "null-parameters.onnx")
    for verb in ("load", "unload"):
        answer = api.http.post(f"/v2/repository/models/null-parameters/{verb}", json={"parameters": None})
        assert answer.status_code == 200, answer.text


EMPTY = {"name": "x", "shape": [0, 4], "datatype": "FP32"}


@pytest.mark.parametrize(
    "given",
    [
        {**EMPTY, "data": [], "parameters": {"binary_data_size": 0}},
        {**EMPTY, "parameters": {"binary_data_size": 0}},
        {**EMPTY, "data": []},
        {**EMPTY, "data": None},
        EMPTY,
    ],
)
@pytest.mark.parametrize("binary", [True, False])
def test_an_input_without_elements_is_taken_in_every_form(api: Api, given: dict[str, Any], binary: bool) -> None:
    header = json.dumps({"inputs": [given], "parameters": {"binary_data_output": binary}}).encode()
    answer = api.http.post(URL, content=header, headers={"Inference-Header-Content-Length": str(len(header))})
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    output = json.loads(answer.content[:length])["outputs"][0]
    assert output["shape"] == [0, 4]
    assert length == len(answer.content)
    assert output.get("data", []) == []


def text_input(body: bytes) -> tuple[bytes, dict[str, str]]:
    given = {"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(body)}}
    header = json.dumps({"inputs": [given]}).encode()
    return header + body, {"Inference-Header-Content-Length": str(len(header))}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"\x05\0\0\0ab", "announced with 5 bytes"),
        (b"\xff\xff\xff\xff", "announced with 4294967295 bytes"),
        (b"\x01\0\0", "cut off"),
        (b"", "but 0 were given"),
        (b"\0\0\0\0\0\0\0\0", "but 2 were given"),
        (b"\x01\0\0\0\xff", "UTF-8"),
    ],
)
def test_strings_that_do_not_add_up_are_refused(api: Api, body: bytes, text: str) -> None:
    content, headers = text_input(body)
    answer = api.http.post("/v2/models/one-text/infer", content=content, headers=headers)
    assert answer.status_code == 422
    assert text in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": []}, 422),
        ({"inputs": None}, 400),
        ({"inputs": {}}, 400),
        ({"inputs": [None]}, 400),
        ({"inputs": [GOOD, GOOD]}, 422),
        ({"inputs": [{**GOOD, "name": None}]}, 400),
        ({"inputs": [{**GOOD, "name": 3}]}, 400),
        ({"inputs": [{key: GOOD[key] for key in GOOD if key != "name"}]}, 400),
        ({"inputs": [{**GOOD, "name": "z"}]}, 422),
        ({"inputs": [{**GOOD, "datatype": "fp32"}]}, 422),
        ({"inputs": [{**GOOD, "datatype": None}]}, 422),
        ({"inputs": [{**GOOD, "datatype": "FP64"}]}, 422),
        ({"inputs": [{**GOOD, "datatype": ["FP32"]}]}, 422),
        ({"inputs": [{**GOOD, "shape": [True, 4]}]}, 422),
        ({"inputs": [{**GOOD, "shape": [1.0, 4]}]}, 422),
        ({"inputs": [{**GOOD, "shape": [-1, 4]}]}, 422),
        ({"inputs": [{**GOOD, "shape": 4}]}, 422),
        ({"inputs": [{**GOOD, "shape": [4]}]}, 422),
        ({"inputs": [{**GOOD, "shape": [1] * 33}]}, 422),
        ({"inputs": [{**GOOD, "data": [1, 2, 3]}]}, 422),
        ({"inputs": [{**GOOD, "data": [[1, 2], [3]]}]}, 422),
        ({"inputs": [{**GOOD, "data": [1, 2, None, 4]}]}, 422),
        ({"inputs": [{**GOOD, "data": [1, 2, True, 4]}]}, 422),
        ({"inputs": [{**GOOD, "data": [1, 2, "three", 4]}]}, 422),
        ({"inputs": [{**GOOD, "data": [1, 2, "nan", 4]}]}, 422),
        ({"inputs": [{**GOOD, "data": {}}]}, 422),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 0}}]}, 422),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 16}}]}, 422),
        ({"inputs": [{**GOOD, "data": None, "parameters": {"binary_data_size": True}}]}, 422),
        ({"inputs": [{**GOOD, "data": None, "parameters": {"binary_data_size": -16}}]}, 422),
        ({"inputs": [{**GOOD, "data": None, "parameters": {"binary_data_size": "16"}}]}, 422),
        ({"inputs": [{**GOOD, "data": None, "parameters": []}]}, 400),
        ({"inputs": [GOOD], "parameters": []}, 400),
        ({"inputs": [GOOD], "parameters": "no"}, 400),
        ({"inputs": [GOOD], "outputs": 3}, 400),
        ({"inputs": [GOOD], "outputs": {"name": "y"}}, 400),
        ({"inputs": [GOOD], "outputs": [{"name": "y"}, {"name": "y"}]}, 422),
        ({"inputs": [GOOD], "outputs": [{"name": "w"}]}, 422),
        ({"inputs": [GOOD], "outputs": [{}]}, 400),
        ({"inputs": [GOOD], "id": 3}, 400),
        ([], 400),
        (None, 400),
    ],
)
def test_a_body_that_says_something_else_is_refused(api: Api, body: Any, status: int) -> None:
    answer = api.http.post(URL, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("length", ["-1", "1.5", "x", "100000", str(2**64)])
def test_a_header_length_that_the_body_has_not_is_refused(api: Api, length: str) -> None:
    answer = api.http.post(URL, content=BODY, headers={"Inference-Header-Content-Length": length})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}


def test_bytes_behind_the_last_input_are_refused(api: Api) -> None:
    headers = {"Inference-Header-Content-Length": str(len(BODY))}
    answer = api.http.post(URL, content=BODY + b"more", headers=headers)
    assert answer.status_code == 422
    assert "4 bytes follow" in answer.json()["error"]


# ---- addresses

GETS = [
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/affine", "/v2/models/affine/ready",
    "/v2/models/affine/config", "/v2/models/affine/stats", "/v2/models/stats", "/v2/models/affine/versions/1",
    "/v2/models/affine/versions/1/ready",
]  # fmt: skip


@pytest.mark.parametrize("path", GETS)
def test_a_slash_at_the_end_changes_nothing(api: Api, path: str) -> None:
    plain, slashed = api.http.get(path), api.http.get(f"{path}/")
    assert slashed.status_code == plain.status_code == 200
    assert slashed.json().keys() == plain.json().keys()


def test_a_slash_at_the_end_changes_nothing_for_posts(api: Api) -> None:
    assert api.http.post(f"{URL}/", json={"inputs": [GOOD]}).json()["outputs"][0]["data"] == Y.reshape(-1).tolist()
    assert api.http.post("/v2/repository/index/").status_code == 200
    api.save(graphs.affine(6.0), "slashed.onnx")
    assert api.http.post("/v2/repository/models/slashed/load/").status_code == 200
    assert api.http.post("/v2/repository/models/slashed/unload/").status_code == 200


@pytest.mark.parametrize("path", [*GETS, "/v2/health/ready/", "/v2/models/nobody"])
def test_head_is_get_without_the_body(api: Api, path: str) -> None:
    got, head = api.http.get(path), api.http.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_nothing_follows_the_head_on_its_connection(api: Api) -> None:
    address = urlsplit(api.stack.http_url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(
            b"HEAD /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
            b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        told = b""
        while more := connection.recv(65536):
            told += more
    first, second = told.split(b"HTTP/1.1 200 OK")[1:]
    assert first.endswith(b"\r\n\r\n")
    assert second.endswith(b'{"live":true}')


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/affine/nothing/", 404),
        ("GET", URL, 405),
        ("HEAD", URL, 405),
        ("DELETE", "/v2/health/ready", 405),
        ("POST", "/v2/health/ready", 405),
        ("POST", "/v2/models/nobody/infer", 404),
        ("GET", "/v2/models/nobody/ready", 404),
    ],
)
def test_every_refusal_has_the_protocols_form(api: Api, method: str, path: str, status: int) -> None:
    answer = api.http.request(method, path, json={"inputs": [GOOD]} if method == "POST" else None)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    if method != "HEAD":
        assert set(answer.json()) == {"error"}
        assert isinstance(answer.json()["error"], str)
