"""What the shapes of Celery's canvas are made of in tests: tasks whose results are sizes, which go on.

`n(4)` allocates 4 bytes, `same` as many as the result before it; `total` and `listed` (tasks of another service) add a list
of them and give it back; `fails` fails.
"""

from __future__ import annotations

import json
from typing import Any

from celery import Signature, signature

from tests.direct.conftest import Caller
from tests.support.stack import eventually


class Shapes:
    """The tasks that shapes are made of."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def n(self, size_bytes: int) -> Signature:
        return self._caller.allocate(size_bytes)

    def taken(self, path: str) -> Signature:
        return self._caller.task("memory.allocate", {"size_bytes": {"$previous": path}})

    @property
    def same(self) -> Signature:
        return self.taken("size_bytes")

    @property
    def same_of_first(self) -> Signature:
        return self.taken("0.size_bytes")

    @property
    def total(self) -> Signature:
        return self._caller.plain("total")

    @property
    def listed(self) -> Signature:
        return self._caller.plain("note")

    @property
    def fails(self) -> Signature:
        return self._caller.refused()

    def read(self, text: str) -> Signature:
        return signature(json.loads(text), app=self._caller.app)

    def noted(self, name: str) -> Signature:
        """An immutable task of the other service that notes its name."""
        return self._caller.app.signature("plain.note", args=(name,), immutable=True)

    def errors(self, times: int, name: str = "error") -> list[dict[str, Any]]:
        """What was noted under `name`, once it was so often and no more comes."""

        def found() -> list[dict[str, Any]]:
            return [note for note in self._caller.notes() if name in note["args"]]

        eventually(lambda: len(found()) >= times)
        # A task that comes after whatever else was published.
        self.noted("last").apply_async().get(timeout=30)
        assert len(found()) == times
        return found()


def sizes(result: Any) -> Any:
    """A result with sizes in the place of allocations."""
    if isinstance(result, list):
        return [sizes(one) for one in result]
    return result["size_bytes"] if isinstance(result, dict) else result
