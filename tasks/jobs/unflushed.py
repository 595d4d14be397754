"""Ends that were announced before the disk had them, kept until it has.

    end (commit does not wait) ─▶ kept ─▶ announced ─▶ PostgreSQL's log is flushed past it ─▶ forgotten
                                   └─ the connection broke ─▶ in doubt ─▶ recorded again, waiting for the disk

A connection that lives has the same server at its other end, with the same log in its memory: positions in the log are
compared on one connection only. Once it breaks, for whatever reason, every end that was not known to be on the disk is
recorded again; that changes nothing where the row has its end already.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import structlog
from sqlalchemy import Connection, Engine

from tasks.database import dumps, is_disconnect
from tasks.jobs import lost_ends as ends
from tasks.jobs import store
from tasks.jobs.model import ClaimedRow, Ending, JobRow
from tasks.statements import Relaxed

log = structlog.get_logger(__name__)

#: Seconds between two questions how far the log is on the disk, asked only while ends are kept.
ASK_SECONDS = 0.25

#: What a row takes in addition to its request, its result and its labels, about; and bytes of a batch that is kept as
#: JSON.
_ROW_BYTES, _LARGE_BYTES = 1024, 65_536

#: Bytes of kept ends above which ends wait for the disk. PostgreSQL flushes within about 0.6 s by default.
KEPT_BYTES = 16 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Batch:
    """What one statement ended: whole rows, their size, and where the log ended after it, once that was asked.

    The rows become JSON where they are to be recorded again, which nearly none are; large ones at once, since numbers
    as Python has them take several times their text.
    """

    rows: list[ClaimedRow] | str
    job_ids: list[str]
    size_bytes: int
    position: int | None = None

    def json(self) -> str:
        """The rows as a JSON array."""
        return self.rows if isinstance(self.rows, str) else dumps(self.rows)


class Unflushed:
    """Ends jobs without waiting for the disk, and sees to it that no crash of PostgreSQL undoes that.

    `end` and `look` are one thread's, the completer's; `in` may be asked from any.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: The connection. Whatever else is committed on it may be lost, and is not kept.
        self.relaxed = Relaxed(engine, on_broken=self._doubt)
        self._kept: list[_Batch] = []
        self._doubtful: list[_Batch] = []
        self._ids: set[str] = set()
        self._bytes = 0
        self._looked_at = 0.0
        self._can_ask = True

    def __contains__(self, job_id: str) -> bool:
        """Whether the job's end was announced and may be lost: until that is settled nothing may claim it."""
        return job_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def end(self, endings: Sequence[Ending], epoch: int, claimed: Mapping[str, ClaimedRow]) -> list[JobRow]:
        """Ends jobs that run under `epoch` and gives their rows; `claimed` are theirs as claimed, with requests."""
        if self._bytes > KEPT_BYTES or not self._can_ask:
            with self._engine.connect() as connection:
                return store.end_running(connection, endings, epoch, claimed)

        def end(connection: Connection) -> list[JobRow]:
            rows = store.end_running(connection, endings, epoch, claimed)
            if rows:
                # What the database read back itself comes without the request.
                self._keep(
                    [cast(ClaimedRow, row) if "request" in row else {**claimed[row["id"]], **row} for row in rows]
                )
            return rows

        return self.relaxed.run(end)

    def look(self) -> None:
        """Forgets what is on the disk by now, and records again what is in doubt. Returns at once if it is too soon."""
        if not self._ids or time.monotonic() - self._looked_at < ASK_SECONDS:
            return
        self._looked_at = time.monotonic()
        try:
            self._settle()
        except Exception as error:  # noqa: BLE001 - nothing is forgotten, and the next look tries again
            log.warning("ends are not known to be on the disk yet", jobs=len(self._ids), error=str(error).strip())

    def close(self, seconds: float) -> None:
        """Waits until nothing is in doubt, for at most `seconds`: then logs what may be lost."""
        until = time.monotonic() + seconds
        wait_seconds = 0.02
        while self._ids and time.monotonic() < until:
            try:
                # What is written with a commit that waits has everything before it on the disk too.
                self._doubt()
                self._settle()
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("ends are not known to be on the disk yet", jobs=len(self._ids), error=str(error).strip())
                time.sleep(wait_seconds)
                wait_seconds = min(0.5, wait_seconds * 2)
        if self._ids:
            log.error("announced ends may be lost with PostgreSQL", jobs=sorted(self._ids))

    def _settle(self) -> None:
        if self._kept and self._can_ask:
            try:
                self.relaxed.run(self._forget_flushed)
            except Exception as error:
                if not is_disconnect(error):
                    # Some servers do not say where their log is. By now all is in doubt, and is recorded again.
                    self._can_ask = False
                    log.warning("PostgreSQL gives no log position; ends wait for the disk", error=str(error).strip())
                else:
                    raise
        if self._doubtful:
            self._record_again()

    def _forget_flushed(self, connection: Connection) -> None:
        """What was committed before the question lies before the end of the log that the answer gives."""
        written, flushed = ends.flushed(connection)
        for batch in self._kept:
            if batch.position is None:
                batch.position = written
        self._forget([batch for batch in self._kept if batch.position is not None and batch.position <= flushed])

    def _record_again(self) -> None:
        doubtful = list(self._doubtful)
        try:
            self._record(doubtful)
        except Exception as error:
            if is_disconnect(error):
                raise
            for batch in doubtful:
                self._record_alone(batch)

    def _record_alone(self, batch: _Batch) -> None:
        try:
            self._record([batch])
        except Exception as error:
            if is_disconnect(error):
                raise
            log.exception("announced ends could not be recorded again", jobs=batch.job_ids)
            self._forget([batch])

    def _record(self, batches: list[_Batch]) -> None:
        with self._engine.connect() as connection:
            lost = ends.record_again(connection, "[" + ",".join(batch.json()[1:-1] for batch in batches) + "]")
        if lost:
            log.warning("PostgreSQL had lost ends that were announced; they are recorded again", jobs=len(lost))
        self._forget(batches)

    def _keep(self, rows: list[ClaimedRow]) -> None:
        parts = [(row["request"], row["result"], row["labels"]) for row in rows]
        batch = _Batch(rows, [row["id"] for row in rows], len(dumps(parts)) + _ROW_BYTES * len(rows))
        if batch.size_bytes > _LARGE_BYTES:
            batch.rows = dumps(rows)
        self._kept.append(batch)
        self._ids.update(batch.job_ids)
        self._bytes += batch.size_bytes

    def _forget(self, batches: list[_Batch]) -> None:
        for batch in batches:
            self._ids.difference_update(batch.job_ids)
            self._bytes -= batch.size_bytes
        gone = {id(batch) for batch in batches}
        self._kept = [batch for batch in self._kept if id(batch) not in gone]
        self._doubtful = [batch for batch in self._doubtful if id(batch) not in gone]

    def _doubt(self) -> None:
        """The connection broke, and the server behind it may have: nothing that was kept is known to be recorded."""
        self._doubtful += self._kept
        self._kept = []
