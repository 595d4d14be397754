"""Requests on training sessions, as `POST /api/jobs` and direct Celery callers send them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from device_operations.requests.base import Identifier, JobRequest, Name, RelativePath, Request, Sha256, TensorName
from device_operations.requests.layers import MAX_LAYERS, canonical
from device_operations.requests.losses import Loss
from device_operations.requests.optimizers import LearningRate, Optimizer, Steps
from device_operations.requests.schedules import ConstantSchedule, Schedule
from device_operations.tensors import Tensor
from device_operations.wire.json_types import FreeJson

Mode = Literal["train", "gradients", "apply", "evaluate"]
Pattern = Annotated[str, Field(min_length=1, max_length=500)]
Precision = Literal["float32", "bfloat16", "float16"]


class LayersModel(Request):
    """A model described by its layers, which run in order on the input named `input`; the output is `output`."""

    kind: Literal["layers"]
    layers: list[FreeJson] = Field(min_length=1, max_length=MAX_LAYERS)

    @field_validator("layers")
    @classmethod
    def _known_layers(cls, value: list[FreeJson]) -> list[FreeJson]:
        return canonical(value)


class OnnxModel(Request):
    """A model that comes as an ONNX file: a blob, or a path below the model folder; `output` is what the loss is of."""

    kind: Literal["onnx"]
    blob_id: Identifier | None = None
    path: RelativePath | None = None
    sha256: Sha256 | None = None
    output: Name | None = Field(None, description="the output that the loss is taken of; the first where not said")

    @model_validator(mode="after")
    def _exactly_one(self) -> OnnxModel:
        if (self.blob_id is None) == (self.path is None):
            raise ValueError("a model of kind onnx has exactly one of blob_id and path")
        return self


class TorchScriptModel(Request):
    """A program that brings its own code: taken only where TRAINING__TRUST_PROGRAMS says so."""

    kind: Literal["torchscript"]
    blob_id: Identifier
    sha256: Sha256 | None = None


Model = Annotated[LayersModel | OnnxModel | TorchScriptModel, Field(discriminator="kind")]


class Weights(Request):
    """Initial weights: a safetensors blob with one tensor for each parameter and buffer, by its name."""

    blob_id: Identifier
    sha256: Sha256 | None = None


class Lora(Request):
    """Low-rank adapters on linear layers: the base weights stay, `rank` columns and rows in addition are trained.

    `targets` are name patterns (`fc*`, `block.*.query`) of linear layers; all of them where not given.
    """

    rank: int = Field(ge=1, le=65_536, strict=True)
    alpha: float | None = Field(
        None, gt=0, strict=True, description="adapters are scaled by alpha / rank; rank if not said"
    )
    targets: list[Pattern] | None = Field(None, min_length=1, max_length=1000)


class Initialize(JobRequest):
    """Makes a training session: model, loss, optimizer and how to go on with both."""

    device_id: Name | None = None
    model: Model
    weights: Weights | None = None
    loss: Loss
    optimizer: Optimizer
    schedule: Schedule = Field(default_factory=ConstantSchedule)
    seed: int = Field(0, ge=0, lt=2**63, strict=True, description="of the initial weights, dropout and shuffling")
    trainable: list[Pattern] | None = Field(None, min_length=1, max_length=1000)
    frozen_statistics: bool = Field(
        False, strict=True, description="batch normalization uses its running statistics and leaves them as they are"
    )
    lora: Lora | None = None
    precision: Precision = Field(
        "float32", description="what torch's autocast computes products in; parameters are float32 with each"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite: the step fails, or its batch is passed over"
    )
    deterministic: bool = Field(
        True, strict=True, description="false lets operators in that have no deterministic kernel on the device"
    )
    checkpoint_every_steps: Steps | None = None
    keep_last: int | None = Field(None, ge=1, le=100_000, strict=True, description="automatic checkpoints kept")
    lease_seconds: float | None = Field(None, ge=1, le=365 * 86400)
    resume_from: Identifier | None = Field(None, description="a checkpoint whose state the session starts with")

    @model_validator(mode="after")
    def _weights_come_once(self) -> Initialize:
        if self.resume_from is not None and self.weights is not None:
            raise ValueError("resume_from brings the weights with it: leave weights out")
        return self

    def blob_ids(self) -> list[str]:
        model_blob = getattr(self.model, "blob_id", None)
        return [blob for blob in (model_blob, self.weights and self.weights.blob_id) if blob]


class Dataset(Request):
    """Many batches in one job.

    Either `inputs` and `targets`, or `blob_id` of a safetensors file that holds a tensor for each input by its name,
    and one named `targets`. The first axis counts the samples.
    """

    inputs: dict[TensorName, Tensor] | None = Field(None, min_length=1, max_length=1000)
    targets: Tensor | None = None
    blob_id: Identifier | None = None
    batch_size: int = Field(ge=1, le=2**31, strict=True)
    steps: Steps | None = None
    epochs: Steps | None = None
    shuffle: bool = Field(True, strict=True)
    drop_last: bool = Field(False, strict=True, description="leave out the last batch of an epoch where it is smaller")
    grad_accumulation: int | None = Field(
        None, ge=1, le=2**31, strict=True, description="mode train: one update from the gradients of so many batches"
    )

    @model_validator(mode="after")
    def _one_source_one_length(self) -> Dataset:
        if self.blob_id is not None:
            if self.inputs is not None or self.targets is not None:
                raise ValueError("a dataset has either blob_id, or inputs and targets")
        elif self.inputs is None or self.targets is None:
            raise ValueError("a dataset needs inputs and targets, or a blob_id")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a dataset needs exactly one of steps and epochs")
        return self


class Step(JobRequest):
    """One step on a batch, or many on a dataset; `apply` takes neither: it uses the accumulated gradients."""

    carries_tensors = True

    session_id: Identifier
    sequence: int | None = Field(None, ge=1, lt=2**63, strict=True)
    mode: Mode = "train"
    inputs: dict[TensorName, Tensor] | None = Field(None, min_length=1, max_length=1000)
    targets: Tensor | None = None
    dataset: Dataset | None = None
    learning_rate: LearningRate | None = None
    gradient_clip_norm: float | None = Field(None, gt=0, strict=True)
    accumulate: bool = Field(True, strict=True, description="mode gradients: false reports them and keeps nothing")
    form: Literal["blob"] | None = Field(None, description="mode gradients: give them back, as a safetensors blob")

    @model_validator(mode="after")
    def _fits_its_mode(self) -> Step:
        batch = self.inputs is not None or self.targets is not None
        if self.mode == "apply":
            if batch or self.dataset is not None:
                raise ValueError("mode apply takes no inputs, targets or dataset: it uses the accumulated gradients")
        elif self.dataset is not None:
            if batch:
                raise ValueError("give either inputs and targets, or a dataset")
        elif self.inputs is None or self.targets is None:
            raise ValueError(f"mode {self.mode} needs inputs and targets, or a dataset")
        if self.mode != "gradients" and (self.form is not None or not self.accumulate):
            raise ValueError("form and accumulate go with mode gradients")
        if self.mode != "train" and self.dataset is not None and self.dataset.grad_accumulation is not None:
            raise ValueError("grad_accumulation goes with mode train")
        if self.form is not None and self.dataset is not None:
            raise ValueError("gradients are given back for one batch, not for a dataset")
        updating = self.learning_rate is not None or self.gradient_clip_norm is not None
        if updating and self.mode in ("gradients", "evaluate"):
            raise ValueError("learning_rate and gradient_clip_norm go with mode train or apply")
        return self

    @property
    def batch_size(self) -> int | None:
        """How many samples a step takes, as far as the request says; None for `apply` and for scalars."""
        if self.dataset is not None:
            return self.dataset.batch_size
        shapes = [tensor.shape for tensor in (self.inputs or {}).values()]
        return shapes[0][0] if shapes and shapes[0] else None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the request names, by `inputs.<name>` and `targets`, a dataset's among them."""
        given = self.dataset or self
        named = {f"inputs.{name}": tensor for name, tensor in (given.inputs or {}).items()}
        return named | ({"targets": given.targets} if given.targets is not None else {})

    def blob_ids(self) -> list[str]:
        blobs = [tensor.blob_id for tensor in self.tensors().values() if tensor.blob_id]
        return blobs + ([self.dataset.blob_id] if self.dataset is not None and self.dataset.blob_id else [])


class Checkpoint(JobRequest):
    """Writes a session's whole state to the blob store; `export` adds the model as a file for inference."""

    session_id: Identifier
    name: Name | None = None
    export: list[Literal["onnx"]] | None = Field(None, max_length=1)
    keep_last: int | None = Field(None, ge=1, le=100_000, strict=True)


class Validate(JobRequest):
    """Runs the model, exported for inference, and compares it with the model under training."""

    carries_tensors = True

    session_id: Identifier | None = None
    checkpoint_id: Identifier | None = None
    inputs: dict[TensorName, Tensor] = Field(min_length=1, max_length=1000)
    targets: Tensor

    @model_validator(mode="after")
    def _exactly_one(self) -> Validate:
        if (self.session_id is None) == (self.checkpoint_id is None):
            raise ValueError("give exactly one of session_id and checkpoint_id")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the request names, by `inputs.<name>` and `targets`."""
        return {f"inputs.{name}": tensor for name, tensor in self.inputs.items()} | {"targets": self.targets}

    def blob_ids(self) -> list[str]:
        return [tensor.blob_id for tensor in self.tensors().values() if tensor.blob_id]


class EndSession(JobRequest):
    """Ends a session and frees its memory; `checkpoint` keeps its state first."""

    session_id: Identifier
    checkpoint: bool = Field(False, strict=True)
