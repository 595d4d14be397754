"""Graphs: what lies on a device for the models that share it, and its share of the device's budget.

A graph's row is locked before the models of its key are counted, and after the rows of those models: whoever joins a
graph and whoever leaves it meet there. The device's budget comes last.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from tasks.store.connection import row, rows
from tasks.store.models import LIVE


def join(connection: Connection, device_id: str, content_key: str, reserved_bytes: int) -> bool:
    """Locks the graph's row until the transaction ends; True where that made it, with so many bytes to be reserved."""
    found = row(
        connection,
        """
        INSERT INTO graphs (device_id, content_key, reserved_bytes) VALUES (%(device)s, %(key)s, %(reserved)s)
        ON CONFLICT (device_id, content_key) DO UPDATE SET reserved_bytes = graphs.reserved_bytes
        RETURNING xmax = 0 AS made
        """,
        {"device": device_id, "key": content_key, "reserved": reserved_bytes},
    )
    return bool(found and found["made"])


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
    found = row(
        connection,
        """
        UPDATE graphs SET reserved_bytes = %(bytes)s FROM (SELECT reserved_bytes AS before FROM graphs
            WHERE device_id = %(device)s AND content_key = %(key)s FOR UPDATE) AS old
        WHERE device_id = %(device)s AND content_key = %(key)s RETURNING before
        """,
        {"device": device_id, "key": content_key, "bytes": memory_bytes},
    )
    return memory_bytes - int(found["before"]) if found else 0


def leave(connection: Connection, device_id: str, content_keys: Collection[str]) -> int:
    """Models have left these graphs of one device: those without any model go. Gives the bytes that were reserved."""
    given = {"device": device_id, "keys": sorted(set(content_keys))}
    where = "device_id = %(device)s AND content_key = ANY(%(keys)s)"
    # In a statement of its own: what joined until the lock was given is counted by the next.
    rows(connection, f"SELECT 1 FROM graphs WHERE {where} ORDER BY content_key FOR UPDATE", given)
    gone = rows(
        connection,
        f"""
        DELETE FROM graphs g WHERE {where} AND NOT EXISTS (SELECT 1 FROM models m
            WHERE m.device_id = g.device_id AND m.content_key = g.content_key AND m.state IN {LIVE})
        RETURNING reserved_bytes
        """,
        given,
    )
    return sum(int(graph["reserved_bytes"]) for graph in gone)
