"""The names of settings in the environment, and what is said of a wrong one: name, value (masked) and what is allowed.

It knows pydantic's models and errors, and none of our settings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from pydantic.config import JsonDict
    from pydantic_core import ErrorDetails

PREFIX = "DEVICE_OPERATIONS_"

#: Marks a field whose value is never shown: `Field(json_schema_extra=SECRET)`.
SECRET: JsonDict = {"secret": True}

_MASK = "********"


def environment_name(path: tuple[str, ...]) -> str:
    """`("http", "port")` as the environment has it: `DEVICE_OPERATIONS_HTTP__PORT`."""
    return PREFIX + "__".join(path).upper()


def leaves(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every single setting below a model: its path and its field."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*above, name))
        else:
            yield (*above, name), field


def is_secret(field: FieldInfo) -> bool:
    """Whether the setting's value must not be shown."""
    return bool(isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("secret"))


def masked(value: object) -> str:
    """A URL without its password, API keys without their keys, and anything else as stars."""
    text = str(value)
    if "://" in text:  # A password may hold any character, a slash too: up to the last @ it is all one.
        without = re.sub(r"://([^:@/?]*):.*@", rf"://\1:{_MASK}@", text, flags=re.DOTALL)
        return re.sub(r"\?.*", f"?{_MASK}", without, flags=re.DOTALL)
    if re.fullmatch(r"[^:,\s]+:[^:,]+(:admin)?(,[^:,\s]+:[^:,]+(:admin)?)*", text):
        return re.sub(r"(^|,)([^:,]+):[^:,]+", rf"\1\2:{_MASK}", text)
    return _MASK


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the one that was probably meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else f": the settings are {', '.join(known)}"


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Pydantic's errors, one sentence each."""
    return "\n".join(_explain(item, dict(leaves(model))) for item in error.errors())


def _explain(item: ErrorDetails, known: dict[tuple[str, ...], FieldInfo]) -> str:
    location = tuple(str(part) for part in item["loc"])
    path = next((location[:length] for length in range(len(location), 0, -1) if location[:length] in known), location)
    name = environment_name(path)
    if path not in known:
        reason = "must be a table" if item["type"] != "extra_forbidden" else "is no setting"
        return f"{name} {reason}{nearest(name, [environment_name(one) for one in known])}"
    value = masked(item["input"]) if is_secret(known[path]) else item["input"]
    message = item["msg"].removeprefix("Value error, ")
    return f"{name} is {value!r}: {message}. Allowed: {known[path].description}"
