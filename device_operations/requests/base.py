"""What every request has: no unknown fields, no NaN, and the options of the job that carries it out."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from device_operations.errors import failure
from device_operations.requests.addresses import check_webhook_url
from device_operations.wire.ids import job_id
from device_operations.wire.json_types import FreeJson

#: Identifiers that a caller may choose.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
Identifier = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._:-]+$")]
Label = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00]*$")]
JobId = Annotated[str, AfterValidator(job_id)]
LabelName = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]+$")]
LabelValue = Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^\x00]*$")]
#: The name of a tensor, dimension or output in a model's file.
TensorName = Annotated[str, StringConstraints(max_length=1024)]
#: A file's path relative to some folder.
RelativePath = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
#: An http or https URL without user and password.
WebhookUrl = Annotated[str, StringConstraints(max_length=2000), AfterValidator(check_webhook_url)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

#: Offsets and sizes are bytes in a signed 64-bit integer.
MAX_BYTES = 2**63 - 1
#: One side of a tensor's shape; 0 is an empty tensor's.
Side = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Offset = Annotated[int, Field(ge=0, le=MAX_BYTES, strict=True)]
Size = Annotated[int, Field(gt=0, le=MAX_BYTES, strict=True)]

#: Predecessors that one job may name.
MAX_AFTER = 100


class Request(BaseModel):
    """The base of every request: unknown fields are refused, and so are NaN and infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class JobOptions(Request):
    """The optional field `job` of every submission."""

    priority: int = Field(5, ge=0, le=9, strict=True, description="0 (low) to 9 (high)")
    timeout_seconds: float | None = Field(None, gt=0, le=30 * 86400, description="limit on the run itself")
    delay_seconds: float | None = Field(None, gt=0, le=30 * 86400, description="not before this many seconds from now")
    expires_in_seconds: float | None = Field(None, gt=0, le=30 * 86400, description="not started by then: expired")
    max_attempts: int = Field(1, ge=1, le=100, strict=True, description="runs of a job that fails retryably")
    after: list[JobId] = Field(
        default_factory=list, max_length=MAX_AFTER, description="jobs that must end first; at most 100"
    )
    after_success: bool = Field(
        False, strict=True, description="cancelled with predecessor_failed unless all jobs in `after` succeed"
    )
    webhook_url: WebhookUrl | None = None
    owner: Name | None = None
    labels: dict[LabelName, LabelValue] = Field(default_factory=dict, max_length=64)


class JobRequest(Request):
    """A request that becomes a job: its own fields, and `job`."""

    #: Whether requests of this kind bring tensors along, whose elements are stored apart from what is kept to be shown.
    carries_tensors: ClassVar[bool] = False

    #: The field by which a caller may choose the id of what the job makes, so that it is taken once the job succeeded.
    chosen_id: ClassVar[str | None] = None

    job: JobOptions = Field(default_factory=JobOptions)

    def blob_ids(self) -> list[str]:
        """The blobs that this request reads; they are kept at least until the job has ended."""
        return []

    def payload(self) -> FreeJson:
        """The request as it is stored and sent: JSON values, without `job` and without what was not said."""
        return self.model_dump(mode="json", exclude={"job"}, exclude_none=True)


#: Fields named in one error at most: a caller may send any number of unknown ones, with names of any length.
MAX_PROBLEMS = 100


def invalid(error: ValidationError, what: str) -> Exception:
    """`validation_failed` with one entry for each field that does not fit, `MAX_PROBLEMS` at most."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
    problems = [
        {"loc": [str(part)[:100] for part in entry["loc"]], "message": entry["msg"], "type": entry["type"]}
        for entry in found
    ]
    first = problems[0]
    where = ".".join(first["loc"]) or "the body"
    return failure("validation_failed", f"{what}: {where}: {first['message']}", errors=problems)
