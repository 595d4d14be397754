"""Text embedding over HTTP: texts in, an array of vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

from device_operations.client.arrays import received_array
from device_operations.client.submission import MAX_WAIT_SECONDS, Submission, said, submission, succeeded
from device_operations.client.transport.calls import Flow
from device_operations.client.transport.operations import Mode, Noun, operation
from device_operations.jobs import Job, Kind
from device_operations.wire.json_types import FreeJson

if TYPE_CHECKING:
    from device_operations.tensors import Array


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an embedding gave: `vectors` [texts, width] in float32; how many tokens the texts took together.

    `truncated` lists the places of texts that had more tokens than the model takes, and were cut.
    """

    vectors: Array
    tokens: int
    truncated: list[int]
    job_id: str


class Embedding(Noun[Mode]):
    """The methods on text embedding models."""

    @operation
    def embed(
        self,
        texts: str | Sequence[str],
        model: str | None = None,
        *,
        model_id: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        timeout: float | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Embedded]:
        """Embeds one text or several with the model of that name. Raises the job's error, `TimeoutError`.

        `normalize` gives vectors of length 1; if not given, the model's own files say it. `dimensions` cuts them to
        their first numbers, where the model was trained for that.
        """
        wait = MAX_WAIT_SECONDS if timeout is None else min(timeout, MAX_WAIT_SECONDS)
        job = yield from submission(
            Kind.INFERENCE_RUN,
            _fields(texts, model, model_id, normalize, dimensions),
            {"wait": wait, **given},
        )
        return (yield from _result(job, timeout))

    @operation
    def submit_embed(
        self,
        texts: str | Sequence[str],
        model: str | None = None,
        *,
        model_id: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Submits an embedding and does not wait for it; `embedded(job)` gives the vectors."""
        fields = _fields(texts, model, model_id, normalize, dimensions)
        return (yield from submission(Kind.INFERENCE_RUN, fields, given))

    @operation
    def embedded(self, job: Job | str, timeout: float | None = None) -> Flow[Embedded]:
        """Waits for an embedding and gives its vectors; raises its error."""
        return (yield from _result(job, timeout))


def _fields(
    texts: str | Sequence[str], model: str | None, model_id: str | None, normalize: bool | None, dimensions: int | None
) -> FreeJson:
    return said(
        model_name=model,
        model_id=model_id,
        texts=[texts] if isinstance(texts, str) else list(texts),
        normalize=normalize,
        dimensions=dimensions,
    )


def _result(job: Job | str, timeout_seconds: float | None) -> Flow[Embedded]:
    result = yield from succeeded(job, timeout_seconds)
    vectors = yield from received_array(result["outputs"]["embeddings"], "embeddings")
    job_id = job.job_id if isinstance(job, Job) else job
    return Embedded(vectors, result["tokens"], result["truncated"], job_id)
