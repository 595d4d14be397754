"""A worker that dies at one point of giving an ended job to Celery: the environment's `DIES_AT` says which."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.backends.base import Backend

from tasks.celery_bridge.once import Once
from tasks.celery_bridge.outbox import Outbox
from tasks.celery_bridge.results import CeleryResults
from workers.__main__ import main


def _die(*_: Any, **__: Any) -> Any:
    os._exit(9)


def _die_at(point: str) -> None:
    give_once = Once.once

    @contextmanager
    def once(self: Once, mark: str) -> Iterator[Any]:
        if not mark.endswith(".chord"):
            with give_once(self, mark) as sent:
                yield sent
                if point == "before a part's own errbacks":
                    _die()
        elif point == "before the body":
            _die()
        elif point == "before a part's own errbacks":
            with give_once(self, mark) as sent:
                yield sent
        else:
            with give_once(self, mark) as sent:
                yield sent
            _die()

    if point == "before anything":
        Outbox._give = _die  # type: ignore[method-assign]
    elif point == "after the callbacks":
        CeleryResults.store = _die  # type: ignore[method-assign]
    elif point == "after the result":
        Outbox._settle = _die  # type: ignore[method-assign]
    elif point == "within the chord's error":
        Backend.fail_from_current_stack = _die
    else:
        Once.once = once  # type: ignore[method-assign]


if __name__ == "__main__":
    _die_at(os.environ["DIES_AT"])
    sys.exit(main())
