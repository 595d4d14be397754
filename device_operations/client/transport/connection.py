"""How both clients reach the gateway: the URL, the key, the time-outs, and what a call becomes in httpx's words."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import httpx
import orjson

from device_operations import settings
from device_operations.client.transport.calls import Call
from device_operations.wire.json_types import FreeJson

#: A body on its way to the gateway.
Pieces: TypeAlias = Iterator[bytes | memoryview] | AsyncIterator[bytes | memoryview]

#: Where a streamed response keeps the iterator over its body.
PIECES = "device_operations_pieces"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the gateway is, as far as the caller said; the settings say the rest when it is first needed."""

    base_url: str | None
    api_key: str | None
    timeout: float

    def options(self) -> FreeJson:
        """The arguments of an httpx client. Raises `SettingsError` where settings are needed and wrong."""
        url, key = self.base_url, self.api_key
        if url is None:
            found = settings.read()
            url = settings.gateway_url(found)
            key = key or next((known.key for known in found.api_keys), None)
        return {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": self.timeout,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
            # A proxy of the environment knows no way to this machine's loopback.
            "trust_env": not _is_loopback(url),
        }


def request_options(call: Call, timeout_seconds: float, pieces: Pieces | None) -> FreeJson:
    """The arguments of `build_request` for a call; `pieces` iterates over its content, if it has any."""
    headers = dict(call.headers)
    options: FreeJson = {
        "method": call.method,
        "url": call.path,
        "params": {name: _text(value) for name, value in call.params.items() if value is not None} or None,
        "timeout": httpx.Timeout(timeout_seconds, read=timeout_seconds + call.waits_seconds),
    }
    if call.content is not None:
        options["content"] = pieces
        headers |= call.content.headers()
    elif call.json is not None:
        options["content"] = orjson.dumps(call.json)
        headers["Content-Type"] = "application/json"
    return options | {"headers": headers}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
