"""Requests on models and inference sessions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from device_operations.requests.base import (
    Identifier,
    JobRequest,
    Name,
    RelativePath,
    Request,
    Sha256,
    Side,
    TensorName,
)
from device_operations.tensors import Form, IntoAllocation, Tensor
from device_operations.wire.json_types import FreeJson

#: Files that a model may have, in a folder or as blobs: torch writes the weights of SDXL's UNet into 1,522.
MAX_FILES = 10_000


class ModelSource(Request):
    """Where a model's files are: a path below the model folder, one blob, or blobs by their relative path."""

    path: RelativePath | None = None
    blob_id: Identifier | None = None
    blobs: dict[RelativePath, Identifier] | None = Field(None, min_length=1, max_length=MAX_FILES)

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSource:
        if sum(way is not None for way in (self.path, self.blob_id, self.blobs)) != 1:
            raise ValueError("source has exactly one of path, blob_id and blobs")
        return self


class ModelOptions(Request):
    """How a model is made resident and run."""

    max_batch_size: int | None = Field(None, ge=1, le=65536, strict=True)
    max_delay_ms: float = Field(0, ge=0, le=60_000)
    warmup: bool = False
    free_dimensions: dict[TensorName, Side] = Field(default_factory=dict, max_length=1000)
    graph_optimization: Literal["disable", "basic", "extended", "all", "rewrite"] = "all"
    intra_op_threads: int | None = Field(None, ge=1, le=1024, strict=True)
    low_memory: bool = Field(
        False, strict=True, description="of a pipeline: its parts are loaded one at a time, as a run comes to them"
    )

    def recorded(self) -> FreeJson:
        """The options as they are recorded. What came later than records is left out if it is not set."""
        options = self.model_dump(mode="json")
        if not self.low_memory:
            del options["low_memory"]
        return options


class LoadModel(JobRequest):
    """Makes a model resident on a device."""

    name: Name
    version: Name = "1"
    model_type: Name = "onnx"
    source: ModelSource
    sha256: Sha256 | None = None
    device_id: Name | None = None
    pin: bool = False
    shared: bool | None = Field(
        None, description="whether other owners may run it and read what it is; if not said: what an admin's key loads"
    )
    options: ModelOptions = Field(default_factory=ModelOptions)

    @field_validator("name", "version")
    @classmethod
    def _fits_an_address(cls, value: str) -> str:
        if "/" in value or value in (".", ".."):
            raise ValueError("may not contain '/', nor be '.' or '..'")
        return value

    @field_validator("version", mode="before")
    @classmethod
    def _number_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def blob_ids(self) -> list[str]:
        return [self.source.blob_id] if self.source.blob_id else list((self.source.blobs or {}).values())


class Run(JobRequest):
    """Runs a model once; its outputs are the job's result."""

    carries_tensors = True

    model_id: Identifier | None = None
    model_name: Name | None = None
    session_id: Identifier | None = None
    inputs: dict[TensorName, Tensor] = Field(min_length=0, max_length=1000)
    outputs: list[TensorName] | None = Field(None, min_length=1, max_length=1000)
    form: Form = "auto"
    into: dict[TensorName, IntoAllocation] | None = Field(None, max_length=1000)

    @model_validator(mode="after")
    def _names_a_model(self) -> Run:
        if self.model_id is None and self.model_name is None and self.session_id is None:
            raise ValueError("give model_id, model_name or session_id")
        return self

    def blob_ids(self) -> list[str]:
        return [tensor.blob_id for tensor in self.inputs.values() if tensor.blob_id]


class UnloadModel(JobRequest):
    """Takes a model off its device once its runs are done; `force` cancels them."""

    model_id: Identifier
    force: bool = False
    recycle: bool = False


class OpenSession(Request):
    """A conversation with a model whose state tensors stay on the device: outputs wired to the next run's inputs."""

    model_id: Identifier | None = None
    model_name: Name | None = None
    state: dict[TensorName, TensorName] = Field(
        default_factory=dict, max_length=1000, description="output name: the input that it feeds next"
    )
    initial: dict[TensorName, Tensor] = Field(
        default_factory=dict, max_length=1000, description="the state inputs of the first run"
    )
    owner: Name | None = None

    @model_validator(mode="after")
    def _names_a_model(self) -> OpenSession:
        if self.model_id is None and self.model_name is None:
            raise ValueError("give model_id or model_name")
        stray = set(self.initial) - set(self.state.values())
        if stray:
            raise ValueError(f"initial names inputs that state does not feed: {sorted(stray)}")
        return self


class CloseSession(JobRequest):
    """Closes an inference session and frees its state."""

    session_id: Identifier
