"""What every request passes before it is routed: its address is text that can be stored, its body has room."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api_gateway import problems
from api_gateway.submission.bodies import ROOM, Bodies, Room
from device_operations.errors import failure
from device_operations.settings import Settings


class Guard:
    """The outermost application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._bodies = Bodies(settings.http.max_body_bytes_in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on, or answers 400."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The server decodes percent-encoded UTF-8 and replaces what is none: no surrogate gets here.
        if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
            refused = failure("malformed_request", "the address holds NUL, which no name or value may")
            await problems.shape(Request(scope), refused)(scope, receive, send)
            return
        room = scope[ROOM] = Room(self._bodies)
        try:
            await self._app(scope, receive, send)
        finally:
            room.close()
