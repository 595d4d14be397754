"""What schemathesis sends besides what the API's description lets it make: NUL, long digits, and the like.

Loaded by schemathesis (`SCHEMATHESIS_HOOKS`); which cases are changed follows from the case itself, so a run can be
repeated by its seed.
"""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import httpx
import schemathesis

ODD = [
    "\x00", "a\x00b", "9" * 5000, "-" + "9" * 5000, "²", "9223372036854775808", "1e999", "nan", "\ud7ff", "\U0010ffff",
    "n" * 900, "%00", "[::1", " ", "'\"--",
]  # fmt: skip
ODD_NUMBERS = [2**63, -(2**63) - 1, 2**64, 10**300, 1e308, -1, 10**400]


@schemathesis.auth()
class Key:
    """The admin's key, which the checks leave out to see whether it was asked for."""

    def get(self, case: Any, context: Any) -> str:
        """The key itself."""
        return os.environ["TEST_API_KEY"]

    def set(self, case: Any, data: str, context: Any) -> None:
        """Puts it into the case's headers."""
        case.headers["X-API-Key"] = data


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Lets a device that was drained take jobs again, so that the cases after it reach one."""
    if case.path.endswith("/drain") and response.status_code == 200:
        address = response.request.url.replace("/drain", "/resume")
        httpx.post(address, headers={"X-API-Key": os.environ["TEST_API_KEY"]}, trust_env=False).raise_for_status()


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Puts something odd in the place of one value of every fifth case."""
    if case.method.upper() != case.operation.method.upper():
        return case  # it asks for a 405
    chance = random.Random(
        zlib.crc32(repr((case.path, case.method, case.path_parameters, case.query, case.body)).encode())
    )
    if chance.random() > 0.2:
        return case
    places = [part for part in (case.path_parameters, case.query) if part]
    body = case.body if isinstance(case.body, dict) and case.body else None
    if body is not None:
        places.append(body)
    if not places:
        return case
    place = chance.choice(places)
    _change(place, chance, ODD + ODD_NUMBERS if place is body else ODD)
    return case


def _change(place: Any, chance: random.Random, odd: list[Any]) -> None:
    name = chance.choice(sorted(place))
    if isinstance(place[name], dict) and place[name] and chance.random() < 0.7:
        _change(place[name], chance, odd)
    else:
        place[name] = chance.choice(odd)
