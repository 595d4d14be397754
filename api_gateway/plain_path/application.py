"""The ASGI side of the plain path: what is known of each request, and the outermost application."""

from __future__ import annotations

from typing import Protocol

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_gateway import limits

#: The key of a request's connection in `scope["state"]`.
CONNECTION = "device_operations.connection"


class Connection(Protocol):
    """The connection that a request came on."""

    def next_exchange(self) -> Exchange:
        """The request that uvicorn hands to the application now."""

    def answered(self, exchange: Exchange) -> None:
        """An answer is complete."""


class Exchange:
    """One request whose head has come, and its answer."""

    def __init__(self, size: int | None) -> None:
        #: The body's size as announced, in bytes; None for a body in chunks.
        self.size = size
        self.is_whole = self.response_started = False
        #: The answer in place of the application's.
        self.refusal: Response | None = None
        self._asgi: tuple[Scope, Receive, Send] | None = None

    def begin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """uvicorn has handed the request to the application."""
        self._asgi = (scope, receive, send)

    @property
    def has_begun(self) -> bool:
        """Whether the application has the request."""
        return self._asgi is not None

    def stays(self) -> bool:
        """Whether the connection may stay after an answer now."""
        return self.is_whole or (self.size is not None and self.size <= limits.DRAINED_BYTES)

    async def refuse(self) -> None:
        """Sends the refusal; uvicorn then gives the application `http.disconnect`, and closes."""
        if self._asgi is not None and self.refusal is not None:
            await self.refusal(*self._asgi)


class PlainPath:
    """The outermost application on this path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on, unless the request was refused while it waited behind others."""
        connection: Connection | None = scope.get("state", {}).pop(CONNECTION, None)
        if connection is None or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = connection.next_exchange()

        async def send_last(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                connection.answered(exchange)

        async def send_unless_refused(message: Message) -> None:
            if exchange.refusal is not None:
                return
            if message["type"] == "http.response.start":
                exchange.response_started = True
                if not exchange.stays():
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send_last(message)

        exchange.begin(scope, receive, send_last)
        if exchange.refusal is not None:
            await exchange.refuse()
            return
        await self._app(scope, receive, send_unless_refused)
