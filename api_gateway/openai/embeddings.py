"""`POST /v1/embeddings`: texts, or lists of tokens, become vectors of length 1, in one job like any other."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Gateway, of
from api_gateway.oip_infer import CLIENT_CLOSED_REQUEST
from api_gateway.openai.models import find_that_makes
from api_gateway.openai.requests import Embeddings, checked
from api_gateway.openai.runs import run
from api_gateway.submission import JSON, read_body
from tasks.transients import Transients

router = APIRouter(tags=["openai"])


@router.post("/v1/embeddings", openapi_extra=body_schema("embeddings"))
async def create_embeddings(request: Request, caller: Known) -> Response:
    """Embeds texts. A client that goes away cancels the job. Texts over the model's limit are cut, and listed."""
    asked = checked(Embeddings, await read_body(request))
    gateway = of(request)
    model = await run_in_threadpool(find_that_makes, gateway, caller, asked.model, "embeddings")
    given = "texts" if isinstance(asked.input[0], str) else "tokens"
    fields: dict[str, Any] = {given: asked.input, "normalize": True}
    if asked.dimensions is not None:
        fields["dimensions"] = asked.dimensions
    async with run(request, caller, model, fields, asked.job) as job:
        if job is None:
            return Response(None, CLIENT_CLOSED_REQUEST)
        return await run_in_threadpool(_answer, gateway, asked, job)


def _answer(gateway: Gateway, asked: Embeddings, job: dict[str, Any]) -> Response:
    result = job["result"]
    vectors = _vectors(gateway.transients, result["outputs"]["embeddings"])
    used = result["tokens"]
    body = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, asked.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": asked.model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
        "job_id": job["job_id"],
        "truncated": result["truncated"],
    }
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def _vectors(transients: Transients, tensor: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The job's embeddings [texts, width]."""
    if "base64" in tensor:
        raw: Any = base64.b64decode(tensor["base64"])
    else:
        raw = transients.read(tensor["transient_id"], tensor["offset"], tensor["size_bytes"])
    return np.frombuffer(raw, "<f4").reshape(tensor["shape"])


def _encoded(vector: np.ndarray[Any, np.dtype[np.float32]], encoding_format: str) -> Any:
    return vector if encoding_format == "float" else base64.b64encode(vector.tobytes()).decode()
