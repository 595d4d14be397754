"""The files of a recorded model: where they lie in the model cache, or fetched from the blob store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from device_operations.errors import failure
from device_operations.folders import private_folder
from tasks.inference.content import entry_file, key_of_files, model_file
from tasks.statements import Row
from workers.resident.residents import Resident

if TYPE_CHECKING:
    pass


def files_of(resident: Resident, row: Row) -> tuple[Path, Path]:
    """The graph's file, and the folder that its external data must not leave."""
    source = row["source"]
    if "path" in source:
        found = model_file(resident.settings.model_cache_path, source["path"])
        if key_of_files(found, row["model_type"], row["options"]) != row["content_key"]:
            # Else models of the content that was asked for would be given this one.
            raise failure("model_invalid", f"{source['path']!r} has changed since it was loaded; load it again")
        if row["model_type"] != "onnx":
            return (found, found) if found.is_dir() else (found, found.parent)
        return (entry_file(found), found) if found.is_dir() else (found, found.parent)
    if "blob_id" in source:
        stored = resident.blobs.file(source["blob_id"])
        if stored is not None and stored.is_file():
            # Read where it lies; its neighbours there are other callers', so it may refer to no other file.
            return stored, folder_of(resident, row["content_key"])
    folder = folder_of(resident, row["content_key"])
    named_blobs = {"model.onnx": source["blob_id"]} if "blob_id" in source else source["blobs"]
    for relative, blob_id in named_blobs.items():
        target = folder / relative
        private_folder(target.parent)
        resident.blobs.fetch(blob_id, target)
    return (entry_file(folder) if row["model_type"] == "onnx" else folder), folder


def folder_of(resident: Resident, content_key: str) -> Path:
    return resident.settings.data_dir / "models" / resident.device_id / content_key
