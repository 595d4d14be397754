"""The announcement of ended jobs: one line for each, `<id> <kind> <job as callers see it, in JSON>`.

A gateway reads the first two words of each line, and the JSON only of the jobs that it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from tasks.jobs.model import JobView


@dataclass(frozen=True, slots=True)
class Announcement:
    """One line, as it came: nothing of it is checked yet."""

    job_id: bytes
    kind: bytes
    #: The job in JSON.
    text: bytes


def line(job: JobView) -> bytes:
    """The line of an ended job. JSON has no line feed, and neither id nor kind has a space."""
    return f"{job['job_id']} {job['kind']} ".encode() + orjson.dumps(job, option=orjson.OPT_UTC_Z)


def read_lines(data: bytes) -> list[Announcement]:
    """The announcements of one message."""
    return [Announcement(*_words(one)) for one in data.split(b"\n")]


def _words(one: bytes) -> tuple[bytes, bytes, bytes]:
    job_id, _, rest = one.partition(b" ")
    kind, _, text = rest.partition(b" ")
    return job_id, kind, text
