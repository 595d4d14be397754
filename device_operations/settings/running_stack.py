"""The file in which a running `up` notes the addresses and passwords of what it started."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from device_operations.wire.json_types import FreeJson

_log = logging.getLogger(__name__)


def stack_file(data_dir: Path) -> Path:
    """Where `up` notes the addresses and passwords of what it started (mode 0600)."""
    return data_dir / "stack.json"


def read_stack(data_dir: Path) -> FreeJson:
    """What a running `up` noted: `database_url`, `redis_url`, `http_url`, `flower_url`, `flower_password`; or `{}`."""
    try:
        noted = json.loads(stack_file(data_dir).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read and is ignored: %s", stack_file(data_dir), error)
        return {}
    return noted if isinstance(noted, dict) else {}
