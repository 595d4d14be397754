"""A way to PostgreSQL that breaks off where it is told to: after a statement was carried out, before its answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit


class Severing:
    """A TCP proxy before a server. `url` is the server's with the proxy's address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._target = (parts.hostname, parts.port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        port = self._listening.getsockname()[1]
        credentials = parts.netloc.rpartition("@")[0]
        self.url = urlunsplit(parts._replace(netloc=f"{credentials}@127.0.0.1:{port}"))
        self._lock = threading.Lock()
        self._wanted: bytes | None = None
        self.severed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def sever_after(self, statement: str) -> None:
        """The next connection that sends `statement` is closed once the server has answered, before the answer."""
        with self._lock:
            self._wanted = statement.encode()

    def close(self) -> None:
        """Takes no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._target)
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        doomed = threading.Event()
        with client, server:
            up = threading.Thread(target=self._pass, args=(client, server, doomed, True), daemon=True)
            up.start()
            self._pass(server, client, doomed, False)
            up.join()

    def _pass(self, source: socket.socket, sink: socket.socket, doomed: threading.Event, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if up:
                    with self._lock:
                        if self._wanted is not None and self._wanted in data:
                            self._wanted = None
                            doomed.set()
                elif doomed.is_set():
                    self.severed += 1
                    break
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def severing(url: str) -> Iterator[Severing]:
    """One for as long as the block lasts."""
    proxy = Severing(url)
    try:
        yield proxy
    finally:
        proxy.close()
