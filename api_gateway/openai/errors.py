"""Errors in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, with statuses that its clients know."""

from __future__ import annotations

import orjson
from starlette.responses import Response

from device_operations.errors import OperationError
from device_operations.wire.json_types import FreeJson

#: Codes that OpenAI's clients compare, where the service has others. All the rest are the service's own.
_CODES = {"unauthorized": "invalid_api_key", "rate_limited": "rate_limit_exceeded", "not_found": "unknown_url"}

#: Fields of a pipeline's run that stand for one of OpenAI's.
_FIELDS = {"width": "size", "height": "size", "images": "n", "texts": "input", "tokens": "input"}

#: Statuses that OpenAI's API does not use for a request that does not fit; there it is a 400.
_INVALID = (410, 415, 422)


def answer(error: OperationError, headers: dict[str, str]) -> Response:
    """The error with its status, in OpenAI's form.

    The clients send again after 409 and 5xx unless a header says no: a job that was cancelled is not to run again.
    """
    status = 400 if error.status in _INVALID else error.status
    headers = {**headers, "X-Should-Retry": "true" if error.retryable else "false"}
    body = {
        "message": error.message,
        "type": _type(status),
        "param": _parameter(error),
        "code": _CODES.get(error.code, error.code),
    }
    return Response(orjson.dumps({"error": body}), status, headers, media_type="application/json")


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "requests" if status == 429 else "invalid_request_error"


def _parameter(error: OperationError) -> str | None:
    """The field of the request that the error is about, the first where there are several; None where it names none."""
    if error.code == "model_not_found":
        return "model"
    entries: list[FreeJson] = error.errors or []
    place = [str(part) for part in entries[0].get("loc", ())] if entries else []
    return ".".join(_FIELDS.get(part, part) for part in place if part != "body") or None
