"""`POST /v1/embeddings`: texts, or lists of tokens, become vectors of length 1, in one job like any other."""

from __future__ import annotations

import base64
from functools import partial

import numpy as np
import orjson
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Gateway, of
from api_gateway.openai.models import find_that_makes
from api_gateway.openai.requests import EmbeddingsRequest, checked
from api_gateway.openai.runs import run
from api_gateway.submission.answer import JSON, read_body
from api_gateway.submission.performing import CLIENT_CLOSED_REQUEST
from device_operations.tensors import Tensor, decode
from device_operations.wire.json_types import FreeJson

router = APIRouter(tags=["openai"])


@router.post("/v1/embeddings", openapi_extra=body_schema("embeddings"))
async def create_embeddings(request: Request, caller: Known) -> Response:
    """Embeds texts. A client that goes away cancels the job. Texts over the model's limit are cut, and listed."""
    body = await read_body(request)
    parsed = checked(EmbeddingsRequest, body)
    gateway = of(request)
    given = "texts" if isinstance(parsed.input[0], str) else "tokens"
    fields: dict[str, object] = {given: parsed.input, "normalize": True}
    if parsed.dimensions is not None:
        fields["dimensions"] = parsed.dimensions
    find = partial(find_that_makes, gateway, caller, parsed.model, "embeddings")
    async with run(request, caller, body, find, fields, parsed.job) as job:
        if job is None:
            return Response(None, CLIENT_CLOSED_REQUEST)
        return await run_in_threadpool(_answer, gateway, parsed, job)


def _answer(gateway: Gateway, parsed: EmbeddingsRequest, job: FreeJson) -> Response:
    result = job["result"]
    vectors = _vectors(gateway, result["outputs"]["embeddings"])
    used = result["tokens"]
    body = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, parsed.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": parsed.model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
        "job_id": job["job_id"],
        "truncated": result["truncated"],
    }
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def _vectors(gateway: Gateway, tensor: FreeJson) -> NDArray[np.float32]:
    """The job's embeddings [texts, width], in whichever form it gave them."""
    raw: bytes | memoryview
    if "transient_id" in tensor:
        raw = gateway.transients.read(tensor["transient_id"], tensor["offset"], tensor["size_bytes"])
    elif "blob_id" in tensor:
        raw = gateway.blobs.read(tensor["blob_id"])
    else:
        return decode(Tensor.model_validate(tensor), "embeddings")
    return np.frombuffer(raw, "<f4").reshape(tensor["shape"])


def _encoded(vector: NDArray[np.float32], encoding_format: str) -> NDArray[np.float32] | str:
    return vector if encoding_format == "float" else base64.b64encode(vector.tobytes()).decode()
