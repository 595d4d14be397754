"""API keys as the settings hold them: the owner that each stands for, and how a list of them is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key and its owner. An admin sees and acts for every owner. The key does not show in its repr."""

    owner: str
    key: str = field(repr=False)
    admin: bool = False

    def __str__(self) -> str:
        return f"{self.owner}:{self.key}" + (":admin" if self.admin else "")


def parse_api_keys(value: object) -> tuple[ApiKey, ...]:
    """`owner:key`, `owner:key:admin`, comma separated; or JSON: a list of such texts or of objects."""
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else [part for part in value.split(",") if part]
    if not isinstance(value, list | tuple):
        raise ValueError("not a list of keys")
    keys = tuple(_read_key(entry) for entry in value)
    if len({key.key for key in keys}) != len(keys):
        raise ValueError("the same key is given twice")
    return keys


def _read_key(entry: object) -> ApiKey:
    if isinstance(entry, ApiKey):
        return entry
    if isinstance(entry, Mapping):
        if set(entry) - {"owner", "key", "admin"}:
            raise ValueError("a key has owner, key and admin, and nothing else")
        owner, key, admin = entry.get("owner"), entry.get("key"), entry.get("admin", False)
    else:
        parts = str(entry).strip().split(":")
        if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] != "admin"):
            raise ValueError("a key is not of the form owner:key or owner:key:admin")
        owner, key, admin = parts[0], parts[1], len(parts) == 3
    if not isinstance(owner, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}", owner):
        raise ValueError("an owner is not 1 to 100 letters, digits and . _ @ -")
    if not isinstance(key, str) or len(key) < 8 or not key.isprintable() or " " in key:
        raise ValueError("a key is shorter than 8 printable characters")
    if not isinstance(admin, bool):
        raise ValueError("admin is not true or false")
    return ApiKey(owner, key, admin)
