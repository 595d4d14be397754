"""Runs of pipelines: what a run gives in place of `inputs`, by the model's type (contract, section 6).

    body without `inputs` ─▶ PipelineRun (known fields only) ─▶ the model is looked up ─▶ RUNS[model_type]

A new type of pipeline is a subclass of `PipelineRun` and an entry in `RUNS`.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from device_operations.errors import failure
from device_operations.requests.base import Identifier, JobRequest, Name, Request, invalid
from device_operations.tensors import Form, Tensor
from device_operations.wire.json_types import FreeJson

#: Bytes of a picture that rides in the request as base64; more is uploaded as a blob.
MAX_INLINE_PICTURE = 8 << 20
#: Pictures that one request may give, and that one may ask for.
MAX_PICTURES = 64
MAX_IMAGES = 16
#: Pixels of one side, and of the whole, of an image that a request names.
MAX_SIDE = 4096
MAX_PIXELS = 2048 * 2048
#: A side of an image is a multiple of this.
SIDE_STEP = 8
MAX_STEPS = 1000
MAX_PROMPT = 20_000
#: Texts of one run.
MAX_TEXTS = 8192

Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT, pattern=r"^[^\x00]*$")]
Side = Annotated[int, Field(ge=SIDE_STEP, le=MAX_SIDE, multiple_of=SIDE_STEP, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
PictureFormat = Literal["png", "webp"]
Scheduler = Literal["euler", "euler_ancestral", "dpmpp_2m_karras", "ddim", "unipc", "lcm"]


class Picture(Request):
    """A PNG or JPEG file: a blob, or its bytes as base64."""

    blob_id: Identifier | None = None
    base64: Annotated[str, StringConstraints(max_length=MAX_INLINE_PICTURE * 4 // 3 + 4)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Picture:
        if (self.blob_id is None) == (self.base64 is None):
            raise ValueError("a picture has exactly one of blob_id and base64")
        return self


def _is_tensor(value: object) -> str:
    return "tensor" if isinstance(value, Tensor) or (isinstance(value, dict) and "dtype" in value) else "picture"


#: A picture's file, or a tensor of its values.
Image = Annotated[Annotated[Picture, Tag("picture")] | Annotated[Tensor, Tag("tensor")], Discriminator(_is_tensor)]


class PipelineRun(JobRequest):
    """A run of a pipeline, before its model's type is known."""

    carries_tensors = True

    model_id: Identifier | None = None
    model_name: Name | None = None

    @model_validator(mode="after")
    def _names_a_model(self) -> PipelineRun:
        if self.model_id is None and self.model_name is None:
            raise ValueError("give model_id or model_name")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it gives, by the field's name."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Tensor)}

    def pictures(self) -> dict[str, Picture | list[Picture]]:
        """The pictures that it gives, by the field's name."""
        found: dict[str, Picture | list[Picture]] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Picture) or (isinstance(value, list) and value and isinstance(value[0], Picture)):
                found[name] = value
        return found

    def blob_ids(self) -> list[str]:
        named = [tensor.blob_id for tensor in self.tensors().values()]
        for given in self.pictures().values():
            named += [one.blob_id for one in (given if isinstance(given, list) else [given])]
        return [blob_id for blob_id in named if blob_id]


class VaeRun(PipelineRun):
    """Latents to images, or images to latents. Exactly one of `latents`, `image` and `images`.

    `latents` is `[n, channels, h, w]`; an `image` as a tensor is `[n, 3, H, W]` from -1 to 1.
    """

    latents: Tensor | None = None
    image: Image | None = None
    images: list[Picture] | None = Field(None, min_length=1, max_length=MAX_PICTURES, description="of equal size")
    output_format: Literal["png", "webp", "tensor"] = Field(
        "png", description="how images are given: a blob each, or one tensor [n, 3, H, W] from -1 to 1"
    )
    form: Form = "auto"
    seed: Seed | None = Field(None, description="draws from the encoder's distribution; its mean if not given")
    scaling_factor: float | None = Field(None, gt=0, le=1e6, description="in place of the config's")
    shift_factor: float | None = Field(None, ge=-1e6, le=1e6, description="in place of the config's")
    tile: Literal["auto", "always", "never"] = "auto"
    tile_size: int | None = Field(None, ge=64, le=MAX_SIDE, multiple_of=8, strict=True, description="pixels")

    @model_validator(mode="after")
    def _exactly_one_source(self) -> VaeRun:
        if sum(one is not None for one in (self.latents, self.image, self.images)) != 1:
            raise ValueError("give exactly one of latents, image and images")
        return self


def _as_texts(value: object) -> object:
    """A list of texts as the tensor that it stands for; anything else as it is."""
    if not isinstance(value, list):
        return value
    _check_count(len(value))
    for at, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"entry {at} is no text")
    return {"dtype": "string", "shape": [len(value)], "data": value}


def _as_tokens(value: object) -> object:
    """The same of a list of lists of token ids, which are JSON values."""
    if not isinstance(value, list):
        return value
    _check_count(len(value))
    for at, ids in enumerate(value):
        if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
            raise ValueError(f"entry {at} is no list of whole numbers, or is empty")
    return {"dtype": "json", "shape": [len(value)], "data": value}


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_TEXTS:
        raise ValueError(f"there are {count} texts; one run takes 1 to {MAX_TEXTS}")


def _one_axis(tensor: Tensor, dtype: str) -> Tensor:
    if tensor.dtype != dtype or len(tensor.shape) != 1:
        raise ValueError(f"as a tensor it is of dtype {dtype} and has one axis")
    _check_count(tensor.shape[0])
    return tensor


def _listed(items: FreeJson) -> WithJsonSchema:
    """The schema of a list that stands for a tensor."""
    return WithJsonSchema({"type": "array", "items": items, "minItems": 1, "maxItems": MAX_TEXTS})


#: A list of texts; a tensor of dtype `string` and one axis is the same.
Texts = Annotated[
    Tensor,
    BeforeValidator(_as_texts),
    AfterValidator(lambda one: _one_axis(one, "string")),
    _listed({"type": "string"}),
]
#: A list of texts, each as the ids of its tokens.
TokenLists = Annotated[
    Tensor, BeforeValidator(_as_tokens), AfterValidator(lambda one: _one_axis(one, "json")),
    _listed({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}),
]  # fmt: skip


class TextEmbeddingRun(PipelineRun):
    """Texts to vectors. Exactly one of `texts` and `tokens`, the ids of the model's own tokenizer."""

    texts: Texts | None = None
    tokens: TokenLists | None = None
    normalize: bool | None = Field(
        None, strict=True, description="vectors of length 1; if not given, as the model's files say"
    )
    dimensions: int | None = Field(
        None, ge=1, le=65_536, strict=True, description="cuts vectors, where the model was trained for that"
    )
    form: Form = "auto"

    @model_validator(mode="after")
    def _exactly_one_source(self) -> TextEmbeddingRun:
        if (self.texts is None) == (self.tokens is None):
            raise ValueError("give exactly one of texts and tokens")
        return self


class SdxlRun(PipelineRun):
    """A prompt to images; with `image`, that one changed. What is not given is as the model's configuration says."""

    prompt: Prompt
    negative_prompt: Prompt | None = None
    width: Side | None = None
    height: Side | None = None
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, strict=True)
    guidance_scale: float | None = Field(None, ge=0, le=100, description="1 and below: without guidance")
    seed: Seed | None = Field(None, description="of the first image; each further one has the next number")
    images: int = Field(1, ge=1, le=MAX_IMAGES, strict=True)
    scheduler: Scheduler | None = None
    image: Picture | None = Field(None, description="the image to start from, which strength changes")
    strength: float | None = Field(None, gt=0, le=1, description="the share of the steps that change `image`; 0.3")
    preview_every: int | None = Field(None, ge=1, le=MAX_STEPS, strict=True)
    output_format: PictureFormat = "png"

    @model_validator(mode="after")
    def _fits(self) -> SdxlRun:
        if self.strength is not None and self.image is None:
            raise ValueError("strength goes with image")
        if (self.width or SIDE_STEP) * (self.height or SIDE_STEP) > MAX_PIXELS:
            raise ValueError(f"an image has {MAX_PIXELS} pixels at most (width times height)")
        return self

    def payload(self) -> FreeJson:
        # The seed is part of the job, so that a run that starts again after a death makes the same images.
        return {"seed": secrets.randbelow(2**32), **super().payload()}


#: The type of model: what its runs give. Names of fields mean the same in all of them.
RUNS: dict[str, type[PipelineRun]] = {"vae": VaeRun, "sdxl": SdxlRun, "text_embedding": TextEmbeddingRun}

_COMMON = frozenset(PipelineRun.model_fields)


class AnyPipelineRun(PipelineRun):
    """A run that gives what pipelines take; which of it fits is known once its model is."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _known_fields(self) -> AnyPipelineRun:
        known = fields()
        unknown = sorted(name for name in self.model_extra or {} if name not in known)
        if unknown:
            raise ValueError(f"unknown fields: {', '.join(name[:50] for name in unknown[:10])}")
        return self

    def fitted(self, model_type: str) -> PipelineRun:
        """The checked run of a model of that type. Raises `validation_failed`, which names every wrong field."""
        schema = RUNS.get(model_type)
        if schema is None:
            raise failure(
                "validation_failed",
                f"a run of a model of type {model_type!r} gives inputs; {', '.join(sorted(self.model_extra or {}))} "
                f"are for {', '.join(RUNS)}",
            )
        given = {name: getattr(self, name) for name in self.model_fields_set}
        try:
            return schema.model_validate({**given, **(self.model_extra or {})})
        except ValidationError as error:
            raise invalid(error, f"The run does not fit a model of type {model_type!r}") from error


def fields() -> frozenset[str]:
    """The names of all fields that some pipeline takes besides the model and `job`."""
    return frozenset(name for run in RUNS.values() for name in run.model_fields) - _COMMON


def is_pipeline_run(request: object) -> bool:
    """Whether a request for `inference.run` is one of a pipeline: no `inputs`, and fields that pipelines take."""
    return isinstance(request, dict) and "inputs" not in request and not fields().isdisjoint(request)
