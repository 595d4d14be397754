"""How a route asks the fast path for a large body in one piece; without the fast path nothing happens."""

from __future__ import annotations

from starlette.types import Scope

#: The key of such a body in the request's scope, a memoryview; it is there once `receive` has given the body's end.
WHOLE_BODY = "device_operations.whole_body"

#: The key of what `take_whole` calls; set by the fast path.
TAKE_WHOLE = "device_operations.take_whole"


def take_whole(scope: Scope) -> None:
    """Lets the rest of a request's body be read past uvicorn, if the body is large and wanted whole.

    For a request whose caller is known: the memory for all of it is taken at once.
    """
    take = scope.pop(TAKE_WHOLE, None)
    if take is not None:
        take()
