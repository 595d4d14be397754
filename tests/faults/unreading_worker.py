"""A worker that can read no recorded job's message, as if its record made ever the same unreadable one."""

from __future__ import annotations

import sys

from tasks.celery_bridge import transport
from tasks.redis.message_fields import Unreadable
from tasks.redis.messages import Direct, RecordedMessage, read
from workers.__main__ import main


def _read(raw: bytes) -> RecordedMessage | Direct:
    message = read(raw)
    if isinstance(message, RecordedMessage):
        raise Unreadable("no recorded job's message is readable in this test")
    return message


transport.messages.read = _read  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.exit(main())
