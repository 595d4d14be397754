"""`POST /v1/images/generations`: a prompt becomes images, in one job like any other."""

from __future__ import annotations

import base64
import time
from functools import partial

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway import links
from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.openai.models import MAKES, find_that_makes
from api_gateway.openai.requests import ImagesRequest, checked
from api_gateway.openai.runs import run
from api_gateway.submission.answer import json_response, read_body
from api_gateway.submission.performing import CLIENT_CLOSED_REQUEST
from device_operations.errors import failure
from device_operations.wire.json_types import FreeJson
from tasks.statements import Row

router = APIRouter(tags=["openai"])


@router.post("/v1/images/generations", openapi_extra=body_schema("images"))
async def create_images(request: Request, caller: Known) -> Response:
    """Makes images of a prompt. A client that goes away cancels the job. A `url` is good for an hour, without a key."""
    body = await read_body(request)
    parsed = checked(ImagesRequest, body)
    gateway = of(request)
    find = partial(_model, gateway, caller, parsed.model)
    async with run(request, caller, body, find, _fields(parsed), parsed.job) as job:
        if job is None:
            return Response(None, CLIENT_CLOSED_REQUEST)
        answer = await run_in_threadpool(_answer, gateway, parsed, job, str(request.base_url).rstrip("/"))
    return json_response(answer)


def _model(gateway: Gateway, caller: Caller, name: str | None) -> Row:
    """The model of that name; without one, the only one of the caller's that makes images."""
    if name is not None:
        return find_that_makes(gateway, caller, name, "images")
    snapshot = gateway.directory.snapshot()
    named = [name for name in dict(snapshot.names(caller)) if _makes_images(snapshot.meant(caller, name))]
    if len(named) != 1:
        message = f"name a model; {len(named)} that make images can be run with this key"
        raise failure("validation_failed", message, errors=[{"loc": ["model"], "message": message, "type": "missing"}])
    return find_that_makes(gateway, caller, named[0], "images")


def _makes_images(models: list[Row]) -> bool:
    return bool(models) and MAKES.get(models[0]["model_type"]) == "images"


def _fields(parsed: ImagesRequest) -> dict[str, object]:
    """The run's own fields: what was not given is the model's to choose."""
    width, height = parsed.sides or (None, None)
    guidance = parsed.guidance if parsed.guidance_scale is None else parsed.guidance_scale
    fields = {
        "prompt": parsed.prompt,
        "negative_prompt": parsed.negative_prompt,
        "width": width,
        "height": height,
        "steps": parsed.steps,
        "guidance_scale": guidance,
        "seed": parsed.seed,
        "scheduler": parsed.scheduler,
        "images": parsed.n,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _answer(gateway: Gateway, parsed: ImagesRequest, job: FreeJson, service: str) -> FreeJson:
    images = job["result"]["images"]
    made = []
    for image in images:
        entry: FreeJson = {"seed": image["seed"]}
        if parsed.response_format == "b64_json":
            entry["b64_json"] = base64.b64encode(gateway.blobs.read(image["blob_id"])).decode()
        else:
            entry["url"] = service + links.path_of(gateway.settings, image["blob_id"])
        made.append(entry)
    size = f"{images[0]['width']}x{images[0]['height']}"
    return {
        "created": int(time.time()), "data": made, "size": size, "output_format": "png", "job_id": job["job_id"],
    }  # fmt: skip
