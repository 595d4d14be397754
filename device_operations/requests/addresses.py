"""Which network addresses a webhook may reach: public ones, also where IPv4 is written inside IPv6.

check_webhook_url(url)      the URL's form, at submission
refuse_private(url)         a host that is written as an address, at submission
is_public(address)          each address that a host's name resolved to, when it is called
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import SplitResult, urlsplit

from device_operations.errors import failure

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Ranges of IPv4 that are not hosts of the public internet.
_PRIVATE_V4 = [
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
    )
]  # fmt: skip

#: The only range of IPv6 from which public addresses are given out, and what lies in it and is none.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE_V6 = [
    ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "3fff::/20", "3ffe::/16")
]  # fmt: skip

#: Prefixes of IPv6 behind which the last 32 bits are an IPv4 address: compatible, mapped, translated (SIIT), NAT64.
_EMBEDDING_96 = [ipaddress.IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")]
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")
_TEREDO = ipaddress.IPv6Network("2001::/32")

#: The interface identifiers of ISATAP, whose last 32 bits are an IPv4 address.
_ISATAP = (0x00005EFE, 0x02005EFE)

#: What a URL's host may consist of; other scripts are written in their ASCII form (punycode).
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address belongs to a host of the public internet, seen through every way to embed IPv4.

    Loopback, private, link-local, site-local, shared (100.64/10), multicast, unspecified and reserved addresses are
    not public, nor is an address with a zone.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return _is_public_v4(found)
    if found.scope_id is not None:
        return False
    inner = embedded(found)
    if inner:
        return all(_is_public_v4(one) for one in inner)
    return found in _GLOBAL_V6 and not any(found in network for network in _PRIVATE_V6)


def embedded(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that packets to this IPv6 address may end up at; none for an ordinary one."""
    number = int(address)
    last = ipaddress.IPv4Address(number & 0xFFFFFFFF)
    if any(address in network for network in _EMBEDDING_96):
        return [last]
    if address in _SIX_TO_FOUR:
        return [ipaddress.IPv4Address(number >> 80 & 0xFFFFFFFF)]
    if address in _TEREDO:
        # The server's address, and the client's with every bit inverted.
        return [ipaddress.IPv4Address(number >> 64 & 0xFFFFFFFF), ipaddress.IPv4Address(int(last) ^ 0xFFFFFFFF)]
    if number >> 32 & 0xFFFFFFFF in _ISATAP:
        return [last]
    return []


def check_webhook_url(url: str) -> str:
    """The URL itself if it is http or https, with a host and without user and password. Raises `ValueError`."""
    split_url(url)
    return url


def split_url(url: str) -> SplitResult:
    """The parts of a URL that may be called. Raises `ValueError` saying what is wrong with it."""
    if not url.isascii() or not url.isprintable() or set(url) & set(' "<>\\^`{|}'):
        raise ValueError("a URL has printable ASCII characters only: write others percent-encoded, hosts as punycode")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("the URL begins with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("the URL may not hold user and password")
    host = parts.hostname
    if not host or not _HOST.fullmatch(host):
        raise ValueError("the URL names no host that can be called")
    if parts.netloc.startswith("["):
        ipaddress.IPv6Address(host)
    # An int, None, or a ValueError for what is no port.
    if parts.port == 0 or parts.netloc.endswith(":"):
        raise ValueError("the URL's port is not 1 to 65535")
    return parts


def literal(host: str) -> _Address | None:
    """The address that a host's text is, in any spelling that the system's resolver takes (`127.1`, `0x7f000001`)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def refuse_private(url: str) -> None:
    """`validation_failed` for a URL whose host is written as an address that is not public, or means this machine."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    address = literal(host)
    if host == "localhost" or host.endswith(".localhost") or (address is not None and not is_public(str(address))):
        raise failure(
            "validation_failed",
            f"job.webhook_url: {host} is not a public address; the service's operator may allow such addresses with "
            "WEBHOOK__ALLOW_PRIVATE",
        )


def _is_public_v4(address: ipaddress.IPv4Address) -> bool:
    return not any(address in network for network in _PRIVATE_V4)
