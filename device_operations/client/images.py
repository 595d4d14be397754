"""Images over HTTP: made from prompts, or from latents and back, as files, Pillow's images or NumPy arrays.

Pillow is imported when the first image is opened.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Unpack, runtime_checkable

from device_operations.client import blobs
from device_operations.client.arrays import TensorLike, received_array, sent
from device_operations.client.submission import MAX_WAIT_SECONDS, Submission, said, submission, succeeded
from device_operations.client.transport.calls import Flow, at
from device_operations.client.transport.operations import Mode, Noun, operation
from device_operations.jobs import Job, Kind
from device_operations.wire.json_types import FreeJson

if TYPE_CHECKING:
    from PIL import Image

    from device_operations.tensors import Array


@runtime_checkable
class Savable(Protocol):
    """An image of Pillow's, or what saves itself as one does."""

    def save(self, fp: Any, format: str | None = None) -> None:  # noqa: A002 - Pillow's own name
        """Writes the image to a file in a format."""


#: A picture's file by its path or its bytes, an image of Pillow's, or `{"blob_id": …}` of one that is there.
PictureLike: TypeAlias = "str | os.PathLike[str] | bytes | Savable | Mapping[str, object]"


@dataclass(frozen=True, slots=True)
class MadeImage:
    """An image that a job made: its file, and what is known of it. `seed` is None where it was made from latents."""

    data: bytes
    blob_id: str
    media_type: str
    width: int
    height: int
    seed: int | None = None

    def pil(self) -> Image.Image:
        """The image as Pillow's."""
        from PIL import Image

        return Image.open(io.BytesIO(self.data))

    def array(self) -> Array:
        """The pixels, `[height, width, 3]` of uint8."""
        import numpy as np

        return np.asarray(self.pil().convert("RGB"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file as it is."""
        target = Path(path)
        target.write_bytes(self.data)
        return target


@dataclass(frozen=True, slots=True)
class ImagesResult:
    """What a run made. `facts` is the rest of the job's result: seed, steps, scheduler, what was cut off prompts."""

    images: list[MadeImage]
    facts: FreeJson
    job_id: str


class Images(Noun[Mode]):
    """The methods on pipelines that make images (`model_type` sdxl and vae)."""

    @operation
    def generate(
        self,
        prompt: str,
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        image: PictureLike | None = None,
        timeout: float | None = None,
        options: Mapping[str, object] | None = None,
        **given: Unpack[Submission],
    ) -> Flow[ImagesResult]:
        """Makes images from a prompt and waits for them.

        `options` are the other fields of the run: negative_prompt, width, height, steps, guidance_scale, seed, images,
        scheduler, strength. Raises the job's error, `TimeoutError` after `timeout` seconds.
        """
        wait = MAX_WAIT_SECONDS if timeout is None else min(timeout, MAX_WAIT_SECONDS)
        fields = yield from _run(prompt, model_id, model_name, image, options)
        job = yield from submission(Kind.INFERENCE_RUN, fields, {"wait": wait, **given})
        return (yield from _result(job, timeout))

    @operation
    def submit(
        self,
        prompt: str,
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        image: PictureLike | None = None,
        options: Mapping[str, object] | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Submits the same and does not wait; `result(job)` gives the images."""
        fields = yield from _run(prompt, model_id, model_name, image, options)
        return (yield from submission(Kind.INFERENCE_RUN, fields, given))

    @operation
    def result(self, job: Job | str, timeout: float | None = None) -> Flow[ImagesResult]:
        """Waits for a run and gives its images; raises its error."""
        return (yield from _result(job, timeout))

    @operation
    def decode(
        self,
        latents: TensorLike,
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        timeout: float | None = None,
        **given: Unpack[Submission],
    ) -> Flow[ImagesResult]:
        """The images of latents `[n, c, h, w]`, by a model of type vae."""
        tensor = yield from sent(latents, "latents")
        fields = said(model_id=model_id, model_name=model_name, latents=tensor)
        job = yield from submission(Kind.INFERENCE_RUN, fields, given)
        return (yield from _result(job, timeout))

    @operation
    def encode(
        self,
        images: Sequence[PictureLike],
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Array]:
        """The latents `[n, c, h, w]` of images of one size, by a model of type vae."""
        pictures = []
        for image in images:
            pictures.append((yield from _picture(image)))  # noqa: PERF401 - a comprehension yields nothing
        fields = said(model_id=model_id, model_name=model_name, images=pictures, seed=seed)
        job = yield from submission(Kind.INFERENCE_RUN, fields, given)
        result = yield from succeeded(job, timeout)
        return (yield from received_array(result["outputs"]["latents"], "latents"))


def _run(
    prompt: str,
    model_id: str | None,
    model_name: str | None,
    image: PictureLike | None,
    options: Mapping[str, object] | None,
) -> Flow[FreeJson]:
    picture = None if image is None else (yield from _picture(image))
    return said(prompt=prompt, model_id=model_id, model_name=model_name, image=picture, **(options or {}))


def _picture(image: PictureLike) -> Flow[FreeJson]:
    """The picture as the contract writes it; a file is uploaded first."""
    if isinstance(image, Mapping):
        return dict(image)
    if isinstance(image, Savable):
        written = io.BytesIO()
        image.save(written, "PNG")
        image = written.getvalue()
    blob = yield from blobs.upload(image)
    return {"blob_id": blob.blob_id}


def _result(job: Job | str, timeout_seconds: float | None) -> Flow[ImagesResult]:
    result = yield from succeeded(job, timeout_seconds)
    images = []
    for image in result.get("images", []):
        data = yield from blobs.read(at("/api/blobs/{}", image["blob_id"]))
        known = {name: image[name] for name in ("blob_id", "media_type", "width", "height", "seed") if name in image}
        images.append(MadeImage(data=data, **known))
    facts = {name: value for name, value in result.items() if name not in ("images", "outputs", "session_id")}
    return ImagesResult(images, facts, job.job_id if isinstance(job, Job) else job)
