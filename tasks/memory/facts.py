"""What a worker finds out about memory jobs, for the effects of their ends."""

from __future__ import annotations

from typing import TypedDict


class HashFacts(TypedDict, total=False):
    """Of a copy, clear, write or read."""

    #: The hash of all bytes of the allocation after the job; None if it is not known.
    sha256: str | None
