"""Webhooks: signed, retried, and never a way into the inner network."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psycopg2
import pytest

from api_gateway.background.webhooks import pinned
from device_operations.errors import OperationError
from tests.support import graphs
from tests.support.stack import RunningStack, eventually


@contextmanager
def receiver(failures: int) -> Iterator[tuple[str, list[tuple[dict, bytes]]]]:
    """A real server that answers 500 to the first `failures` requests, and keeps all of them."""
    got: list[tuple[dict, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(got) <= failures else 204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_with_webhook(stack: RunningStack, url: str) -> str:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    load = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    stack.client.post("/api/inference/load-model", json=load, headers={"Prefer": "wait=30"}).raise_for_status()
    body = {
        "model_name": "tiny",
        "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))},
        "job": {"webhook_url": url},
    }
    return stack.client.post("/api/inference/run", json=body).json()["job_id"]


def test_the_ended_job_is_posted_signed_and_again_after_a_failure(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(WEBHOOK__SECRET="a-secret-of-the-test", WEBHOOK__ALLOW_PRIVATE="true")
    with receiver(failures=1) as (url, got):
        job_id = run_with_webhook(stack, url)
        eventually(lambda: len(got) == 2, 15)
    for headers, body in got:
        assert json.loads(body)["job_id"] == job_id
        assert json.loads(body)["state"] == "succeeded"
        expected = hmac.new(b"a-secret-of-the-test", body, hashlib.sha256).hexdigest()
        assert headers["X-Signature"] == f"sha256={expected}"


def test_a_private_address_is_not_called_unless_the_operator_allows_it(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack()
    with receiver(failures=0) as (url, got):
        refused = stack.client.post("/api/memory/allocate", json={"size_bytes": 1, "job": {"webhook_url": url}})
        assert refused.status_code == 422
        assert "WEBHOOK__ALLOW_PRIVATE" in refused.json()["detail"]
        # What a name turns into is seen when it is called: once, since such an address stays what it is.
        options = {"webhook_url": "http://example.com/", "delay_seconds": 1}
        body = {"size_bytes": 1, "job": options}
        job_id = stack.client.post("/api/memory/allocate", json=body).json()["job_id"]
        with psycopg2.connect(stack.database_url) as connection, connection.cursor() as cursor:
            cursor.execute("UPDATE jobs SET webhook_url = %s WHERE id = %s", [url, job_id])
        eventually(lambda: "webhook not delivered" in stack.log("gateway"), 15)
        assert stack.log("gateway").count("webhook not delivered") == 1
        assert '"given_up": true' in stack.log("gateway").replace('":true', '": true')
        assert got == []


@pytest.mark.parametrize("address", ["64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "::ffff:10.0.0.1", "fec0::1"])
def test_an_address_within_an_address_is_seen(address: str) -> None:
    with pytest.raises(OperationError, match="not public"):
        pinned(f"http://[{address}]/", allow_private=False)
    assert pinned("http://[64:ff9b::808:808]:81/x", allow_private=False) == (
        "http://[64:ff9b::808:808]:81/x",
        "[64:ff9b::808:808]:81",
    )


@pytest.mark.parametrize(
    "url",
    ["ftp://example.org/", "http://user:word@example.org/", "http://localhost/", "http://169.254.169.254/latest",
     "http://[::1]/", "http://[::ffff:10.0.0.1]/", "http://10.1.2.3/", "http://0.0.0.0/", "http://127.0.0.1:99999/"],
)  # fmt: skip
def test_what_is_not_a_public_web_address_is_refused(url: str) -> None:
    with pytest.raises(OperationError, match="webhook_url"):
        pinned(url, allow_private=False)
