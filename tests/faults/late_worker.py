"""A worker on the CPU that records lost ends again only HOLD_SECONDS after it found that they may be lost.

As one does whose completer has something long to write first. Only the delay is put in.
"""

from __future__ import annotations

import os
import sys
import time

from tasks.jobs.unflushed import Unflushed
from workers.__main__ import main

_record_again = Unflushed._record_again
_found_at: list[float] = []


def _record_late(self: Unflushed) -> None:
    _found_at.append(time.monotonic())
    if time.monotonic() - _found_at[0] >= float(os.environ["HOLD_SECONDS"]):
        _record_again(self)
        _found_at.clear()


Unflushed._record_again = _record_late  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
