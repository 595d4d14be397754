"""The client when the other side misbehaves: connections that break, refusals that ask to come back, false bytes."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from device_operations import AsyncClient, Client, OperationError
from device_operations.errors import Overloaded, Unavailable
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, str], bytes]]]]:
    """A server that answers each request in turn as told, and the requests that it was sent; the last goes on."""
    seen: list[tuple[str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            seen.append((f"{self.command} {self.path}", {k.lower(): v for k, v in self.headers.items()}, body))
            answers[min(len(seen), len(answers)) - 1](self)

        def do_GET(self) -> None:
            self.respond()

        do_POST = do_GET  # noqa: N815 - the server's names

        def log_message(self, *_: object) -> None:
            """Nothing: the test looks at `seen`."""

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", seen
        running.shutdown()


def answer(status: int, body: str = "{}", **headers: str) -> Answer:
    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return give


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def problem(status: int, code: str, **headers: str) -> Answer:
    return answer(status, f'{{"code": "{code}", "detail": "as told"}}', **headers)


DEVICES = answer(200, '{"devices": []}')
JOB = answer(
    202,
    '{"job_id": "j", "kind": "memory.clear", "state": "queued", "celery_state": "PENDING", "device_id": "cpu_0", '
    '"queue": "device.cpu_0", "priority": 5, "attempt": 0, "max_attempts": 1, "owner": "default", '
    '"submitted_at": "2026-01-01T00:00:00Z"}',
)


def test_a_read_is_sent_again_when_the_connection_breaks_or_the_service_asks_to_come_back() -> None:
    with server(hang_up, problem(503, "database_unavailable", Retry_After="0"), DEVICES) as (url, seen):
        with Client(url) as client:
            assert client.devices.list() == []
        assert len(seen) == 3


def test_a_submission_sent_again_carries_the_same_key_and_body() -> None:
    with server(hang_up, problem(429, "queue_full", Retry_After="0"), JOB) as (url, seen), Client(url) as client:
        assert client.memory.clear("a").job_id == "j"
        keys = {headers["idempotency-key"] for _, headers, _ in seen}
        assert len(seen) == 3 and len(keys) == 1 and len({body for _, _, body in seen}) == 1
        client.memory.clear("a")
        assert seen[-1][1]["idempotency-key"] not in keys


def test_without_a_key_a_submission_whose_answer_was_lost_is_not_sent_again() -> None:
    with server(hang_up, JOB) as (url, seen), Client(url, idempotency_keys=False) as client:
        with pytest.raises(Unavailable) as caught:
            client.memory.clear("a")
        assert caught.value.code == "gateway_unreachable" and len(seen) == 1
        assert "idempotency-key" not in seen[0][1]


def test_a_refusal_is_raised_by_its_code_and_not_sent_again() -> None:
    with server(problem(422, "out_of_range", Retry_After="0")) as (url, seen), Client(url) as client:
        with pytest.raises(OperationError, match="as told") as caught:
            client.memory.clear("a")
        assert (caught.value.code, caught.value.status, len(seen)) == ("out_of_range", 422, 1)


def test_it_gives_up_after_so_many_tries_and_says_when_to_come_back() -> None:
    with server(problem(429, "queue_full", Retry_After="0")) as (url, seen), Client(url, retries=2) as client:
        with pytest.raises(Overloaded) as caught:
            client.memory.clear("a")
        assert (caught.value.code, caught.value.retry_after_seconds, len(seen)) == ("queue_full", 0, 3)


def test_a_pause_that_is_long_is_left_to_the_caller() -> None:
    with server(problem(503, "device_unavailable", Retry_After="600")) as (url, seen), Client(url) as client:
        with pytest.raises(Unavailable) as caught:
            client.devices.list()
        assert (caught.value.retry_after_seconds, len(seen)) == (600, 1)


def test_answers_that_are_no_problem_documents_still_have_a_code() -> None:
    told = [(404, "not_found"), (502, "gateway_unreachable"), (401, "unauthorized"), (418, "internal_error")]
    for status, code in told:
        with server(answer(status, "<h1>proxy</h1>")) as (url, _), Client(url) as client:
            with pytest.raises(OperationError, match=str(status)) as caught:
                client.devices.list()
            assert caught.value.code == code
    with server(problem(404, "a_code_of_tomorrow")) as (url, _), Client(url) as client:
        with pytest.raises(OperationError, match="as told") as caught:
            client.devices.list()
        assert caught.value.code == "not_found"


def test_nobody_there_is_told_with_the_remedy() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with Client(url, retries=1) as client, pytest.raises(Unavailable, match="is it running"):
            client.devices.list()


def test_a_key_is_sent_and_a_wrong_one_is_told() -> None:
    with server(DEVICES) as (url, seen), Client(url, "secret") as client:
        client.devices.list()
        assert seen[0][1]["authorization"] == "Bearer secret"


def test_a_download_goes_on_where_the_connection_broke(tmp_path: Path) -> None:
    content = b"0123456789" * 1000

    def first_half(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:5000])
        handler.wfile.flush()
        hang_up(handler)

    def the_rest(handler: BaseHTTPRequestHandler) -> None:
        start = int(handler.headers["range"].removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("X-Content-SHA256", hashlib.sha256(content).hexdigest())
        handler.end_headers()
        handler.wfile.write(content[start:])

    with server(first_half, the_rest) as (url, seen), Client(url) as client:
        assert client.blobs.download("b", tmp_path / "file").read_bytes() == content
        assert len(seen) == 2 and "range" not in seen[0][1]
    with server(first_half, the_rest) as (url, _):

        async def fetch() -> Path:
            async with AsyncClient(url) as client:
                return await client.blobs.download("b", tmp_path / "again")

        assert asyncio.run(fetch()).read_bytes() == content


def test_bytes_that_are_not_those_announced_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    false = answer(200, "false", X_Content_SHA256=hashlib.sha256(b"right").hexdigest())
    with server(false) as (url, _), Client(url) as client:
        for ask in (client.blobs.read, lambda name: client.blobs.download(name, tmp_path / "file")):
            with pytest.raises(OperationError) as caught:
                ask("b")
            assert caught.value.code == "checksum_mismatch"
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_arrived_damaged_is_refused() -> None:
    told = answer(201, '{"blob_id": "b", "sha256": "' + "0" * 64 + '", "size_bytes": 5}')
    with server(told) as (url, _), Client(url) as client:
        with pytest.raises(OperationError) as caught:
            client.blobs.upload(b"right")
        assert caught.value.code == "checksum_mismatch"


def test_an_upload_is_sent_again_from_its_beginning(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"from here").hexdigest()
    told = answer(201, f'{{"blob_id": "b", "sha256": "{digest}", "size_bytes": 9}}')
    (tmp_path / "file").write_bytes(b"not this, from here")
    with server(hang_up, told) as (url, seen), Client(url) as client, (tmp_path / "file").open("rb") as file:
        file.seek(10)
        client.blobs.upload(file)
        assert [body for _, _, body in seen] == [b"from here"] * 2


def test_a_wait_and_a_follower_outlive_a_gateway_that_is_killed_and_started(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack()
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    request = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    with Client(stack.http_url) as client, ThreadPoolExecutor() as threads:
        job = client.submit("inference.load_model", request, job={"delay_seconds": 6})
        waiting = threads.submit(client.wait, job, timeout=60)
        events: list[str] = []
        following = threads.submit(lambda: events.extend(event.name for event in client.events(job)))
        eventually(lambda: events)
        stack.kill("gateway")
        stack.start("gateway")
        assert waiting.result(timeout=60).state == "succeeded"
        following.result(timeout=60)
    assert events[-1] == "done" and events.count("state") >= 2
