"""A caller's mistake, or malice, costs the caller: every row here once was a 500, a memory that filled, or a wait for all."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import graphs
from tests.support.stack import RunningStack, eventually

KEYS = "alice:key-of-alice-is-long,root:key-of-root-is-long:admin"


def raw(stack: RunningStack, message: bytes, keep: bool = False) -> tuple[int, dict[str, str], bytes]:
    """One request as bytes: the answer's status, headers and body."""
    port = int(stack.http_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.sendall(message)
        got = b""
        while b"\r\n\r\n" not in got:
            piece = client.recv(65_536)
            assert piece, f"closed without an answer: {got!r}"
            got += piece
        head, _, body = got.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        while not message.startswith(b"HEAD") and len(body) < int(headers.get("content-length", "0")):
            body += client.recv(65_536)
        if keep:
            # The connection is there for the next request.
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    return int(lines[0].split()[1]), headers, body


def request(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    lines = {
        "Host": "localhost",
        "Content-Length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items())])
    return head.encode("latin-1") + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def model(stack: RunningStack) -> str:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    load = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    stack.client.post("/api/inference/load-model", json=load, headers={"Prefer": "wait=30"}).raise_for_status()
    return "tiny"


@pytest.fixture(scope="module")
def blob(stack: RunningStack) -> str:
    return str(stack.client.post("/api/blobs", content=b"0123456789").json()["blob_id"])


def test_nul_in_any_path_or_query_value_is_refused(stack: RunningStack) -> None:
    document = stack.client.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
            queries = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
            targets = [path.replace("{" + name + "}", "a%00b") for name in names]
            targets += [f"{path}?{name}=a%00b" for name in queries]
            for target in targets:
                target = target.replace("{", "").replace("}", "")
                status, headers, body = raw(stack, request(method.upper(), target, b"{}"), keep=True)
                assert status == 400, (target, status, body)
                assert "json" in headers["content-type"]
                tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("bytes=0-" + "9" * 5000, 200),
        ("bytes=" + "9" * 5000 + "-", 416),
        ("bytes=-" + "9" * 5000, 200),
        ("bytes=2-" + "9" * 30, 206),
        ("bytes=\xb2-", 200),
        ("bytes=20-30", 416),
        ("bytes=5-2", 416),
        ("bytes=-0", 416),
    ],
)
def test_a_range_of_any_number_of_digits(stack: RunningStack, blob: str, value: str, status: int) -> None:
    got, headers, body = raw(stack, request("GET", f"/api/blobs/{blob}", Range=value), keep=True)
    assert got == status, body
    if status == 206:
        assert (body, headers["content-range"]) == (b"23456789", "bytes 2-9/10")


@pytest.mark.parametrize("path", ["/api/jobs", "/api/memory/allocations"])
@pytest.mark.parametrize(
    "cursor",
    [
        "garbage",
        "AAAA",
        "%FF%FE",
        "9" * 5000,
        "LTU",
        "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk",
        "MjAyNi0xMy00NSBh",
        "QSBi",
        "wrI",
        "\u00b2",
    ],
)
def test_a_cursor_of_garbage(stack: RunningStack, path: str, cursor: str) -> None:
    answer = stack.client.get(path, params={"cursor": cursor})
    assert answer.status_code == 422, answer.text
    assert len(answer.text) < 2000


def test_names_of_any_length(stack: RunningStack) -> None:
    long = "n" * 900
    tensor = {"dtype": "float32", "shape": [1], "data": [1.0]}
    for method, path, body, allowed in (
        ("POST", f"/v2/repository/models/{long}/load", {}, {404}),
        ("POST", f"/v2/repository/models/{long}/unload", {}, {404}),
        ("GET", f"/v2/models/{long}/versions/{long}", None, {404}),
        ("POST", f"/v2/models/{long}/infer", {"inputs": []}, {404}),
        ("GET", f"/api/jobs/{long}", None, {404}),
        ("GET", f"/api/devices/{long}", None, {404}),
        ("GET", f"/api/blobs/{long}", None, {404}),
        ("GET", f"/static/{long}", None, {404}),
        ("DELETE", f"/api/memory/deallocate/{long}", None, {422}),
        ("GET", f"/api/training/status/{long}", None, {404}),
        ("POST", "/api/inference/load-model", {"name": "a", "source": {"path": long}}, {422}),
        ("POST", "/api/inference/load-model", {"name": "a", "source": {"path": "/".join(["ü" * 120] * 8)}}, {422}),
        ("POST", "/api/inference/load-model", {"name": long, "source": {"path": "a"}}, {422}),
        ("POST", "/api/inference/load-model", {"name": "a", "version": "9" * 900, "source": {"path": "a"}}, {422}),
        ("POST", "/api/inference/run", {"model_name": long, "inputs": {}}, {422}),
        ("POST", "/api/inference/run", {"model_name": "a", "inputs": {"x" * 2000: tensor}}, {422}),
        ("POST", "/api/memory/allocate", {"size_bytes": 1, "job": {"owner": long}}, {422}),
        ("POST", "/api/memory/allocate", {"size_bytes": 1, "job": {"labels": {long: ""}}}, {422}),
        ("POST", "/api/memory/allocate", {"size_bytes": 1, "job": {"labels": {"": ""}}}, {422}),
        ("POST", "/api/memory/allocate", {"size_bytes": 1, "job": {"labels": {"a": "v" * 1025}}}, {422}),
        ("POST", "/api/memory/allocate", {"size_bytes": 1, "job": {"labels": {str(n): "" for n in range(65)}}}, {422}),
        ("POST", "/api/jobs", {"jobs": [{"kind": long, "request": {}}]}, {422}),
    ):
        answer = stack.client.request(method, path, json=body)
        assert answer.status_code in allowed, (path[:60], answer.status_code, answer.text[:300])
    key = {"Idempotency-Key": "k" * 256}
    assert stack.client.post("/api/memory/allocate", json={"size_bytes": 1}, headers=key).status_code == 400
    labels = {"k" * 255: "v" * 1024} | {str(number): "" for number in range(63)}
    kept = stack.client.post("/api/memory/allocate", json={"size_bytes": 1, "job": {"labels": labels}})
    assert kept.json()["labels"] == labels


def test_numbers_in_headers_are_digits_and_few(stack: RunningStack, model: str) -> None:
    for value in ("\xb2", "9" * 5000, "-1", "1_0", "+5", "1e3", " "):
        got, _, body = raw(
            stack, request("POST", "/v2/models/tiny/infer", b"{}", Inference_Header_Content_Length=value), keep=True
        )
        assert got == 400, (value, body)
    for value in ("\xb2", "9" * 5000, "99999999999999999999"):
        message = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + value.encode(
            "latin-1"
        )
        got, headers, _ = raw(stack, message + b"\r\n\r\n")
        assert got in (400, 413)
        assert headers["connection"] == "close"
    for value in ("wait=" + "9" * 5000, "wait=\xb2", "wait=-1", "wait=nan", "wait=1e999"):
        got, _, body = raw(
            stack, request("POST", "/api/memory/allocate", b'{"size_bytes": 1}', Prefer=value), keep=True
        )
        assert got in (200, 202), (value, body)
    for query in ("limit=" + "9" * 5000, "limit=%C2%B2", "limit=9223372036854775808", "limit=1e9"):
        assert stack.client.get(f"/api/jobs?{query}").status_code == 422
    for value in ("9223372036854775808", "9" * 5000, "%C2%B2", "-1"):
        assert stack.client.get(f"/api/memory/data/x?offset={value}").status_code == 422
        assert stack.client.get(f"/api/training/status/x?history={value}").status_code == 422
    for value in ("nan", "inf", "1e999", "61", "-1", "9" * 5000):
        assert stack.client.get(f"/api/jobs/x?wait={value}").status_code == 422


BIG = [2**63, 2**64, -(2**63) - 1, 10**30, 1e308, 10**400]


@pytest.mark.parametrize("number", [*BIG, "NaN", "Infinity"])
def test_numbers_in_bodies_beyond_what_can_be_stored(stack: RunningStack, model: str, number: Any) -> None:
    text = number if isinstance(number, str) else json.dumps(number)
    tensor = '{"dtype": "float32", "shape": [%s], "data": []}'
    bodies = [
        ("/api/memory/allocate", '{"size_bytes": %s}'),
        ("/api/memory/allocate", '{"shape": [%s], "dtype": "int8"}'),
        ("/api/memory/allocate", '{"size_bytes": 1, "fill": %s}'),
        ("/api/memory/allocate", '{"size_bytes": 1, "ttl_seconds": %s}'),
        *(
            ("/api/memory/allocate", '{"size_bytes": 1, "job": {"' + name + '": %s}}')
            for name in ("priority", "timeout_seconds", "delay_seconds", "expires_in_seconds", "max_attempts")
        ),
        ("/api/memory/copy", '{"source": {"allocation_id": "a", "offset": %s}, "destination": {"allocation_id": "b"}}'),
        ("/api/memory/clear/a", '{"offset": %s}'),
        ("/api/memory/clear/a", '{"size_bytes": %s}'),
        ("/api/memory/renew/a", '{"ttl_seconds": %s}'),
        ("/api/inference/run", '{"model_name": "tiny", "inputs": {"x": ' + tensor + "}}"),
        ("/api/inference/load-model", '{"name": "a", "source": {"path": "a"}, "options": {"max_batch_size": %s}}'),
        ("/api/inference/load-model", '{"name": "a", "source": {"path": "a"}, "options": {"max_delay_ms": %s}}'),
        (
            "/api/inference/load-model",
            '{"name": "a", "source": {"path": "a"}, "options": {"free_dimensions": {"n": %s}}}',
        ),
        ("/api/training/step", '{"session_id": "a", "sequence": %s, "mode": "apply"}'),
        ("/api/training/step", '{"session_id": "a", "learning_rate": %s, "mode": "apply"}'),
        ("/api/training/checkpoint", '{"session_id": "a", "keep_last": %s}'),
        (
            "/v2/models/tiny/infer",
            '{"parameters": {"timeout": %s}, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}',
        ),
        ("/v2/models/tiny/infer", '{"parameters": {"priority": %s}, "inputs": []}'),
        ("/v2/models/tiny/infer", '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [%s], "data": []}]}'),
        (
            "/v2/models/tiny/infer",
            '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": %s}}]}',
        ),
    ]
    for path, body in bodies:
        answer = stack.client.post(path, content=body % text, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, body % text[:40], answer.status_code, answer.text[:300])
        assert len(answer.content) < 20_000


@pytest.mark.parametrize(
    "shape", [[0, 2**63 - 1, 2**63 - 1], [2**62, 0], [0, 2**31, 2**31, 2**31], [2**31, 2**31, 2**31]]
)
def test_shapes_whose_sides_overflow(stack: RunningStack, model: str, shape: list[int]) -> None:
    tensor = {"dtype": "float32", "shape": shape, "data": []}
    answer = stack.client.post("/api/inference/run", json={"model_name": "tiny", "inputs": {"x": tensor}})
    assert answer.status_code == 422, answer.text
    entry = {"name": "x", "datatype": "FP32", "shape": shape, "data": []}
    assert stack.client.post("/v2/models/tiny/infer", json={"inputs": [entry]}).status_code == 422
    body = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": 0}} | {}]}).replace('"data": [], ', "")
    headers = {"Inference-Header-Content-Length": str(len(body))}
    assert stack.client.post("/v2/models/tiny/infer", content=body, headers=headers).status_code == 422


@pytest.mark.parametrize(
    "host", ["[::1", "::1]", "[", "[]", "[::1]:99999999", "a:b:c", "[::1%25]", "h" * 5000, "[v1.x]", "\xb2"]
)
def test_a_host_or_origin_that_cannot_be_read(stack: RunningStack, host: str) -> None:
    for name in ("Host", "Origin"):
        value = host if name == "Host" else f"http://{host}"
        got, _, body = raw(stack, request("GET", "/api/jobs?limit=1", **{name: value}), keep=True)
        assert got in ((200, 403) if host.startswith("[::1") and "]" in host else (403,)), (host, body)


def test_text_that_cannot_be_stored_is_refused_at_any_depth(stack: RunningStack, model: str) -> None:
    for body in (
        '{"size_bytes": 1, "label": "a\\u0000b"}',
        '{"size_bytes": 1, "job": {"labels": {"a\\u0000": "b"}}}',
        '{"size_bytes": 1, "job": {"labels": {"a": "\\u0000"}}}',
        '{"size_bytes": 1, "job": {"after": ["\\u0000"]}}',
        '{"size_bytes": 1, "label": "\\ud800"}',
        '{"size_bytes": 1, "label": "\\udc00 \\ud800"}',
        '{"size_bytes": 1, "label": "a\x00b"}',
    ):
        for path, sent in (
            ("/api/memory/allocate", body),
            ("/api/jobs", f'{{"jobs": [{{"kind": "memory.allocate", "request": {body}}}]}}'),
        ):
            answer = stack.client.post(path, content=sent)
            assert answer.status_code in (400, 422), (body, answer.text)
    for entry in ('"name": "\\u0000"', '"name": "x", "datatype": "\\u0000"'):
        body = '{"inputs": [{"shape": [1], ' + entry + ', "data": [1]}], "parameters": {"sequence_id": "\\u0000"}}'
        assert stack.client.post("/v2/models/tiny/infer", content=body).status_code in (400, 422)
    # An escaped backslash before it is text, and so is a whole pair.
    kept = stack.client.post("/api/memory/allocate", content='{"size_bytes": 1, "label": "\\\\u0000 \\ud83d\\ude00"}')
    assert kept.status_code == 202


def test_json_that_nests_deeply_is_refused(stack: RunningStack, model: str) -> None:
    for depth in (70, 200, 500, 1023, 5000, 100_000):
        deep = "[" * depth + "]" * depth
        objects = '{"a":' * depth + "1" + "}" * depth
        for path, body in (
            (
                "/api/inference/run",
                '{"model_name": "tiny", "inputs": {"x": {"dtype": "float32", "shape": [0], "data": %s}}}',
            ),
            ("/api/inference/load-model", '{"name": "a", "source": {"path": "a"}, "options": %s}'),
            ("/api/training/initialize", '{"model": {"kind": "layers", "layers": [{"type": "relu", "x": %s}]}}'),
            ("/api/jobs", '{"jobs": [{"kind": %s, "request": {}}]}'),
            ("/v2/models/tiny/infer", '{"inputs": [{"name": "x", "shape": [0], "datatype": "FP32", "data": %s}]}'),
            ("/v2/repository/models/a/load", '{"parameters": {"config": %s}}'),
        ):
            for value in (deep, objects):
                answer = stack.client.post(path, content=body % value)
                assert 400 <= answer.status_code < 500, (path, depth, answer.text[:300])


def test_webhook_addresses_are_read_at_submission(stack: RunningStack) -> None:
    for url in (
        "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[::127.0.0.1]/", "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:0:10.0.0.1]/", "http://[2001:0:808:808::80ff:fffe]/", "http://[64:ff9b:1::808:808]/",
        "http://[fec0::1]/", "http://[fe80::1]/", "http://[::]/", "http://[::1]/", "http://[ff02::1]/",
        "http://[fd00::1]/", "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f.1/",
        "http://0177.0.0.1/", "http://10.1.2.3/", "http://100.64.0.1/", "http://169.254.169.254/latest", "http://0/",
        "http://192.168.1.1:80/", "http://224.0.0.1/", "http://255.255.255.255/", "http://localhost/",
        "http://LOCALHOST./", "http://a.localhost/", "http://127.0.0.1./",
        "http://[::1", "http://::1]/", "http://", "http:///x", "http://:80/", "http://a:0/", "http://a:99999/",
        "http://a:x/", "ftp://a/", "file:///etc/passwd", "javascript:1", "a", "", "http://u:p@a/", "http://u@a/",
        "http://a b/", "http://a\tb/", "http://a\n/", "http://\u00fc/", "http://a/\u0000", "http://a/" + "a" * 2000,
        "http://[fe80::1%25eth0]/", "http://a\\@b/", "http://[v1.a]/",
    ):  # fmt: skip
        answer = stack.client.post("/api/memory/allocate", json={"size_bytes": 1, "job": {"webhook_url": url}})
        assert answer.status_code == 422, (url, answer.text)
    for url in (
        "https://example.com/x?y=%20",
        "http://example.com:8080",
        "http://[2606:4700::1111]/",
        "http://8.8.8.8/",
    ):
        body = {"size_bytes": 1, "job": {"webhook_url": url, "delay_seconds": 86400}}
        answer = stack.client.post("/api/memory/allocate", json=body)
        assert answer.status_code == 202, (url, answer.text)
        stack.client.delete(f"/api/jobs/{answer.json()['job_id']}")


def test_a_thousand_jobs_after_a_thousand_others_are_bounded(stack: RunningStack) -> None:
    later = {"size_bytes": 1, "job": {"delay_seconds": 600}}
    first = stack.client.post("/api/jobs", json={"jobs": [{"kind": "memory.allocate", "request": later}] * 1000}).json()
    ids = [job["job_id"] for job in first["jobs"]]

    def bulk(after: list[str]) -> tuple[int, float]:
        entry = {"kind": "memory.allocate", "request": {"size_bytes": 1, "job": {"after": after, "delay_seconds": 600}}}
        began = time.monotonic()
        answer = stack.client.post("/api/jobs", json={"jobs": [entry] * 1000})
        return answer.status_code, time.monotonic() - began

    status, seconds = bulk(ids)
    assert status == 422
    assert seconds < 15
    few, seconds_few = bulk(ids[:1])
    most, seconds_most = bulk(ids[:100])
    assert (few, most) == (202, 202)
    # A hundred times as many predecessors, and every one of them written down.
    assert seconds_most < 5 + 10 * seconds_few
    print(f"after 1: {seconds_few:.2f} s, after 100: {seconds_most:.2f} s")


def test_a_body_is_not_read_before_its_caller_is_known(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(API_KEYS=KEYS)
    port = int(stack.http_url.rpartition(":")[2])
    gateway = psutil.Process(stack.process("gateway").pid)
    body = bytes(16 << 20)
    before = gateway.memory_info().rss
    answers: list[bytes] = []

    def send(path: str) -> None:
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            with suppress(OSError):
                client.sendall(
                    request("POST", path, X_API_Key="a-wrong-key").replace(
                        b"Content-Length: 0", b"Content-Length: %d" % len(body)
                    )
                )
                client.sendall(body)
            got = b""
            with suppress(OSError):
                while piece := client.recv(65_536):
                    got += piece
            answers.append(got)

    paths = ["/v2/models/m/infer", "/api/inference/run", "/api/blobs", "/api/jobs"]
    threads = [threading.Thread(target=send, args=(paths[number % 4],)) for number in range(40)]
    for thread in threads:
        thread.start()
    most = before
    while any(thread.is_alive() for thread in threads):
        most = max(most, gateway.memory_info().rss)
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert [answer.split(b" ")[1] for answer in answers] == [b"401"] * 40
    assert all(b"\r\nconnection: close\r\n" in answer.lower() for answer in answers)
    print(f"grew by {(most - before) >> 20} MiB")
    assert most - before < 100 << 20
    assert stack.client.get("/api/jobs").status_code == 200


def test_no_more_bytes_of_bodies_are_held_than_the_limit(start_stack: Callable[..., RunningStack]) -> None:
    """Callers that are known: what does not fit waits at the door, and is taken when there is room."""
    stack = start_stack(HTTP__MAX_BODY_BYTES_IN_FLIGHT=32 << 20)
    port = int(stack.http_url.rpartition(":")[2])
    gateway = psutil.Process(stack.process("gateway").pid)
    before = gateway.memory_info().rss
    clients = []
    for _ in range(30):
        client = socket.create_connection(("127.0.0.1", port), 60)
        head = request("POST", "/v2/models/m/infer").replace(b"Content-Length: 0", b"Content-Length: %d" % (16 << 20))
        client.sendall(head)
        client.settimeout(0.2)
        with suppress(TimeoutError):
            client.sendall(bytes((16 << 20) - 1))
        clients.append(client)
    grown = gateway.memory_info().rss - before
    assert grown < 32 + 60 << 20
    # A small one is not in their way.
    assert stack.client.post("/api/memory/allocate", json={"size_bytes": 1}).status_code == 202
    large = {"size_bytes": 1, "label": "x" * 100_000}
    waiting = stack.client.post("/api/memory/allocate", json=large)
    assert waiting.status_code == 503
    assert waiting.json()["code"] == "overloaded"
    assert int(waiting.headers["Retry-After"]) >= 1
    for client in clients:
        client.close()
    eventually(lambda: stack.client.post("/api/memory/allocate", json=large).status_code == 422)


def test_a_fault_inside_says_that_it_closes(stack: RunningStack) -> None:
    """The one that can be made from outside: a store of blobs that is gone."""
    import shutil

    folder = stack.folder / "data" / "blobs"
    aside = folder.with_name("elsewhere")
    shutil.move(folder, aside)
    folder.write_text("a file, and no folder")
    try:
        got, headers, _ = raw(stack, request("POST", "/api/blobs", b"x" * 10))
    finally:
        folder.unlink()
        shutil.move(aside, folder)
    assert got >= 500
    assert headers["connection"] == "close"


def test_numpy_is_not_asked_for_arrays_of_shapes_that_overflow() -> None:
    from device_operations.tensors import check_shape

    for shape in ([0, 2**63 - 1], [2**60, 2**60]):
        with pytest.raises(ValueError, match="exceeds"):
            check_shape(shape, "float64")
    check_shape([0, 2**59], "float64")
    assert np.zeros((0, 2**59), np.float64).shape == (0, 2**59)
