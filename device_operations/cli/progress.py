"""How long work shows: bars on standard error, so that standard output holds the result and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import click

from device_operations.client import Client
from device_operations.errors import error_of, from_job_error
from device_operations.jobs import Job, State

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar


def follow(client: Client, job: Job, *, quiet: bool = False) -> Job:
    """Waits for a job's end; shows its states and progress where a person watches (not `quiet`, a terminal)."""
    if quiet or not sys.stderr.isatty():
        return client.wait(job)
    with _bar(f"{job.kind} {job.job_id}", length=1000) as bar:
        for event in client.events(job):
            if event.name == "progress" and (share := done_share(event.data)) is not None:
                bar.label = _label(job, "running")
                bar.update(max(0, round(share * 1000) - bar.pos))
            elif event.name == "state":
                bar.label = _label(job, event.data["state"])
                bar.render_progress()
            elif event.name == "done":
                ended = Job.model_validate(event.data)
                bar.label = _label(job, ended.state)
                bar.update(1000 - bar.pos if ended.state is State.SUCCEEDED else 0)
    return client.wait(job)


def require_success(job: Job) -> None:
    """Raises the error of a job that did not succeed, so that the command fails as the job did."""
    if job.state is not State.SUCCEEDED:
        raise from_job_error(error_of(job.error, job.state, f"job {job.job_id}"))


def done_share(progress: Mapping[str, object]) -> float | None:
    """How much is done, 0 to 1, from a pair such as `done_bytes` and `total_bytes`; None without such a pair."""
    for name, done in progress.items():
        total = progress.get("total" + name.removeprefix("done")) if name.startswith("done") else None
        if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
            return min(1.0, done / total)
    return None


@contextmanager
def opened(path: Path, *, quiet: bool = False) -> Iterator[BinaryIO]:
    """A file opened for an upload, with a bar of what was read of it."""
    with path.open("rb") as file:
        if quiet or not sys.stderr.isatty():
            yield file
            return
        with _bar(path.name, length=max(1, path.stat().st_size)) as bar:
            yield cast("BinaryIO", _Watched(file, bar))


class _Watched:
    """A file that moves a bar as it is read, back to the start too, when an upload is sent again."""

    def __init__(self, file: BinaryIO, bar: ProgressBar[int]) -> None:
        self._file = file
        self._bar = bar

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._bar.update(self._file.tell() - self._bar.pos)
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _label(job: Job, state: str) -> str:
    return f"{job.kind} {job.job_id} {state:<9}"


def _bar(label: str, length: int) -> ProgressBar[int]:
    return click.progressbar(length=length, label=label, file=sys.stderr, show_eta=False)
