"""Routes on blobs: streamed in and out, with ranges."""

from __future__ import annotations

import base64
import re

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from api_gateway import links
from api_gateway.auth import Known, authenticate
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.submission.answer import json_response
from api_gateway.submission.bodies import room_of
from device_operations.errors import failure
from device_operations.wire.bounds import is_number_above, whole_number
from tasks.blobs import records as store
from tasks.blobs.store import BLOCK_BYTES, Stored
from tasks.owners import found
from tasks.statements import Row

router = APIRouter(tags=["blobs"])

#: The holder of a link may read the one blob that it is for.
_LINKED = Caller("", admin=True)

#: Seconds that bytes on their way through the gateway are kept once nothing uses them any more.
PASSING_SECONDS = 60.0


@router.post("/api/blobs", status_code=201)
async def upload(request: Request, caller: Known, sha256: str | None = None) -> Response:
    """Stores the raw body as a new blob. `?sha256=` refuses a body with another hash."""
    stored = await receive(request, caller, sha256)
    described = {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes}
    return json_response(described, 201, {"Location": f"/api/blobs/{stored.blob_id}"})


async def receive(
    request: Request, caller: Caller, sha256: str | None = None, *, passing: bool = False, what: str = "blob"
) -> Stored:
    """Streams the body into the store and records the blob; a cut-off body leaves nothing behind.

    With `passing` it is only on its way elsewhere. `sha256` is refused where headers name another.
    """
    gateway = of(request)
    limit = gateway.settings.blobs.max_bytes
    announced = request.headers.get("content-length")
    if is_number_above(announced or "", limit):
        raise failure("payload_too_large", f"a {what} may have {limit} bytes (BLOBS__MAX_BYTES)")
    # Only what is not read as a blob is written over an old file: after a power cut, that might show instead.
    expected = (whole_number(announced) or 0) if passing else 0
    wanted = wanted_hash(request, sha256)
    # Blocks are written as they come: no more than these are held at once.
    await room_of(request).announced(announced, 3 * BLOCK_BYTES)
    try:
        stored = await gateway.blobs.put_stream(request.stream(), limit, wanted, expected)
    except ClientDisconnect:
        raise failure("malformed_request", "the body was cut off; nothing was stored") from None
    seconds = PASSING_SECONDS if passing else gateway.settings.blobs.ttl_hours * 3600

    def record() -> None:
        described = {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes}
        with gateway.engine.connect() as connection:
            store.insert(connection, {**described, "owner": caller.owner}, seconds)

    await run_in_threadpool(record)
    return stored


def wanted_hash(request: Request, sha256: str | None = None) -> str | None:
    """The sha256 in hexadecimal that the caller says the body has: `?sha256=`, or a digest header (RFC 9530, 3230)."""
    digests = {sha256.lower()} if sha256 else set()
    header = request.headers.get("x-content-sha256")
    if header:
        digests.add(header.strip().lower())
    for name in ("content-digest", "repr-digest", "digest"):
        for entry in request.headers.get(name, "").split(","):
            algorithm, _, value = entry.strip().partition("=")
            if algorithm.lower() == "sha-256":
                digests.add(_hexadecimal(value.strip().strip(":")))
    if len(digests) > 1:
        raise failure("malformed_request", f"the request names different hashes: {', '.join(sorted(digests))}")
    wanted = next(iter(digests), None)
    if wanted is not None and not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise failure("malformed_request", "sha256 is not 64 hexadecimal digits")
    return wanted


def _hexadecimal(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).hex()
    except ValueError:
        raise failure("malformed_request", "the digest is not base64 of a sha-256") from None


@router.get("/api/blobs/{blob_id}")
async def download(
    request: Request, blob_id: str, expires: str | None = None, signature: str | None = None
) -> Response:
    """The blob's bytes; `Range: bytes=a-b` gives a part of them. A link's `expires` and `signature` stand for a key."""
    gateway = of(request)
    linked = expires is not None and links.is_good(gateway.settings, blob_id, expires, signature or "")
    caller = _LINKED if linked else authenticate(request)
    blob = await run_in_threadpool(_visible, gateway, caller, blob_id)
    headers = _headers(blob)
    start, end = _range(request.headers.get("range"), blob["size_bytes"])
    partial = (start, end) != (0, blob["size_bytes"])
    headers["Content-Length"] = str(end - start)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob['size_bytes']}"
    body = gateway.blobs.stream(blob_id, start, end - start)
    return StreamingResponse(body, 206 if partial else 200, headers, "application/octet-stream")


@router.head("/api/blobs/{blob_id}")
async def describe(request: Request, caller: Known, blob_id: str) -> Response:
    """The blob's size and hash, without its bytes."""
    blob = await run_in_threadpool(_visible, of(request), caller, blob_id)
    headers = {**_headers(blob), "Content-Length": str(blob["size_bytes"])}
    return Response(None, 200, headers, "application/octet-stream")


@router.delete("/api/blobs/{blob_id}", status_code=204)
async def delete(request: Request, caller: Known, blob_id: str) -> Response:
    """Deletes a blob that nothing open refers to."""
    gateway = of(request)

    def take_away() -> None:
        _visible(gateway, caller, blob_id)
        with gateway.engine.connect() as connection:
            if not store.delete(connection, blob_id):
                raise failure("blob_in_use", f"blob {blob_id} is used by an open job, a model or a session")
        gateway.blobs.delete(blob_id)

    await run_in_threadpool(take_away)
    return Response(None, 204)


def _visible(gateway: Gateway, caller: Caller, blob_id: str) -> Row:
    with gateway.engine.connect() as connection:
        row = store.get(connection, blob_id)
    return found(caller, row, "blob", blob_id)


def _headers(blob: Row) -> dict[str, str]:
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{blob["blob_id"]}"'}
    if blob["sha256"]:
        headers["X-Content-SHA256"] = blob["sha256"]
    return headers


def _range(header: str | None, size: int) -> tuple[int, int]:
    """The half-open byte range that one `Range` header names; the whole blob without one."""
    requested = re.fullmatch(r"\s*bytes=([0-9]*)-([0-9]*)\s*", header or "")
    if requested is None or requested.groups() == ("", ""):
        return 0, size
    # A number of too many digits lies beyond the end, as any other that does.
    first, last = ((whole_number(text, most=size) if text else None) for text in requested.groups())
    if not requested[1]:
        start, end = (size - last if last is not None else 0), size
    else:
        start, end = (size if first is None else first), (size if last is None else last + 1)
    start, end = max(0, start), min(end, size)
    if start >= end:
        raise failure("range_not_satisfiable", f"the blob has {size} bytes; {str(header)[:100]!r} lies outside")
    return start, end
