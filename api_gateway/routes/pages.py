"""The dashboard at `/`: a page and its files, which call the API like any other client; nothing here knows a job."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from device_operations.errors import failure

router = APIRouter(include_in_schema=False)

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

#: Everything that the page may load or reach is this gateway's. No inline script or style: what a job's label says is
#: text, and would stay so even if the page put it down as markup.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Asked for each time and answered by 304 while it is the same: an upgrade shows at once.
    "Cache-Control": "no-cache",
}


def _load() -> dict[str, tuple[bytes, str, str]]:
    """Each file's bytes, type and ETag, by its name."""
    found = {}
    for file in files("api_gateway").joinpath("static").iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            content = file.read_bytes()
            found[file.name] = (content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


_FILES = _load()


@router.get("/")
async def dashboard(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.get("/static/{name}")
async def static_file(request: Request, name: str) -> Response:
    """One of the page's files, by a name that is known: no path is made from the request."""
    if name not in _FILES:
        raise failure("not_found", f"GET {request.url.path}: the dashboard has no such file")
    return _answer(request, name)


@router.get("/favicon.ico")
async def favicon(request: Request) -> Response:
    """What browsers request by themselves."""
    return _answer(request, "icon.svg")


def _answer(request: Request, name: str) -> Response:
    content, kind, tag = _FILES[name]
    headers = {**_HEADERS, "ETag": tag}
    known = [text.strip().removeprefix("W/") for text in request.headers.get("if-none-match", "").split(",")]
    if tag in known:
        return Response(None, 304, headers)
    return Response(content, 200, headers, kind)
