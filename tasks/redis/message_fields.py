"""What each field of a message may be: a table for each part of a message, of field names and their checks.

A field that is absent is None. What a table does not name is left out by `checked`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TypeGuard

from device_operations.jobs import Kind
from device_operations.wire.ids import is_job_id
from device_operations.wire.json_types import FreeJson

#: A part's fields, and whether a value may be theirs.
Fields = Mapping[str, Callable[[object], bool]]

#: Characters of a header's text at most. Celery cuts what it makes of arguments at 1,024.
TEXT_CHARACTERS = 8192

#: Numbers that JSON's writers and PostgreSQL's bigint agree on.
_MAX_NUMBER = 2**63 - 1

_SEGMENT_NAME = re.compile(r"devop-[0-9a-f]{10}-[0-9]{1,20}-[0-9]{1,20}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class Unreadable(Exception):
    """The message is not what it should be. The text says why, in one line, without any of its content."""


def object_of(value: object, what: str) -> FreeJson:
    """`value`, which must be an object; `what` names it in the error."""
    if type(value) is not dict:
        raise Unreadable(f"{what} is no object")
    return value


def checked(given: FreeJson, fields: Fields) -> FreeJson:
    """The known fields of an object, as far as they are given."""
    known = {}
    for name, fits in fields.items():
        value = given.get(name)
        if not fits(value):
            raise Unreadable(f"{name} is not what it should be")
        if value is not None:
            known[name] = value
    return known


def checked_all(given: FreeJson, fields: Fields) -> FreeJson:
    """The known fields of an object, all of them; None where one is absent."""
    known = {}
    for name, fits in fields.items():
        value = known[name] = given.get(name)
        if not fits(value):
            raise Unreadable(f"{name} is not what it should be")
    return known


def is_kind(task: object) -> TypeGuard[str]:
    """Whether the task is one of a job's kind."""
    return type(task) is str and task in _TASKS


_TASKS = frozenset(kind.task for kind in Kind)


def _is_name(value: object) -> bool:
    return type(value) is str and 0 < len(value) <= 255 and value.isprintable()


def _is_text(value: object) -> bool:
    return value is None or (type(value) is str and len(value) <= TEXT_CHARACTERS and "\0" not in value)


def _is_other_id(value: object) -> bool:
    return value is None or is_job_id(value)


def _is_flag(value: object) -> bool:
    return value is None or type(value) is bool


def _is_count(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= _MAX_NUMBER)


def _is_clock(value: object) -> bool:
    # Celery's clocks go on counting from the highest that they were given.
    return value is None or (type(value) is int and 0 <= value < 2**53)


def _is_seconds(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 2**53)


def _is_time(value: object) -> bool:
    if value is None:
        return True
    if type(value) is not str or len(value) > 64:
        return False
    try:
        # Celery moves times between zones, which the first and the last year do not survive.
        return 1970 <= datetime.fromisoformat(value).year <= 9000
    except ValueError:
        return False


def _is_timelimit(value: object) -> bool:
    return value is None or (type(value) is list and len(value) == 2 and all(map(_is_seconds, value)))


def _is_list(value: object) -> bool:
    return value is None or type(value) is list


def _is_object(value: object) -> bool:
    return value is None or type(value) is dict


def _is_names(value: object) -> bool:
    return value is None or (type(value) is list and all(map(_is_name, value)))


def _is_job_ids(value: object) -> bool:
    return type(value) is list and all(map(is_job_id, value))


HEADERS: Fields = {
    "id": is_job_id, "task": _is_name, "lang": _is_text, "root_id": _is_other_id, "parent_id": _is_other_id,
    "group": _is_other_id, "group_index": _is_count, "meth": _is_text, "shadow": _is_text, "eta": _is_time,
    "expires": _is_time, "retries": _is_count, "timelimit": _is_timelimit, "argsrepr": _is_text,
    "kwargsrepr": _is_text, "origin": _is_text, "ignore_result": _is_flag, "replaced_task_nesting": _is_count,
    "stamped_headers": _is_names, "stamps": _is_object,
}  # fmt: skip

PROPERTIES: Fields = {
    "correlation_id": _is_other_id, "reply_to": _is_text, "priority": _is_count, "delivery_mode": _is_count,
}  # fmt: skip

EMBED: Fields = {
    "callbacks": _is_list, "errbacks": _is_list, "chain": _is_list, "chord": _is_object,
}  # fmt: skip

NOTED_HEADERS: Fields = {
    "id": is_job_id, "task": is_kind, "argsrepr": _is_text, "kwargsrepr": _is_text,
}  # fmt: skip

NOTED: Fields = {
    "seq": lambda value: type(value) is int and 0 <= value <= _MAX_NUMBER,
    "priority": lambda value: type(value) is int and 0 <= value <= 9,
    "after": _is_job_ids,
    "needs": lambda value: type(value) is list and all(map(_is_name, value)),
}

WAKE: Fields = {"cancel": _is_other_id, "follow": _is_other_id, "send": _is_object}

#: The blob's and the segment's names become names of files.
SEND: Fields = {
    "key": lambda value: type(value) is str and len(value) <= 400,
    "to": _is_name,
    "allocation_id": _is_name,
    "offset": lambda value: type(value) is int and 0 <= value <= _MAX_NUMBER,
    "size_bytes": lambda value: type(value) is int and 0 <= value <= _MAX_NUMBER,
    "blob_id": lambda value: type(value) is str and bool(_FILE_NAME.fullmatch(value)),
    "ring": lambda value: value is None or (type(value) is str and bool(_SEGMENT_NAME.fullmatch(value))),
}

NOTICE_HEADERS: Fields = {"clock": _is_clock, "expires": _is_seconds, "ticket": _is_text}

REMOTE_CONTROL: Fields = {
    "method": _is_name,
    "arguments": _is_object,
    "destination": _is_names,
    "pattern": lambda value: value is None or _is_name(value),
    # The other one, a caller's own regular expression, may take for ever.
    "matcher": lambda value: value is None or value == "glob",
    "ticket": _is_text,
    "reply_to": lambda value: value is None or (type(value) is dict and all(map(_is_name, value.values()))),
}
