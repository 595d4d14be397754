"""Models that no open job and no open session needs: what may leave its device."""

from __future__ import annotations

from sqlalchemy import Connection

from tasks.inference.models import LIVE
from tasks.inference.rows import IdleGraph
from tasks.statements import rows

#: Whether nothing that is open needs the model `m`: no job, and no session.
_IDLE = """NOT EXISTS (SELECT 1 FROM jobs j WHERE j.device_id = m.device_id
            AND j.finished_at IS NULL AND m.model_id = ANY(j.needs))
        AND NOT EXISTS (SELECT 1 FROM inference_sessions s WHERE s.model_id = m.model_id AND s.state = 'active')"""


def evictable_graphs(connection: Connection, device_id: str) -> list[IdleGraph]:
    """Graphs that can go: all their models are loaded, idle, and unpinned or replaced. The least recently used first.

    Rows have `content_key`, `reserved_bytes` and `model_ids`.
    """
    return rows(
        connection,
        f"""
        SELECT g.content_key, g.reserved_bytes, array_agg(m.model_id) AS model_ids
        FROM graphs g JOIN models m USING (device_id, content_key)
        WHERE g.device_id = %(id)s AND m.state IN {LIVE} GROUP BY g.content_key, g.reserved_bytes
        HAVING bool_and(m.state = 'loaded' AND (NOT m.pinned OR m.replaced_by IS NOT NULL) AND {_IDLE})
        ORDER BY bool_and(m.replaced_by IS NOT NULL) DESC, max(m.last_used_at)
        """,
        {"id": device_id},
    )


def idle(connection: Connection, device_id: str, idle_seconds: float) -> list[str]:
    """Loaded, unpinned models that nothing open needs and that were last used so long ago."""
    found = rows(
        connection,
        f"""
        SELECT m.model_id FROM models m WHERE device_id = %(id)s AND state = 'loaded' AND NOT pinned AND {_IDLE}
          AND last_used_at < clock_timestamp() - make_interval(secs => %(idle)s)
        """,
        {"id": device_id, "idle": idle_seconds},
    )
    return [model["model_id"] for model in found]


def replaced(connection: Connection, device_id: str, seconds_ago: float) -> list[str]:
    """Models that were replaced so long ago and that nothing open needs."""
    found = rows(
        connection,
        f"""
        SELECT m.model_id FROM models m WHERE device_id = %(id)s AND state IN ('loaded', 'lost')
          AND replaced_at < clock_timestamp() - make_interval(secs => %(ago)s) AND {_IDLE}
        """,
        {"id": device_id, "ago": seconds_ago},
    )
    return [model["model_id"] for model in found]
