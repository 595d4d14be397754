"""Every way in which device-operations says no, as one tree of exceptions.

    OperationError                      code, status, message, retryable, detail
    ├── Refused                         the request is at fault; the same request fails again
    │   ├── NotFound                    404
    │   ├── Conflict                    409
    │   ├── Gone                        410
    │   └── Invalid                     422
    ├── Overloaded                      429, with `retry_after_seconds`
    ├── Unavailable                     503, with `retry_after_seconds`
    └── ExecutionFailed                 a job failed while it ran; and 500, 504, 507

`code` is stable and is what programs compare; `CODES` lists every code once, with its HTTP status, title and whether
the same request may succeed later. Build an error by its code with `failure(code, message)`, and what a failed job
records with `failure(…).as_job_error()`: a test refuses an error that is written as a dictionary by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from device_operations.wire.json_types import FreeJson


@dataclass(frozen=True, slots=True)
class Code:
    """One stable error code: its HTTP status, a short title, and whether trying again can help."""

    status: int
    title: str
    retryable: bool = False


#: Every code. One that only jobs have carries the status of an answer that waited for the job (OIP).
CODES: dict[str, Code] = {
    "malformed_request": Code(400, "The request cannot be read"),
    "request_timeout": Code(408, "The request did not come in time", retryable=True),
    "header_too_large": Code(431, "The request's head is too large"),
    "unauthorized": Code(401, "No valid API key"),
    "forbidden": Code(403, "Not allowed for this owner"),
    "not_found": Code(404, "No such address"),
    "method_not_allowed": Code(405, "This address does not take that method"),
    "job_not_found": Code(404, "No such job"),
    "device_not_found": Code(404, "No such device"),
    "allocation_not_found": Code(404, "No such allocation"),
    "model_not_found": Code(404, "No such model"),
    "session_not_found": Code(404, "No such session"),
    "checkpoint_not_found": Code(404, "No such checkpoint"),
    "blob_not_found": Code(404, "No such blob"),
    "job_finished": Code(409, "The job has already ended"),
    "job_not_finished": Code(409, "The job has not ended yet"),
    "model_in_use": Code(409, "The model is in use"),
    "blob_in_use": Code(409, "The blob is in use"),
    "checkpoint_in_use": Code(409, "The checkpoint is in use"),
    "idempotency_conflict": Code(409, "The key was used with another body"),
    "sequence_conflict": Code(409, "The sequence number was used with another body"),
    "sequence_gap": Code(409, "A sequence number is missing"),
    "device_draining": Code(409, "The device takes no new jobs", retryable=True),
    "allocation_exists": Code(409, "The allocation id is taken"),
    "allocation_lost": Code(410, "The allocation was lost with its worker"),
    "session_expired": Code(410, "The session has expired"),
    "session_closed": Code(410, "The session is closed"),
    "session_lost": Code(410, "The session was lost with its worker"),
    "payload_too_large": Code(413, "The body is too large"),
    "unsupported_media_type": Code(415, "The content type is not supported"),
    "range_not_satisfiable": Code(416, "The range lies outside the blob"),
    "validation_failed": Code(422, "The request does not fit the contract"),
    "allocation_too_large": Code(422, "The allocation exceeds the quota"),
    "out_of_range": Code(422, "The range lies outside the allocation"),
    "batch_too_large": Code(422, "The batch exceeds the limit"),
    "path_not_allowed": Code(422, "The path leaves the model folder"),
    "model_invalid": Code(422, "The model cannot be loaded"),
    "input_mismatch": Code(422, "The inputs do not fit the model"),
    "untrusted_program": Code(422, "Programs are not trusted here"),
    "dtype_unsupported": Code(422, "The device does not support this dtype"),
    "checksum_mismatch": Code(422, "The content does not match its checksum"),
    "queue_full": Code(429, "The queue is full", retryable=True),
    "too_many_sessions": Code(429, "Too many sessions are open", retryable=True),
    "rate_limited": Code(429, "Too many requests", retryable=True),
    "overloaded": Code(503, "The gateway is at its limit", retryable=True),
    "device_unavailable": Code(503, "The device is offline", retryable=True),
    "database_unavailable": Code(503, "The database does not answer", retryable=True),
    "storage_unavailable": Code(503, "The blob store does not answer", retryable=True),
    "storage_full": Code(507, "The blob store or checkpoint folder is full", retryable=True),
    "insufficient_memory": Code(507, "Not enough device memory", retryable=True),
    "worker_lost": Code(503, "The worker died during the job", retryable=True),
    "device_lost": Code(503, "The device was lost during the job", retryable=True),
    "out_of_memory": Code(507, "The device ran out of memory during the job", retryable=True),
    "timeout": Code(504, "The job ran past its time limit"),
    "cancelled": Code(409, "The job was cancelled"),
    "predecessor_failed": Code(409, "A job that this one requires did not succeed"),
    "expired": Code(410, "The job waited past its expiry", retryable=True),
    "poison": Code(500, "The job killed its worker repeatedly"),
    "nonfinite_loss": Code(422, "The loss is not finite"),
    "run_failed": Code(422, "The model failed while it ran"),
    "gateway_unreachable": Code(503, "The gateway does not answer", retryable=True),
    "internal_error": Code(500, "Something failed inside the service"),
}


class OperationError(Exception):
    """A refusal or failure with a stable `code`.

    `message` says what was requested, what is there, and the remedy. `detail`: the same for programs (JSON values).
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        detail: FreeJson | None = None,
        retryable: bool | None = None,
        retry_after_seconds: int | None = None,
        errors: list[FreeJson] | None = None,
    ) -> None:
        # What Celery stores of an exception, and makes it of again on the other side.
        super().__init__(code, message)
        known = CODES[code]
        self.code = code
        self.status = known.status
        self.title = known.title
        self.message = message
        self.retryable = known.retryable if retryable is None else retryable
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.errors = errors

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code!r}, {self.message!r})"

    def as_job_error(self) -> FreeJson:
        """The error as a failed job carries it: `{"code", "message", "retryable", "detail"}`."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable, "detail": self.detail}

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.message, self.detail, self.retryable, self.retry_after_seconds, self.errors))


class Refused(OperationError):
    """Raised when the request itself is at fault."""


class NotFound(Refused):
    """Raised when an id names nothing that the caller may see."""


class Conflict(Refused):
    """Raised when the request contradicts what is already recorded."""


class Gone(Refused):
    """Raised when what the id names existed and is lost, expired or closed."""


class Invalid(Refused):
    """Raised when the request does not fit the contract or the resource it names."""


class Overloaded(OperationError):
    """Raised when a queue, session or rate limit is reached; `retry_after_seconds` says when to come back."""


class Unavailable(OperationError):
    """Raised when a device, the database or the blob store does not answer."""


class ExecutionFailed(OperationError):
    """Raised when a job failed while it ran on a device, and for statuses that no other class has: 500, 504, 507."""


#: The exception class for each HTTP status; any other is `ExecutionFailed`, also where a submission is refused with it.
_CLASSES: dict[int, type[OperationError]] = {
    400: Refused, 401: Refused, 403: Refused, 404: NotFound, 405: Refused, 408: Refused, 409: Conflict, 410: Gone,
    413: Refused, 415: Refused, 416: Invalid, 422: Invalid, 429: Overloaded, 431: Refused, 503: Unavailable,
}  # fmt: skip

#: Codes that only a running job has, with the status that a waiting caller is shown.
_OF_JOBS = {
    "worker_lost", "device_lost", "out_of_memory", "timeout", "cancelled", "expired", "poison", "internal_error",
    "checksum_mismatch", "nonfinite_loss", "predecessor_failed", "run_failed",
}  # fmt: skip


def failure(
    code: str,
    message: str,
    *,
    detail: FreeJson | None = None,
    retryable: bool | None = None,
    retry_after_seconds: int | None = None,
    errors: list[FreeJson] | None = None,
) -> OperationError:
    """The exception for `code`, as the class that the tree above gives it."""
    kind = ExecutionFailed if code in _OF_JOBS else _CLASSES.get(CODES[code].status, ExecutionFailed)
    return kind(
        code, message, detail=detail, retryable=retryable, retry_after_seconds=retry_after_seconds, errors=errors
    )


def error_of(error: FreeJson | None, state: str, what: str) -> FreeJson:
    """The error of a job that ended in `state` without success: `error` as recorded, else one that names `what`."""
    if error:
        return error
    code = state if state in ("cancelled", "expired") else "internal_error"
    return failure(code, f"{what} was {state}, and no error was recorded.").as_job_error()


def from_job_error(error: FreeJson) -> OperationError:
    """The exception for the `error` field of a failed job, so that a client can raise what the worker recorded."""
    code: str = error.get("code", "internal_error")
    message: str = error.get("message", code)
    known = code if code in CODES else "internal_error"
    return failure(known, message, detail=error.get("detail"), retryable=error.get("retryable"))


def _rebuild(
    code: str,
    message: str,
    detail: FreeJson | None,
    retryable: bool,
    retry_after_seconds: int | None,
    errors: list[FreeJson] | None,
) -> OperationError:
    return failure(
        code, message, detail=detail, retryable=retryable, retry_after_seconds=retry_after_seconds, errors=errors
    )
