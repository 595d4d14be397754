"""Redis keys that have a type other than the one this service keeps there: nothing can be read from them or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import redis
import structlog
from redis.exceptions import ResponseError, WatchError

T = TypeVar("T")
log = structlog.get_logger(__name__)


def with_types(client: redis.Redis, expected: Mapping[str, str], step: Callable[[], T]) -> T:
    """What `step` gives; once more if it failed because one of our keys had another type than `expected` names."""
    try:
        return step()
    except ResponseError as error:
        # Within a pipeline the word is not the first.
        if "WRONGTYPE" not in str(error):
            raise
        remove_wrong_types(client, expected)
        return step()


def remove_wrong_types(client: redis.Redis, expected: Mapping[str, str]) -> None:
    """Removes those of our keys whose type is not the one `expected` names (`list`, `hash`, …).

    What lies there was not put there by this service and is no message, and while it lies there none can come.
    """
    for key, kind in expected.items():
        with client.pipeline() as pipe:
            try:
                pipe.watch(key)
                answer = pipe.type(key)
                found = answer.decode() if isinstance(answer, bytes) else answer
                if found in (kind, "none"):
                    continue
                pipe.multi()
                pipe.delete(key)
                pipe.execute()
            except WatchError:
                continue
        log.warning("key of a wrong type removed", key=key, found=found, expected=kind)
