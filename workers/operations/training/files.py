"""Files of training sessions: what a session is made from, its checkpoints in the blob store, gradients given back.

A checkpoint is written and synced in the spool folder (TRAINING__CHECKPOINT_PATH), then becomes a blob in one move, and
only then a record: whole and recorded, or not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from device_operations.folders import private_folder
from device_operations.jobs import new_id
from device_operations.requests.training import Initialize, OnnxModel
from tasks.blobs.store import Stored
from tasks.inference.content import model_file
from tasks.jobs.model import StoredRequest
from tasks.training.facts import NewCheckpoint
from workers.resident.residents import Resident
from workers.training import checkpoints
from workers.training.checkpoints import Snapshot, WrittenFile
from workers.training.model.definition import Sources


def sources_of(resident: Resident, session_id: str, spec: Initialize) -> Sources:
    """Local files of the model and weights that a session's request names."""
    model: Path | None = None
    blob_id = getattr(spec.model, "blob_id", None)
    if blob_id is not None:
        model = local_file(resident, blob_id, session_id)
    elif isinstance(spec.model, OnnxModel) and spec.model.path is not None:
        model = model_file(resident.settings.model_cache_path, spec.model.path)
    weights = local_file(resident, spec.weights.blob_id, session_id) if spec.weights is not None else None
    return Sources(model, weights)


def local_file(resident: Resident, blob_id: str, session_id: str) -> Path:
    """A blob as a file of this machine: where it lies, or fetched into the session's scratch folder."""
    stored = resident.blobs.file(blob_id)
    if stored is not None:
        return stored
    target = scratch(resident, session_id) / blob_id
    if not target.is_file():
        private_folder(target.parent)
        partial = target.with_name(f"{blob_id}.partial")
        resident.blobs.fetch(blob_id, partial)
        partial.replace(target)
    return target


def read_checkpoint(resident: Resident, blob_id: str, sha256: str, session_id: str) -> Snapshot:
    """The snapshot in a checkpoint's blob. Raises as `checkpoints.read`."""
    file = local_file(resident, blob_id, session_id)
    try:
        return checkpoints.read(file, sha256)
    finally:
        # On Windows a file whose tensors are still mapped stays until its session goes.
        if resident.blobs.file(blob_id) is None:
            with suppress(FileNotFoundError, PermissionError):
                file.unlink()


def keep_checkpoint(
    resident: Resident,
    snapshot: Snapshot,
    row: StoredRequest,
    onnx: bytes | None = None,
) -> NewCheckpoint:
    """Writes a snapshot and its export as blobs, off the device's thread; what its record is to hold.

    `row` names the session, the owner and what else the record says. Raises `storage_full`.
    """
    stored = _store(resident, "checkpoint", lambda path: checkpoints.write(snapshot, path))
    blobs = [stored]
    if onnx is not None:
        try:
            blobs.append(_store(resident, "onnx", lambda path: checkpoints.write_bytes(onnx, path)))
        except BaseException:
            resident.blobs.delete(stored.blob_id)
            raise
    return {
        "checkpoint_id": row["checkpoint_id"], "session_id": row["session_id"], "owner": row["owner"],
        "name": row.get("name"), "job_id": row.get("job_id"), "run_job_id": row.get("run_job_id"),
        "keep_last": row.get("keep_last"),
        "step": snapshot.step, "sequence": int(snapshot.state["sequence"]),
        "sha256": stored.sha256, "size_bytes": stored.size_bytes, "blob_id": stored.blob_id,
        "onnx_blob_id": blobs[1].blob_id if onnx is not None else None,
        "blobs": [{"blob_id": b.blob_id, "sha256": b.sha256, "size_bytes": b.size_bytes} for b in blobs],
    }  # fmt: skip


def drop_checkpoint(resident: Resident, checkpoint: NewCheckpoint) -> None:
    """Deletes the files of a checkpoint that was not recorded."""
    for blob in checkpoint["blobs"]:
        resident.blobs.delete(blob["blob_id"])


def keep_gradients(resident: Resident, gradients: Mapping[str, Tensor]) -> Stored:
    """Gradients as a safetensors blob; its record is the caller's to make."""
    return _store(resident, "gradients", lambda path: checkpoints.write_tensors(gradients, path))


def scratch(resident: Resident, session_id: str) -> Path:
    """The folder of a session's fetched files."""
    return resident.settings.data_dir / "training" / resident.device_id / session_id


def clear_scratch(resident: Resident, session_id: str) -> None:
    """Deletes the fetched files of a session that is gone."""
    shutil.rmtree(scratch(resident, session_id), ignore_errors=True)


def _store(resident: Resident, what: str, write: Callable[[Path], WrittenFile]) -> Stored:
    blob_id = new_id()
    written: WrittenFile = write(resident.spool / f"{what}-{blob_id}")
    try:
        return resident.blobs.adopt(written.path, blob_id, written.sha256)
    finally:
        written.path.unlink(missing_ok=True)
