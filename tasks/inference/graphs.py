"""Graphs: what lies on a device for the models that share it, and its share of the device's budget.

Models join and leave graphs under the lock of their device's budget, which is taken before any row of a model.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from tasks.inference.models import LIVE
from tasks.statements import execute, row, rows


def join(connection: Connection, device_id: str, content_key: str, reserved_bytes: int) -> bool:
    """Records the graph unless it is there; True where that made it, with so many bytes to be reserved."""
    return bool(
        execute(
            connection,
            "INSERT INTO graphs (device_id, content_key, reserved_bytes) VALUES (%(device)s, %(key)s, %(reserved)s) "
            "ON CONFLICT DO NOTHING",
            {"device": device_id, "key": content_key, "reserved": reserved_bytes},
        )
    )


def reserved(connection: Connection, device_id: str, content_key: str) -> int:
    """Bytes reserved for the graph; 0 where there is none."""
    found = row(
        connection,
        "SELECT reserved_bytes FROM graphs WHERE device_id = %(device)s AND content_key = %(key)s",
        {"device": device_id, "key": content_key},
    )
    return int(found["reserved_bytes"]) if found else 0


def settle(connection: Connection, device_id: str, content_key: str, memory_bytes: int) -> int:
    """The graph takes `memory_bytes`, as measured; gives how many more that are than were reserved."""
    before = reserved(connection, device_id, content_key)
    execute(
        connection,
        "INSERT INTO graphs (device_id, content_key, reserved_bytes) VALUES (%(device)s, %(key)s, %(bytes)s) "
        "ON CONFLICT (device_id, content_key) DO UPDATE SET reserved_bytes = excluded.reserved_bytes",
        {"device": device_id, "key": content_key, "bytes": memory_bytes},
    )
    return memory_bytes - before


def leave(connection: Connection, device_id: str, content_keys: Collection[str]) -> int:
    """Models have left these graphs of one device: those without any model go. Gives the bytes that were reserved."""
    gone = rows(
        connection,
        f"""
        DELETE FROM graphs g WHERE device_id = %(device)s AND content_key = ANY(%(keys)s)
          AND NOT EXISTS (SELECT 1 FROM models m
            WHERE m.device_id = g.device_id AND m.content_key = g.content_key AND m.state IN {LIVE})
        RETURNING reserved_bytes
        """,
        {"device": device_id, "keys": list(content_keys)},
    )
    return sum(int(graph["reserved_bytes"]) for graph in gone)
