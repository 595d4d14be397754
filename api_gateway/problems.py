"""Errors as RFC 9457 problems: one shape for every refusal, wherever it is raised."""

from __future__ import annotations

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError, DBAPIError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api_gateway import answers
from api_gateway.openai import errors as openai_errors
from device_operations.errors import CODES, OperationError, failure
from tasks.database import unavailable

log = structlog.get_logger(__name__)

PROBLEM = "application/problem+json"

_BY_STATUS = {
    400: "malformed_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    413: "payload_too_large", 415: "unsupported_media_type", 416: "range_not_satisfiable", 422: "validation_failed",
}  # fmt: skip


def answer(error: OperationError, instance: str) -> Response:
    """The problem document of an error."""
    body: dict[str, object] = {
        "type": f"urn:device-operations:problem:{error.code}",
        "title": CODES[error.code].title,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "instance": instance,
    }
    if error.errors:
        body["errors"] = error.errors
    if error.detail:
        body["context"] = error.detail
    headers = _headers(error)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(body, default=str), error.status, headers, media_type=PROBLEM)


def _headers(error: OperationError) -> dict[str, str]:
    """The headers that go with an error in every form."""
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_seconds or 1)
    if error.code == "internal_error":
        # Starlette raises the fault again behind the answer, for which the server closes the connection.
        headers["Connection"] = "close"
    return headers


def install(app: FastAPI) -> None:
    """Makes every way to fail answer with a problem; below /v1 and /v2 their own forms are used instead."""

    @app.exception_handler(OperationError)
    async def _refused(request: Request, error: OperationError) -> Response:
        return shape(request, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [
            {"loc": [str(part) for part in entry["loc"]], "message": entry["msg"], "type": entry["type"]}
            for entry in error.errors()
        ]
        first = problems[0]
        message = f"{'.'.join(first['loc'])}: {first['message']}"
        return shape(request, failure("validation_failed", message, errors=problems))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code = _BY_STATUS.get(error.status_code, "internal_error")
        response = shape(request, failure(code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        allowed = answers.methods_at(request.url.path) if error.status_code == 405 else []
        if allowed:
            response.headers["Allow"] = ", ".join(allowed)
        return response

    @app.exception_handler(DataError)
    async def _out_of_bounds(request: Request, error: DataError) -> Response:
        """The net below every check: the database did not take a value that came from the request."""
        log.error("a value of a request reached the database that it does not take", exc_info=error)
        reason = str(error.orig).strip().partition("\n")[0][:200]
        return shape(request, failure("validation_failed", f"a value in the request cannot be stored: {reason}"))

    @app.exception_handler(DBAPIError)
    async def _database(request: Request, error: DBAPIError) -> Response:
        return unexpected(request, error)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        return unexpected(request, error)


def unexpected(request: Request, error: Exception) -> Response:
    """The answer to a request that failed with an error outside the table: the database is away, or a fault of ours."""
    known = unavailable(error)
    if isinstance(known, OperationError):
        return shape(request, known)
    log.error("request failed", path=request.url.path, exc_info=error)
    return shape(request, failure("internal_error", f"{type(error).__name__} inside the gateway; its log says more"))


def shape(request: Request, error: OperationError) -> Response:
    """The answer to a request that failed with `error`: a problem, or the form of what is spoken below /v1 and /v2."""
    path = request.url.path
    if f"{path}/".startswith("/v1/"):
        return openai_errors.answer(error, _headers(error))
    if path.startswith("/v2"):
        return Response(
            orjson.dumps({"error": error.message}), error.status, _headers(error), media_type="application/json"
        )
    return answer(error, path)
