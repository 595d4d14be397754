"""`python -m api_gateway`: serves HTTP with uvicorn."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys

import structlog
import uvicorn
from starlette.types import ASGIApp

from api_gateway.app import create_app
from api_gateway.guard import Guard
from api_gateway.oip.infer import InferMiddleware
from device_operations.folders import keep_private
from device_operations.settings import Settings, SettingsError, load
from tasks.logs import configure

log = structlog.get_logger(__name__)

#: Files that a gateway has open besides its callers' connections: the database's, Redis's, blobs on their way.
OTHER_FILES = 500


def main() -> int:
    """Serves until stopped. Exit status 2 for settings that cannot be served with, 3 for a port that is taken."""
    try:
        settings = load()
        configure(settings, "gateway")
        keep_private()
        _require_keys_beyond_loopback(settings)
        app = create_app(settings)
        settings.require_database_url()
        settings.require_redis_url()
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    taken = _port_taken(settings.http.host, settings.http.port)
    if taken:
        print(
            f"gateway: cannot listen on {settings.http.host}:{settings.http.port}: {taken}; "
            "set DEVICE_OPERATIONS_HTTP__PORT to a free port",
            file=sys.stderr,
        )
        return 3
    _allow_open_files(settings.http.max_connections)
    served, protocol = _http_path(Guard(InferMiddleware(app), settings), settings)
    uvicorn.run(
        served,
        host=settings.http.host,
        port=settings.http.port,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=65,
        backlog=2048,
        server_header=False,
        date_header=False,
    )
    return 0


def _http_path(app: ASGIApp, settings: Settings) -> tuple[ASGIApp, type[asyncio.Protocol]]:
    """The application and uvicorn's protocol for it, on the path that is set; only that one is imported."""
    if settings.http.fast_path:
        from api_gateway.fast_path.wire import Protocol

        return app, Protocol.limited_to(settings.http.max_connections)
    from api_gateway.plain_path.application import PlainPath
    from api_gateway.plain_path.protocol import PlainProtocol

    return PlainPath(app), PlainProtocol.limited_to(settings.http.max_connections)


def _require_keys_beyond_loopback(settings: Settings) -> None:
    """Refuses to listen beyond loopback without API keys: any caller who reaches the port could do anything."""
    if settings.api_keys:
        return
    if not _is_loopback(settings.http.host):
        raise SettingsError(
            f"DEVICE_OPERATIONS_HTTP__HOST is {settings.http.host!r}, which others can reach, and no "
            "DEVICE_OPERATIONS_API_KEYS are set; set keys (owner:key, …), or listen on 127.0.0.1"
        )
    log.warning("no API keys are set: any process on this machine may submit and cancel jobs")


def _allow_open_files(connections: int) -> None:
    """Raises the process's own limit on open files, where it is below what so many connections need."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        log.warning("fewer open files are allowed than HTTP__MAX_CONNECTIONS needs", allowed=hard, needed=wanted)
        wanted = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_loopback(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _port_taken(host: str, port: int) -> str | None:
    """Why the port cannot be bound; checked first, since uvicorn would only log it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
