"""Inference over the Open Inference Protocol: the one route whose every microsecond is paid a thousand times a second.

read ─▶ plan ─▶ record and publish ─▶ wait for the end, or for the client to leave ─▶ answer

The run is a job like any other. Its tensors above a few kilobytes go by transient files, never through JSON, a row or
a message.
"""

from __future__ import annotations

import gzip
import re
import zlib
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api_gateway import problems
from api_gateway.auth import authenticate
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.oip.raw import only_input
from api_gateway.oip.tensors import InferRequest, answer, read, stash, stashed
from api_gateway.submission.bodies import Raw, read_whole
from api_gateway.submission.compression import ENCODINGS, decompressed, too_large
from api_gateway.submission.performing import CLIENT_CLOSED_REQUEST, performed
from device_operations.errors import OperationError, failure
from device_operations.jobs import new_id
from device_operations.requests.base import JobOptions
from device_operations.wire.bounds import whole_number
from device_operations.wire.json_types import FreeJson
from tasks.blobs.transients import TRANSIENT_BYTES
from tasks.database import unavailable
from tasks.inference.plan import plan_stored_run
from tasks.inference.residents import check_against_model, find_model, find_session, require_graph, state_inputs
from tasks.jobs.submit import Plan
from tasks.statements import Row

#: JSON above this many bytes is read and written on a thread, so that other requests are not held up.
ON_THE_LOOP_BYTES = 65_536

#: The same for raw bytes, which are only copied; going to a thread and back costs about as much as copying this.
RAW_ON_THE_LOOP_BYTES = 2 << 20

#: The longest time limit of a job, in the protocol's unit.
MAX_TIMEOUT_MICROSECONDS = 30 * 86400 * 10**6


class InferMiddleware:
    """The way to `infer` past the framework: no middleware, no routing, no parameters solved, one response sent.

    Everything else goes the usual way, through `app`.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an inference request, or hands on."""
        address = None
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(_INFER):
            address = _ADDRESS.fullmatch(scope["path"])
        if address is None:
            await self._app(_usual(scope), receive, send)
            return
        scope["app"] = self._app
        scope["path_params"] = address.groupdict()
        request = _Request(scope, receive)
        try:
            response = await infer(request)
        except OperationError as error:
            response = problems.shape(request, error)
        except Exception as error:  # noqa: BLE001 - every failure of a request is its answer
            response = problems.unexpected(request, error)
        await response(scope, receive, send)


def _usual(scope: Scope) -> Scope:
    """A request below /v2 as it is routed: without a slash at its end, and HEAD as GET, whose body is not sent then."""
    if scope["type"] != "http" or not f"{scope['path']}/".startswith("/v2/"):
        return scope
    changed: FreeJson = {}
    if scope["path"].endswith("/"):
        changed = {"path": scope["path"].rstrip("/"), "raw_path": (scope.get("raw_path") or b"").rstrip(b"/")}
    if scope["method"] == "HEAD":
        changed["method"] = "GET"
    return {**scope, **changed} if changed else scope


class _Request(Request):
    """A request whose headers are looked up: Starlette's reads all of them for each look-up."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        super().__init__(scope, receive)
        self._looked_up = _Headers(scope)

    @property
    def headers(self) -> Headers:
        return self._looked_up


class _Headers(Headers):
    def __init__(self, scope: Scope) -> None:
        super().__init__(scope=scope)
        # Of a header that is given twice the first counts, as in Starlette's.
        self._first = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(self.raw)}

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower()]

    def get(self, key: str, default: Any = None) -> Any:
        return self._first.get(key, default)


_INFER = ("/infer", "/infer/")
_ADDRESS = re.compile(r"/v2/models/(?P<model_name>[^/]+)(?:/versions/(?P<model_version>[^/]+))?/infer/*")


async def infer(request: Request) -> Response:
    """Runs a model and answers with its outputs. A client that goes away cancels its run."""
    gateway = of(request)
    caller = authenticate(request)
    body = await _body(request, gateway.settings.http.max_body_bytes)
    length = _header_length(request)
    long_json = (len(body) if length is None else length) > ON_THE_LOOP_BYTES
    inference = await run_in_threadpool(read, body, length) if long_json else read(body, length)
    name, version = request.path_params["model_name"], request.path_params.get("model_version")
    job_id = new_id()
    heavy = len(body) > RAW_ON_THE_LOOP_BYTES or (len(body) > TRANSIENT_BYTES and not gateway.transients.is_local)
    made, model = await _planned(gateway, caller, inference, name, version, job_id, heavy=heavy)
    left_behind = stashed(made.job.request["inputs"])
    produced: dict[str, FreeJson] = {}
    read_by_all = False
    try:
        job = await performed(request, gateway, made, _patience(inference))
        if job is None:
            return Response(None, CLIENT_CLOSED_REQUEST)
        produced = job["result"]["outputs"]
        header = {"model_name": name, "model_version": model["version"], "parameters": {"job_id": job_id}}
        if inference.request_id is not None:
            header["id"] = inference.request_id
        if _is_quick(inference, produced, gateway):
            response = _answered(request, inference, produced, gateway, header)
        else:
            response = await run_in_threadpool(_answered, request, inference, produced, gateway, header)
        read_by_all = True
        return response
    finally:
        left_behind += stashed(produced)
        if left_behind and gateway.transients.is_local:
            gateway.transients.drop(left_behind, read=read_by_all)
        elif left_behind:
            await run_in_threadpool(gateway.transients.drop, left_behind)


def _is_quick(inference: InferRequest, produced: dict[str, FreeJson], gateway: Gateway) -> bool:
    """Whether the answer is made sooner than a thread has begun: little to copy, or very little to write as JSON."""
    apart = sum(tensor.get("size_bytes", 0) for tensor in produced.values())
    if not apart:
        return True
    raw = all(output.binary for output in inference.outputs) if inference.outputs else inference.binary
    return raw and gateway.transients.is_local and apart <= RAW_ON_THE_LOOP_BYTES


# ---- planning


async def _planned(
    gateway: Gateway,
    caller: Caller,
    inference: InferRequest,
    name: str,
    version: str | None,
    job_id: str,
    *,
    heavy: bool,
) -> tuple[Plan, Row]:
    """The run's plan and its model: on the event loop where nothing is read, written or long."""
    gateway.rates.spend(caller.owner)
    light = (
        not heavy
        and "sequence_id" not in inference.parameters
        and gateway.directory.is_fresh()
        and gateway.directory.snapshot().named(caller, name, version)
    )
    try:
        if light:
            return _plan(gateway, caller, inference, name, version, job_id)
        return await run_in_threadpool(_plan, gateway, caller, inference, name, version, job_id)
    except Exception as error:
        raise unavailable(error) from error


def _plan(
    gateway: Gateway, caller: Caller, inference: InferRequest, name: str, version: str | None, job_id: str
) -> tuple[Plan, Row]:
    context = gateway.context(caller)
    session_id = inference.parameters.get("sequence_id")
    if session_id and not isinstance(session_id, str):
        raise failure("validation_failed", "sequence_id is the id of a session opened at /api/inference/sessions")
    session = find_session(context, session_id) if session_id else None
    model = find_model(context, session["model_id"] if session else None, name, version, in_session=bool(session))
    require_graph(model, "runs with inputs")
    if inference.raw is not None:
        inference.inputs = only_input(model, inference.raw)
    outputs = [output.name for output in inference.outputs]
    check_against_model(model, inference.inputs, outputs, state_inputs(session))
    inputs, _ = stash(inference, gateway.transients)
    payload: FreeJson = {"model_name": name, "inputs": inputs, "form": "transient"}
    if outputs:
        payload["outputs"] = outputs
    if session:
        payload["session_id"] = session_id
    try:
        return plan_stored_run(context, _options(inference), job_id, model, payload, session=session), model
    except BaseException:
        gateway.transients.drop(stashed(inputs))
        raise


_USUAL = JobOptions()


def _options(inference: InferRequest) -> JobOptions:
    """Priority and time limit as Triton has them: 1 is the highest priority, 0 the usual one; microseconds."""
    if not inference.parameters.keys() & {"priority", "timeout"}:
        return _USUAL
    options = JobOptions()
    priority = inference.parameters.get("priority", 0)
    if not isinstance(priority, int) or priority < 0:
        raise failure("validation_failed", "priority is a whole number: 0 for the usual one, 1 for the highest, then 2")
    if priority:
        options.priority = max(0, 10 - priority)
    patience = _patience(inference)
    if patience is not None:
        options.timeout_seconds = options.expires_in_seconds = patience
    return options


def _patience(inference: InferRequest) -> float | None:
    """The seconds after which the client does not want the answer any more."""
    timeout = inference.parameters.get("timeout")
    if timeout is None or timeout == 0:
        return None
    if not isinstance(timeout, int) or not 0 <= timeout <= MAX_TIMEOUT_MICROSECONDS:
        raise failure(
            "validation_failed", f"timeout is a whole number of microseconds, at most {MAX_TIMEOUT_MICROSECONDS}"
        )
    return timeout / 1e6


# ---- bytes in and out


async def _body(request: Request, limit: int) -> Raw:
    """The body, decompressed. `payload_too_large` over the limit, which holds for what it is decompressed to."""
    body = await read_whole(request, limit, too_large)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ENCODINGS:
        known = " and ".join(ENCODINGS)
        raise failure("unsupported_media_type", f"Content-Encoding {encoding[:40]!r} is not supported; {known} are")
    return await run_in_threadpool(decompressed, body, encoding, limit)


def _answered(
    request: Request, inference: InferRequest, produced: dict[str, FreeJson], gateway: Gateway, header: FreeJson
) -> Response:
    parts, header_length = answer(inference, produced, gateway.transients, header)
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    headers = {}
    media_type = "application/json"
    if header_length is not None:
        headers["Inference-Header-Content-Length"] = str(header_length)
        media_type = "application/octet-stream"
    # Only for a client that names one of them: most HTTP libraries accept both by default.
    accepted = request.headers.get("accept-encoding", "").strip().lower()
    if accepted in ("gzip", "deflate"):
        headers["Content-Encoding"] = accepted
        body = gzip.compress(body, 1, mtime=0) if accepted == "gzip" else zlib.compress(body, 1)
    return Response(body, 200, headers, media_type)


def _header_length(request: Request) -> int | None:
    given = request.headers.get("inference-header-content-length")
    if given is None:
        return None
    length = whole_number(given)
    if length is None:
        raise failure("malformed_request", "Inference-Header-Content-Length is not a number of bytes")
    return length
