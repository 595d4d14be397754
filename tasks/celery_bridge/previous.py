"""Results that Celery passes on: where a request says `{"$previous": "path"}`, the previous task's result goes.

A chain, a callback and a chord's body give the result before them as a positional argument. A path names a part of it
by keys and numbers with dots between them (`outputs.y.data`, `0.allocation_id`); the empty path is the whole of it.
"""

from __future__ import annotations

from typing import cast

from device_operations.errors import failure
from device_operations.wire.json_types import FreeJson

#: The key that stands for a part of the previous result.
PREVIOUS = "$previous"

_HOW = (
    f'write {{"{PREVIOUS}": "path.to.a.field"}} where it belongs ("" for all of it), or make the signature immutable '
    "(signature.si(…), immutable=True), which leaves it out"
)


def filled(request: FreeJson, passed: list[object]) -> FreeJson:
    """The request with parts of the result that was `passed` on, if one was, where it asks for them.

    Raises `validation_failed` where the request asks for a result and none was passed on, where one was and the
    request does not say where it goes, and for a path that the result does not have.
    """
    if len(passed) > 1:
        raise failure("validation_failed", f"a task takes one positional argument at most, not {len(passed)}; {_HOW}")
    used: list[str] = []
    made = _filled(request, passed, used)
    if passed and not used:
        raise failure(
            "validation_failed",
            "the result of the previous task was passed on as a positional argument, and the request does not say "
            f"where it goes: {_HOW}",
        )
    # A request that is itself a reference becomes what that names.
    return dict(cast(FreeJson, made))


def _filled(value: object, passed: list[object], used: list[str]) -> object:
    if isinstance(value, list):
        return [_filled(inner, passed, used) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {PREVIOUS}:
        return {name: _filled(inner, passed, used) for name, inner in value.items()}
    path = value[PREVIOUS]
    if not isinstance(path, str):
        raise failure("validation_failed", f"{PREVIOUS} is a text: a path such as outputs.y")
    used.append(path)
    if not passed:
        raise failure("validation_failed", f"the request asks for {PREVIOUS} {path[:100]!r}, and no result came before")
    return _part(passed[0], path)


def _part(result: object, path: str) -> object:
    part = result
    for name in path.split(".") if path else ():
        try:
            part = part[int(name)] if isinstance(part, list) else _named(part, name)
        except (LookupError, TypeError, ValueError):
            raise failure(
                "validation_failed", f"the previous result has no {path[:100]!r}: nothing is at {name[:100]!r}"
            ) from None
    return part


def _named(value: object, name: str) -> object:
    if not isinstance(value, dict):
        raise TypeError
    return value[name]
