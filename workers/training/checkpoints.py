"""A training session's whole state as one safetensors file: copied to the host, written elsewhere, verified on load.

Two phases. `session.snapshot()` copies, on the thread of the device. `write` takes as long as the disk does, on any
other thread: temporary file, fsync, rename, fsync of the folder, so that a checkpoint is whole or not there.

Tensors are named `parameter/<name>`, `buffer/<name>`, `optimizer/<slot>/<name>` and `accumulated/<name>`; everything
else is JSON under the one metadata key `state`. Equal states make equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from device_operations.errors import failure
from device_operations.folders import private_folder, sync_folder
from workers.training.model.definition import check_hash

FORMAT = 1

#: safetensors' names of torch's dtypes.
_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

#: Bytes written and hashed at a time: the interpreter is free for the stepping thread meanwhile.
_CHUNK_BYTES = 8 * 2**20

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}


@dataclass(frozen=True)
class Snapshot:
    """A state at rest on the host: tensors that nothing else writes to, and the JSON that goes with them."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """How many updates the parameters had."""
        return int(self.state["step"])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one part (`parameter/`, …), without the prefix."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class WrittenFile:
    """A file that is whole on disk."""

    path: Path
    sha256: str
    size_bytes: int


def write(snapshot: Snapshot, path: Path) -> WrittenFile:
    """Writes the snapshot to `path`, whole or not at all. Takes none of torch's locks: call it on any thread.

    Raises `storage_full`, or `storage_unavailable` where the folder cannot be written.
    """
    metadata = {"state": json.dumps(snapshot.state, sort_keys=True, separators=(",", ":"))}
    return write_tensors(snapshot.tensors, path, metadata)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> WrittenFile:
    """The same for any tensors on the host, as a safetensors file: gradients, for example."""
    return _write_whole(_parts(tensors, metadata or {}), path)


def write_bytes(content: bytes, path: Path) -> WrittenFile:
    """The same for bytes that are there already: an exported model."""
    return _write_whole([memoryview(content)], path)


def read(path: Path, sha256: str) -> Snapshot:
    """The snapshot in a file whose hash is `sha256`; nothing of it is looked at before the hash is right.

    Raises `checkpoint_not_found`, `checksum_mismatch`, and `model_invalid` for a file that is no checkpoint.
    """
    if not path.is_file():
        raise failure("checkpoint_not_found", f"the checkpoint file {path.name} is not there")
    check_hash(path, sha256, f"the checkpoint file {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise failure("model_invalid", f"{path.name} is no checkpoint of a training session: {error}") from error
    if state.get("format") != FORMAT:
        raise failure(
            "model_invalid", f"{path.name} has checkpoint format {state.get('format')}; this version reads {FORMAT}"
        )
    return Snapshot(tensors, state)


def _write_whole(parts: Iterable[memoryview], path: Path) -> WrittenFile:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        private_folder(path.parent)
        sha256, size = _write_parts(parts, temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        code = "storage_full" if error.errno in _FULL else "storage_unavailable"
        remedy = "free space there" if code == "storage_full" else "check the folder and its permissions"
        reason = error.strerror or str(error)
        raise failure(code, f"{path.name} could not be written to {path.parent.name}: {reason}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return WrittenFile(path, sha256, size)


def _write_parts(parts: Iterable[memoryview], path: Path) -> tuple[str, int]:
    """(sha256, size) of a new file that holds the parts, synced."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK_BYTES):
                chunk = part[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """A safetensors file: the header's length, the header as JSON, then every tensor's bytes in its order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # By size of element, then name, as safetensors orders them: every tensor stays aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        place = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[name], offset = place, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        yield _bytes_of(tensors[name])


def _bytes_of(tensor: Tensor) -> memoryview:
    # Through uint8, as NumPy has no bfloat16. A tensor without elements has no bytes to view.
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
