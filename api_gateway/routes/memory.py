"""Routes on device memory: status, allocations, and their bytes streamed in and out."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Annotated, cast

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.routes.blobs import receive, wanted_hash
from api_gateway.streams import reads as passing
from api_gateway.submission.answer import (
    MAX_WAIT_SECONDS,
    json_response,
    knows_key,
    make_plan,
    preferred_wait,
    promise_of,
    read_body,
    submit_job,
    submit_parsed,
)
from device_operations.errors import failure
from device_operations.jobs import Job, Kind, new_id
from device_operations.requests.base import invalid
from device_operations.requests.kinds import parse
from device_operations.requests.memory import AllocationState, Renew
from device_operations.views import AllocationView, DeviceMemoryView
from device_operations.wire.bounds import is_storable, whole_number
from tasks.memory import allocations as store
from tasks.memory import budgets as standing_store
from tasks.memory import named
from tasks.memory.rows import MemoryStanding
from tasks.owners import found, may_see
from tasks.statements import Row

router = APIRouter(tags=["memory"])

MAX_OFFSET = 2**63 - 1


@router.get("/api/memory/status")
async def read_status(request: Request, caller: Known) -> Response:
    """What every device has, and what is reserved on it. Reads records only: no device is queried.

    `by_owner` is the caller's own share, for an admin every owner's; `others_bytes` is what all other owners hold.
    """
    gateway = of(request)

    def read() -> list[MemoryStanding]:
        with gateway.engine.connect() as connection:
            return standing_store.standing(connection)

    return json_response({"devices": [_seen_by(caller, standing) for standing in await run_in_threadpool(read)]})


@router.get("/api/memory/device/{device_id}")
async def read_device(
    request: Request,
    caller: Known,
    device_id: str,
    map: bool = False,  # noqa: A002 - the API's name
) -> Response:
    """The same for one device; with `map=true`, what of the caller's lies on it: for an admin, every owner's."""
    gateway = of(request)

    def read() -> DeviceMemoryView:
        with gateway.engine.connect() as connection:
            standing = standing_store.standing(connection, device_id)
            if not standing:
                raise failure("device_not_found", f"there is no device {device_id!r}; GET /api/devices lists them")
            seen = _seen_by(caller, standing[0])
            if not map:
                return seen
            things = standing_store.lying_on(connection, device_id, None if caller.admin else caller.owner)
        return {**seen, "map": [{**thing} for thing in things if may_see(caller, thing)]}

    return json_response(await run_in_threadpool(read))


@router.post("/api/memory/allocate", status_code=202, response_model=Job, openapi_extra=body_schema("allocate"))
async def allocate(request: Request, caller: Known) -> Response:
    """Makes zeroed (or filled) bytes on a device; the allocation's id is the job's resource, usable at once."""
    return await submit_job(request, caller, Kind.MEMORY_ALLOCATE, await read_body(request))


@router.delete("/api/memory/deallocate/{allocation_id}", status_code=202, response_model=Job)
async def deallocate(request: Request, caller: Known, allocation_id: str) -> Response:
    """Frees an allocation after the jobs submitted before; the body may hold `job` options."""
    body = await read_body(request, empty_is={})
    return await submit_job(request, caller, Kind.MEMORY_DEALLOCATE, _named(body, allocation_id))


@router.post("/api/memory/copy", status_code=202, response_model=Job, openapi_extra=body_schema("copy"))
async def copy(request: Request, caller: Known) -> Response:
    """Copies bytes between allocations, across devices too; overlapping ranges behave as memmove."""
    return await submit_job(request, caller, Kind.MEMORY_COPY, await read_body(request))


@router.post(
    "/api/memory/clear/{allocation_id}",
    status_code=202,
    response_model=Job,
    openapi_extra=body_schema("clear", required=False),
)
async def clear(request: Request, caller: Known, allocation_id: str) -> Response:
    """Sets a range to one byte: all of it to 0 unless the body says otherwise."""
    body = await read_body(request, empty_is={})
    return await submit_job(request, caller, Kind.MEMORY_CLEAR, _named(body, allocation_id))


@router.get("/api/memory/allocations")
async def list_allocations(
    request: Request,
    caller: Known,
    device_id: str | None = None,
    owner: str | None = None,
    state: AllocationState | None = None,
    label: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    cursor: str | None = None,
) -> Response:
    """Allocations newest first, a page at a time."""
    gateway = of(request)
    if not caller.admin:
        if owner not in (None, caller.owner):
            raise failure("forbidden", f"this key stands for {caller.owner!r} and sees its own allocations only")
        owner = caller.owner
    given = {"device_id": device_id, "owner": owner, "state": state, "label": label}
    filters = {name: value for name, value in given.items() if value is not None}
    before = _place(cursor) if cursor else None

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            return store.page(connection, filters=filters, before=before, limit=limit + 1)

    rows = await run_in_threadpool(read)
    last = rows[limit - 1] if len(rows) > limit else None
    return json_response(
        {"allocations": [view(row) for row in rows[:limit]], "next_cursor": _cursor(last) if last else None}
    )


@router.get("/api/memory/allocations/{allocation_id}")
async def read_allocation(request: Request, caller: Known, allocation_id: str) -> Response:
    """One allocation, in any state."""
    gateway = of(request)
    return json_response(view(await run_in_threadpool(_visible, gateway, caller, allocation_id)))


@router.post("/api/memory/renew/{allocation_id}", openapi_extra=body_schema("renew"))
async def renew(request: Request, caller: Known, allocation_id: str) -> Response:
    """Gives an allocation a new time to live, counted from now."""
    gateway = of(request)
    body = await read_body(request)
    try:
        wanted = Renew.model_validate(body)
    except ValidationError as error:
        raise invalid(error, "The request does not fit the contract") from error

    def write() -> Row:
        named.find(gateway.context(caller), allocation_id)
        with gateway.engine.connect() as connection:
            row = store.renew(connection, allocation_id, wanted.ttl_seconds)
        if row is None:
            raise failure("allocation_not_found", f"allocation {allocation_id} is being freed")
        return row

    return json_response(view(await run_in_threadpool(write)))


@router.put("/api/memory/data/{allocation_id}", status_code=202, response_model=Job)
async def write_data(
    request: Request,
    caller: Known,
    allocation_id: str,
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
    sha256: str | None = None,
) -> Response:
    """Streams the raw body into the allocation; a digest in query or header is checked before anything is written."""
    gateway = of(request)
    size = whole_number(request.headers.get("content-length")) or 0
    wanted = wanted_hash(request, sha256)

    def check() -> None:
        there = named.find(gateway.context(caller), allocation_id)
        named.check_range(there, named.Range(allocation_id, offset, size))

    # Before the body is taken in: what cannot be written need not be sent. Only under a key that was used before, the
    # body says whether this is the first submission again.
    if not await run_in_threadpool(knows_key, request, caller):
        await run_in_threadpool(check)
    stored = await receive(request, caller, wanted, passing=True, what="body")
    body = {"allocation_id": allocation_id, "offset": offset, "blob_id": stored.blob_id}
    # The same bytes again are the same request, under any blob id.
    promise = promise_of(request, caller, {"sha256": stored.sha256, "size_bytes": stored.size_bytes})
    parsed = parse(Kind.MEMORY_WRITE, body)
    wait_seconds = preferred_wait(request)
    # Once the bytes are on the device, the blob is not needed any more.
    also = {"passing": True}
    return await submit_parsed(gateway, caller, Kind.MEMORY_WRITE, parsed, promise, wait_seconds, also=also)


@router.get("/api/memory/data/{allocation_id}")
async def read_data(
    request: Request,
    caller: Known,
    allocation_id: str,
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
    size_bytes: Annotated[int | None, Query(ge=1, le=MAX_OFFSET)] = None,
) -> Response:
    """Streams raw bytes out after the jobs submitted before, with their digest.

    Where the device does not get to it within a minute (or `Prefer: wait=S`): 202 with the job, whose result will name
    a blob that holds the bytes.
    """
    gateway = of(request)
    body: dict[str, object] = {"allocation_id": allocation_id, "offset": offset}
    if size_bytes is not None:
        body["size_bytes"] = size_bytes
    made = await make_plan(gateway, caller, Kind.MEMORY_READ, parse(Kind.MEMORY_READ, body), new_id())
    return await passing.answer(gateway, made, preferred_wait(request) or MAX_WAIT_SECONDS)


def view(allocation: Row) -> AllocationView:
    """The allocation as callers see it."""
    return cast("AllocationView", {name: allocation[name] for name in AllocationView.__annotations__})


def _seen_by(caller: Caller, standing: MemoryStanding) -> DeviceMemoryView:
    """A device's memory as the caller may see it: the shares of other owners in one figure, so that sums stay true."""
    shares: dict[str, int] = standing["by_owner"]
    own = {owner: size for owner, size in shares.items() if may_see(caller, {"owner": owner})}
    # A graph that models of several owners share is in each one's share and once in the sum.
    total = standing["allocated_bytes"] + standing["models_bytes"] + standing["training_bytes"]
    return cast("DeviceMemoryView", {**standing, "by_owner": own, "others_bytes": max(0, total - sum(own.values()))})


def _visible(gateway: Gateway, caller: Caller, allocation_id: str) -> Row:
    with gateway.engine.connect() as connection:
        row = store.get(connection, allocation_id)
    return found(caller, row, "allocation", allocation_id)


def _named(body: dict[str, object], allocation_id: str) -> dict[str, object]:
    """The body with the allocation that the address names; another in the body is a mistake."""
    if body.get("allocation_id", allocation_id) != allocation_id:
        raise failure("validation_failed", "the body names another allocation than the address")
    return {**body, "allocation_id": allocation_id}


def _cursor(row: Row) -> str:
    place = f"{row['created_at'].isoformat()} {row['allocation_id']}"
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def _place(cursor: str) -> tuple[str, str]:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        at, _, allocation_id = text.partition(" ")
        known = datetime.fromisoformat(at).tzinfo is not None and bool(allocation_id) and is_storable(text)
    except ValueError:
        known = False
    if not known:
        raise failure("validation_failed", f"cursor {cursor[:100]!r} is none that was given out")
    return at, allocation_id
