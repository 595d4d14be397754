"""Authentication: an API key in `Authorization: Bearer …` or `X-API-Key` stands for an owner."""

from __future__ import annotations

import hmac
import ipaddress
from functools import lru_cache
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from api_gateway.gateway import Caller, of
from device_operations.errors import failure

#: The caller if no keys are set, which is allowed on loopback only.
ANYONE = Caller("default", admin=True)

#: No name of a host, with its port and scheme, is longer.
MAX_NAME = 300


def authenticate(request: Request) -> Caller:
    """The caller of a request; `unauthorized` where keys are set and none of them came along."""
    keys = of(request).settings.api_keys
    if not keys:
        refuse_other_sites(request)
        return ANYONE
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    found = None
    # Every key is compared, so that the time taken does not show which one came close.
    for known in keys:
        if hmac.compare_digest(known.key.encode(), given.encode()):
            found = Caller(known.owner, known.admin)
    if found is None:
        raise failure("unauthorized", "send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    return found


def refuse_other_sites(request: Request) -> None:
    """Without keys, a page of another site in this machine's browser must not be able to submit jobs.

    Browsers say where a request comes from; a name that was made to point here shows in `Host`.
    """
    headers = request.headers
    host, origin, site = headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site", "none")
    if max(len(host), len(origin or ""), len(site)) > MAX_NAME:
        raise failure("forbidden", f"Host, Origin or Sec-Fetch-Site has more than {MAX_NAME} characters")
    refused = _refused(host, origin, site)
    if refused:
        raise failure("forbidden", refused)


@lru_cache(1024)
def _refused(host: str, origin: str | None, fetch_site: str) -> str | None:
    """Why a request with these headers is refused. Asked once for each client, not for each of its requests."""
    name = _name_of(host)
    if not (name == "localhost" or name.endswith(".localhost") or _is_loopback(name)):
        return f"Host is {name[:255]!r}; without API keys only this machine itself is served"
    elsewhere = origin is not None and origin not in (f"http://{host}", f"https://{host}")
    if elsewhere or fetch_site not in ("none", "same-origin"):
        return "a page of another site asked for this; set API_KEYS to let other sites in"
    return None


def _name_of(host: str) -> str:
    """The name or address in a `Host` header; empty where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_admin(caller: Caller) -> None:
    """Refuses a caller who is not an admin."""
    if not caller.admin:
        raise failure("forbidden", f"this is for admins; the key stands for {caller.owner!r}")


Known = Annotated[Caller, Depends(authenticate)]
