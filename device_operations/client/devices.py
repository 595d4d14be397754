"""Devices over HTTP: what there is, drain and resume, the history."""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeAlias

from device_operations.client.transport.calls import Call, Flow, at, get
from device_operations.client.transport.operations import Mode, Noun, operation

#: Objects as the API gives them; a name of its own, since `list` is a method below.
Rows: TypeAlias = list[dict[str, Any]]


class Devices(Noun[Mode]):
    """The methods on devices. A device is the object that `GET /api/devices/{device_id}` gives."""

    @operation
    def list(self) -> Flow[Rows]:
        """Every device that ever registered."""
        answer = yield from get("/api/devices")
        devices: Rows = answer["devices"]
        return devices

    @operation
    def get(self, device_id: str) -> Flow[dict[str, Any]]:
        """One device; `device_not_found` where there is none."""
        device: dict[str, Any] = yield from get(at("/api/devices/{}", device_id))
        return device

    @operation
    def drain(self, device_id: str) -> Flow[dict[str, Any]]:
        """The device takes no new jobs; for admins."""
        response = yield Call("POST", at("/api/devices/{}/drain", device_id))
        device: dict[str, Any] = response.json()
        return device

    @operation
    def resume(self, device_id: str) -> Flow[dict[str, Any]]:
        """The device takes jobs again; for admins."""
        response = yield Call("POST", at("/api/devices/{}/resume", device_id))
        device: dict[str, Any] = response.json()
        return device

    @operation
    def samples(self, device_id: str, since: datetime | None = None) -> Flow[Rows]:
        """The device's history after `since`, oldest first."""
        asked = None if since is None else since.astimezone().isoformat()
        answer = yield from get(at("/api/devices/{}/samples", device_id), since=asked)
        samples: Rows = answer["samples"]
        return samples
