"""The training sessions of one device between their jobs. Loads torch only where there is a session to care for.

Everything here runs on the device's thread.
"""

from __future__ import annotations

import shutil
from contextlib import suppress

from tasks.training import sessions as store
from workers.resident.residents import Resident


def bring_sessions_back(resident: Resident) -> None:
    """Makes the sessions of the last epoch resident again, before any job is taken."""
    # What a killed worker left half-written; none of it is recorded.
    with suppress(FileNotFoundError):
        shutil.rmtree(resident.spool)
    with resident.engine.connect() as connection:
        rows = store.to_bring_back(connection, resident.device_id)
    if rows:
        from workers.operations.training.restoring import restore_all

        restore_all(resident, rows)


def look_after_sessions(resident: Resident) -> None:
    """Lets go of sessions that have ended, and of those that were not used for their lease."""
    if resident.training:
        from workers.operations.training.sessions import let_go

        let_go(resident)
