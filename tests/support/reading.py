"""An application that reads bodies as the gateway does, served by the gateway's own protocol, and a client on a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import uvicorn

from api_gateway.fast_path.whole_body import WHOLE_BODY, take_whole
from api_gateway.fast_path.wire import Protocol
from api_gateway.plain_path.application import PlainPath
from api_gateway.plain_path.protocol import PlainProtocol


class Reader:
    """An application that reads bodies as the gateway's inference does, and answers with what it read.

    It says how the body came; with `refuse` in the query it answers before it has read anything, with `hold` once
    `go_on` is set.
    """

    def __init__(self) -> None:
        self.cut_off = 0
        self.go_on = Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        chunks, more = [], scope["query_string"] != b"refuse"
        status = 200 if more else 401
        if more:
            take_whole(scope)
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.cut_off += 1
                return
            chunks.append(message["body"])
            more = message["more_body"]
        whole = scope.pop(WHOLE_BODY, None)
        assert whole is None or not any(chunks)
        body = (b"whole:" if whole is not None else b"pieces:") + bytes(whole or b"".join(chunks))
        if scope["query_string"] == b"hold":
            await asyncio.to_thread(self.go_on.wait, 30)
        head = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def reading(loop: str, protocol: type[Protocol | PlainProtocol] = Protocol) -> Iterator[tuple[Reader, int]]:
    """Such an application served by the gateway's protocol, and its port."""
    app = Reader()
    served = PlainPath(app) if issubclass(protocol, PlainProtocol) else app
    server = uvicorn.Server(uvicorn.Config(served, port=0, http=protocol, loop=loop, log_config=None, lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield app, listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def asked(body: bytes, address: str = "/v2/models/m/infer", more: str = "") -> bytes:
    return f"POST {address} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def answered(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += client.recv(1)
    if got.startswith(b"HTTP/1.1 100"):
        return answered(client)
    length = int(got.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = b""
    while len(body) < length:
        body += client.recv(length - len(body))
    return int(got.split()[1]), body
