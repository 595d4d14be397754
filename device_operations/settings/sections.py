"""The sections of the settings: what `HTTP__`, `QUEUE__` and the other prefixes hold."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from device_operations.settings.names import SECRET


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class HttpSettings(_Section):
    """Where the gateway listens, and how much JSON it takes at once."""

    host: str = Field("127.0.0.1", min_length=1, description="an address or host name to listen on")
    port: int = Field(8000, ge=0, le=65535, description="0 (any free port) to 65535")
    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="largest JSON body in bytes, 1024 or more")
    max_body_bytes_in_flight: int = Field(
        512 * 2**20, ge=2**20, description="bytes of bodies that one gateway holds at once, 1048576 or more"
    )
    max_connections: int = Field(1000, ge=1, description="connections to one gateway at once, 1 or more")
    rate_limit_per_second: float | None = Field(
        None, gt=0, description="submissions of one owner to one gateway, a second; above 0, or null for no limit"
    )
    fast_path: bool = Field(
        True, description="true or false: false serves HTTP without what reaches into uvicorn's insides"
    )


class FlowerSettings(_Section):
    """Where Flower listens, and the password of its one user, `admin`; `up` makes one up where none is set."""

    host: str = Field("127.0.0.1", min_length=1, description="an address or host name to listen on")
    port: int = Field(5555, ge=0, le=65535, description="0 (any free port) to 65535")
    password: str | None = Field(
        None,
        pattern=r"^[^,\s]{8,}$",
        description="8 characters or more, no comma, no space",
        json_schema_extra=SECRET,
        repr=False,
    )


class InferenceSettings(_Section):
    """Limits of inference sessions."""

    max_concurrent_sessions: int = Field(5, ge=1, description="open sessions on one device, 1 or more")
    session_timeout_minutes: float = Field(30, gt=0, description="idle minutes until a session expires, above 0")


class TrainingSettings(_Section):
    """Limits of training, and where checkpoints are spooled."""

    checkpoint_path: Path = Field(Path("checkpoints"), description="a folder")
    max_batch_size: int = Field(32, ge=1, description="rows in one step's batch, 1 or more")
    trust_programs: bool = Field(False, description="true or false: whether TorchScript programs may run")


class QueueSettings(_Section):
    """Limits of what may wait."""

    max_length: int = Field(10_000, ge=1, description="jobs that may wait for one device, 1 or more")


class BlobSettings(_Section):
    """Where big bytes lie. `url` is always set: a folder below the data folder where nothing else is named."""

    url: str | None = Field(
        None,
        pattern=r"^(file|s3|az|gs|memory|https?)://.*$",
        description="a store such as file:///var/lib/blobs or s3://bucket/prefix",
        json_schema_extra=SECRET,
        repr=False,
    )
    max_bytes: int = Field(64 * 2**30, ge=1024, description="largest blob in bytes, 1024 or more")
    ttl_hours: float = Field(24, gt=0, description="hours that an unreferenced blob is kept, above 0")


class WebhookSettings(_Section):
    """How webhooks are signed, and which addresses they may reach."""

    secret: str | None = Field(
        None, min_length=8, description="8 characters or more", json_schema_extra=SECRET, repr=False
    )
    allow_private: bool = Field(False, description="true or false: whether private addresses may be called")


class JobSettings(_Section):
    """How long finished jobs are kept."""

    retention_days: float = Field(7, gt=0, description="days that a finished job is kept, above 0")
