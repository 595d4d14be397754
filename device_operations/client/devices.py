"""Devices over HTTP: what there is, drain and resume, the history."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias, cast

from device_operations.client.transport.calls import Call, Flow, at, get, json_of, send
from device_operations.client.transport.operations import Mode, Noun, operation
from device_operations.views import DeviceSample, DeviceView

#: Names of their own, since `list` is a method below.
DeviceViews: TypeAlias = list[DeviceView]
DeviceSamples: TypeAlias = list[DeviceSample]


class Devices(Noun[Mode]):
    """The methods on devices. A device is the object that `GET /api/devices/{device_id}` gives."""

    @operation
    def list(self) -> Flow[DeviceViews]:
        """Every device that ever registered."""
        answer = yield from get("/api/devices")
        devices: DeviceViews = answer["devices"]
        return devices

    @operation
    def get(self, device_id: str) -> Flow[DeviceView]:
        """One device; `device_not_found` where there is none."""
        return cast("DeviceView", (yield from get(at("/api/devices/{}", device_id))))

    @operation
    def drain(self, device_id: str) -> Flow[DeviceView]:
        """The device takes no new jobs; for admins."""
        response = yield from send(Call("POST", at("/api/devices/{}/drain", device_id)))
        return cast("DeviceView", json_of(response))

    @operation
    def resume(self, device_id: str) -> Flow[DeviceView]:
        """The device takes jobs again; for admins."""
        response = yield from send(Call("POST", at("/api/devices/{}/resume", device_id)))
        return cast("DeviceView", json_of(response))

    @operation
    def samples(self, device_id: str, since: datetime | None = None) -> Flow[DeviceSamples]:
        """The device's history after `since`, oldest first."""
        after = None if since is None else since.astimezone().isoformat()
        answer = yield from get(at("/api/devices/{}/samples", device_id), since=after)
        samples: DeviceSamples = answer["samples"]
        return samples
