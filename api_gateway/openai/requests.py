"""What OpenAI's clients send, as far as it is taken here.

Fields of OpenAI's that change nothing here are accepted; what would change the answer and cannot be done is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, WithJsonSchema

from device_operations.requests.base import LabelName, LabelValue, Name, Request, invalid
from device_operations.requests.pipelines import MAX_TEXTS

_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT_SCHEMA = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_TEXTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_TEXTS},
    ]
}

Body = TypeVar("Body", bound=Request)

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)


def checked(kind: type[Body], body: object) -> Body:
    """The request in a JSON body; `validation_failed` names every field that does not fit."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error, "The request cannot be carried out") from error


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _texts(value: object) -> list[str] | list[list[int]]:
    """The texts, or lists of tokens, that `input` gives: one or several of one kind."""
    given = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(given, list) or not given:
        raise ValueError("is a text, a list of texts, a list of tokens, or a list of such lists, and not empty")
    if len(given) > MAX_TEXTS:
        raise ValueError(f"holds {len(given)} texts; at most {MAX_TEXTS} go into one request")
    if all(isinstance(text, str) for text in given):
        if not all(given):
            raise ValueError(f"text {given.index('')} is empty")
        return given
    if all(_is_ids(one) for one in given):
        return given
    raise ValueError("holds something other than texts or lists of tokens, an empty list, or both texts and tokens")


def _size(value: str | None) -> str | None:
    if value is None or value == "auto" or _SIZE.fullmatch(value):
        return value
    raise ValueError('is "auto", or width and height in pixels, as in "1024x1024"')


class Options(Request):
    """What a request may say of the job that carries it out; of other jobs it knows nothing."""

    priority: int = Field(5, ge=0, le=9, strict=True, description="0 (low) to 9 (high)")
    timeout_seconds: float | None = Field(None, gt=0, le=30 * 86400, description="limit on the run itself")
    labels: dict[LabelName, LabelValue] = Field(default_factory=dict, max_length=64)


class EmbeddingsRequest(Request):
    """`POST /v1/embeddings`. After its check, `input` is a list."""

    model: Name
    input: Annotated[Any, AfterValidator(_texts), WithJsonSchema(_INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=65_536, strict=True)
    user: str | None = Field(None, description="taken, and not used", max_length=1000)
    job: Options = Field(default_factory=Options)


class ImagesRequest(Request):
    """`POST /v1/images/generations`, with the fields that this service adds."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=32_000)]
    model: Name | None = Field(None, description="may be left out where the caller can run just one that makes images")
    n: int | None = Field(1, ge=1, le=10, strict=True)
    size: Annotated[str | None, AfterValidator(_size)] = Field(None, max_length=11)
    response_format: Literal["url", "b64_json"] | None = "url"
    negative_prompt: Annotated[str, StringConstraints(max_length=32_000)] | None = None
    steps: int | None = Field(None, strict=True)
    guidance: float | None = Field(None, description="the same as guidance_scale")
    guidance_scale: float | None = None
    seed: int | None = Field(None, strict=True)
    scheduler: Annotated[str, StringConstraints(max_length=100)] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    quality: str | None = Field(None, description="taken, and not used", max_length=100)
    style: str | None = Field(None, description="taken, and not used", max_length=100)
    moderation: str | None = Field(None, description="taken, and not used", max_length=100)
    user: str | None = Field(None, description="taken, and not used", max_length=1000)
    job: Options = Field(default_factory=Options)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height in pixels; None where the model decides."""
        found = _SIZE.fullmatch(self.size or "")
        return (int(found[1]), int(found[2])) if found else None
