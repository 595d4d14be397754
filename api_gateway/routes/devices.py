"""Routes on devices: what there is, how it stands, drain and resume, the history for a device monitor."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, cast

from fastapi import APIRouter, Request
from pydantic import BeforeValidator
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known, require_admin
from api_gateway.gateway import Gateway, of
from api_gateway.submission.answer import json_response
from device_operations.errors import failure
from device_operations.views import DeviceView
from tasks.devices import store
from tasks.statements import Row

router = APIRouter(tags=["devices"])

#: Samples in one answer at most: a day's worth at one each five seconds.
SAMPLES_LIMIT = 17_280


def _is_written_out(value: object) -> object:
    """Refuses a number, which pydantic would read as seconds since 1970."""
    if isinstance(value, str) and not re.match(r"[0-9]{4}-", value):
        raise ValueError("a time is written as RFC 3339 has it: 2026-01-31T12:00:00Z")
    return value


Since = Annotated[datetime | None, BeforeValidator(_is_written_out)]


@router.get("/api/devices")
async def list_devices(request: Request, caller: Known) -> Response:
    """Every device that ever registered."""
    gateway = of(request)
    snapshot = await run_in_threadpool(gateway.directory.refresh)
    return json_response({"devices": [view(row, snapshot.counts) for row in snapshot.devices.values()]})


@router.get("/api/devices/{device_id}")
async def read_device(request: Request, caller: Known, device_id: str) -> Response:
    """One device."""
    return json_response(await run_in_threadpool(_read, of(request), device_id))


@router.post("/api/devices/{device_id}/drain")
async def drain(request: Request, caller: Known, device_id: str) -> Response:
    """The device takes no new jobs; what runs on it is finished, what waits goes on waiting."""
    require_admin(caller)
    return json_response(await run_in_threadpool(_set_draining, of(request), device_id, True))


@router.post("/api/devices/{device_id}/resume")
async def resume(request: Request, caller: Known, device_id: str) -> Response:
    """The device takes jobs again."""
    require_admin(caller)
    return json_response(await run_in_threadpool(_set_draining, of(request), device_id, False))


@router.get("/api/devices/{device_id}/samples")
async def read_samples(request: Request, caller: Known, device_id: str, since: Since = None) -> Response:
    """The device's history after `since`, oldest first; the SQL view `device_monitor` holds the same."""
    gateway = of(request)

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            if store.get(connection, device_id) is None:
                raise _no_device(device_id)
            return store.samples(connection, device_id, since, SAMPLES_LIMIT)

    return json_response({"device_id": device_id, "samples": await run_in_threadpool(read)})


_KEYS = tuple(DeviceView.__annotations__)


def view(device: Row, counts: dict[str, dict[str, int]]) -> DeviceView:
    """The device as callers see it."""
    at_work = {name: counts.get(device["device_id"], {}).get(name, 0) for name in ("queued", "running")}
    return cast("DeviceView", {name: at_work[name] if name in at_work else device[name] for name in _KEYS})


def _read(gateway: Gateway, device_id: str) -> DeviceView:
    snapshot = gateway.directory.refresh()
    device = snapshot.devices.get(device_id)
    if device is None:
        raise _no_device(device_id)
    return view(device, snapshot.counts)


def _set_draining(gateway: Gateway, device_id: str, draining: bool) -> DeviceView:
    with gateway.engine.connect() as connection:
        if not store.set_draining(connection, device_id, draining):
            raise _no_device(device_id)
    return _read(gateway, device_id)


def _no_device(device_id: str) -> Exception:
    return failure("device_not_found", f"there is no device {device_id!r}; GET /api/devices lists them")
