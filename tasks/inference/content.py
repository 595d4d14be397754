"""Where a model's content is and what it is: paths kept inside the model folder, and the key of equal content."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

import orjson

from device_operations.errors import failure
from device_operations.requests.inference import MAX_FILES, LoadModel
from device_operations.requests.pipelines import RUNS
from tasks.planning.context import Context, check_blobs

#: What an ONNX session takes on top of its file until it was measured, as a share of the file's size and in bytes.
ESTIMATE_FACTOR = 1.3
ESTIMATE_BYTES = 4 * 2**20

#: The options that shape ONNX Runtime's session: models that differ in others only share a graph.
SHAPING_OPTIONS = ("free_dimensions", "graph_optimization", "intra_op_threads")
#: What file systems take as one name.
MAX_NAME_BYTES = 255


def content_of(context: Context, request: LoadModel) -> tuple[str, str | None, int]:
    """The key of equal content, the sha256 of the model's file, and the bytes to reserve until it is measured."""
    if request.source.path is not None:
        parts, sizes = _files(model_file(context.settings.model_cache_path, request.source.path), request.model_type)
    else:
        parts, sizes = _blobs(context, request)
    # A pipeline is as much its configuration as its graphs.
    sha256 = _whole(parts) if request.model_type in RUNS and len(parts) > 1 else next(iter(parts.values()))
    if request.sha256 is not None and request.sha256 not in (sha256, *parts.values()):
        raise failure("checksum_mismatch", f"the model's sha256 is {sha256}, not {request.sha256}")
    key = _content_key(request.model_type, parts, request.options.recorded())
    size = _largest_part(sizes) if request.options.low_memory else sum(sizes.values())
    return key, sha256, int(size * ESTIMATE_FACTOR) + ESTIMATE_BYTES


def key_of_files(path: Path, model_type: str, options: Mapping[str, object]) -> str:
    """The content key of what lies at `path` now: a file (with its external data) or a folder."""
    return _content_key(model_type, _files(path, model_type)[0], options)


def _whole(parts: Mapping[str, str | None]) -> str:
    """The sha256 over the names and hashes of several files."""
    return hashlib.sha256(orjson.dumps(sorted(parts.items()))).hexdigest()


def _largest_part(sizes: Mapping[str, int]) -> int:
    """The bytes of a pipeline's largest part: of the files in one folder."""
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        folder, _, file = name.replace("\\", "/").rpartition("/")
        parts[folder or file] += size
    return max(parts.values())


def _content_key(model_type: str, parts: Mapping[str, str | None], options: Mapping[str, object]) -> str:
    # A lone file's name does not matter; the names of several, which refer to each other, do.
    names = sorted(parts.items()) if len(parts) > 1 else list(parts.values())
    shaping = {name: options.get(name) for name in SHAPING_OPTIONS}
    if options.get("low_memory"):
        shaping["low_memory"] = True
    return hashlib.sha256(orjson.dumps([model_type, names, shaping], option=orjson.OPT_SORT_KEYS)).hexdigest()


def load_key(content_key: str, options: Mapping[str, object]) -> str:
    """The key of equal loads: of the same content with the same options. `1.0` is `1`."""
    whole = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in options.items()
    }
    return hashlib.sha256(orjson.dumps([content_key, whole], option=orjson.OPT_SORT_KEYS)).hexdigest()


def model_file(folder: Path, path: str) -> Path:
    """The file or folder that `path` names below the model folder; `path_not_allowed` when it leaves it.

    Symbolic links are followed first, so that a link out of the folder is refused too.
    """
    pure = PurePosixPath(path.replace("\\", "/"))
    root = folder.resolve()
    if pure.is_absolute() or ".." in pure.parts or "\x00" in path or ":" in path:
        raise failure("path_not_allowed", f"path {path!r} must be relative and stay below the model folder")
    try:
        resolved = (root / pure).resolve()
        there = resolved.exists()
    except (OSError, RuntimeError) as error:  # a name that no file system takes, a loop of links
        raise failure("path_not_allowed", f"path {path!r} cannot be followed: {error}") from error
    if not resolved.is_relative_to(root):
        raise failure("path_not_allowed", f"path {path!r} leads out of the model folder")
    if not there:
        raise failure("model_invalid", f"there is no {path!r} in the model folder (MODEL_CACHE_PATH)")
    return resolved


def file_hash(path: Path) -> str:
    """The file's sha256, remembered until its size, times or place on the disk change."""
    return _sha256(path, *_stamp(path))


def entry_file(folder: Path) -> Path:
    """The graph in a folder of model files: `model.onnx`, or the only `.onnx` file."""
    named = folder / "model.onnx"
    found = [named] if named.is_file() else sorted(folder.rglob("*.onnx"))
    if len(found) != 1:
        raise failure(
            "model_invalid", f"a model of several files needs one model.onnx; there are {len(found)} .onnx files"
        )
    return found[0]


def _files(path: Path, model_type: str) -> tuple[Mapping[str, str | None], dict[str, int]]:
    """The sha256 and the size in bytes of each of a model's files, by its path below the model's folder."""
    if path.is_dir():
        files = _pipeline_files(path) if model_type in RUNS else _graph_files(path)
        # One spelling everywhere: a worker on Windows finds the key that a gateway on Linux made.
        names = {file: file.relative_to(path).as_posix() for file in files}
        parts = {name: _sha256(file, *_stamp(file)) for file, name in names.items()}
        return parts, {name: file.stat().st_size for file, name in names.items()}
    digest = _sha256(path, *_stamp(path))
    parts = {path.name: digest}
    sizes = {path.name: path.stat().st_size}
    config = path.parent / "config.json"
    if model_type in RUNS and config.is_file() and config.resolve().is_relative_to(path.parent):
        parts[config.name] = _sha256(config, *_stamp(config))
    for name in _external_names(path, *_stamp(path)):
        neighbour = path.parent / name
        # A location that leaves the folder is the loader's to refuse; here it only must not be read.
        if (
            ".." not in PurePosixPath(name).parts
            and neighbour.resolve().is_relative_to(path.parent)
            and neighbour.is_file()
        ):
            parts[name] = _sha256(neighbour, *_stamp(neighbour))
            sizes[name] = neighbour.stat().st_size
    return parts, sizes


def _graph_files(folder: Path) -> list[Path]:
    entry = entry_file(folder)
    return [entry, *(file for file in _files_below(folder) if file != entry)]


def _pipeline_files(folder: Path) -> list[Path]:
    """All files of a pipeline's folder. Raises `path_not_allowed` where a link leads out of it."""
    files = _files_below(folder)
    if not files:
        raise failure("model_invalid", f"the folder {folder.name!r} is empty")
    for file in files:
        if not file.resolve().is_relative_to(folder):
            raise failure("path_not_allowed", f"{str(file.relative_to(folder))!r} leads out of the model's folder")
    return files


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted. Raises `model_invalid` for more than `MAX_FILES`; no more are looked at."""
    files = list(islice((file for file in folder.rglob("*") if file.is_file()), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        raise failure("model_invalid", f"the folder {folder.name!r} has more than {MAX_FILES} files")
    return sorted(files)


def _blobs(context: Context, request: LoadModel) -> tuple[Mapping[str, str | None], dict[str, int]]:
    named = {"model.onnx": request.source.blob_id} if request.source.blob_id else dict(request.source.blobs or {})
    for relative in named:
        pure = PurePosixPath(relative.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts or not pure.name or ":" in relative or "\x00" in relative:
            raise failure("path_not_allowed", f"blobs: {relative!r} must be a relative path without '..'")
        if any(len(part.encode()) > MAX_NAME_BYTES for part in pure.parts):
            raise failure("path_not_allowed", f"blobs: a file's name may have {MAX_NAME_BYTES} bytes")
    ids = [blob_id for blob_id in named.values() if blob_id is not None]
    known = check_blobs(context, ids)
    ordered = sorted(named.items(), key=lambda item: (not item[0].endswith(".onnx"), item[0]))
    parts = {relative: known[str(blob_id)]["sha256"] for relative, blob_id in ordered}
    return parts, {relative: known[str(blob_id)]["size_bytes"] for relative, blob_id in named.items()}


def _stamp(file: Path) -> tuple[int, int, int, int]:
    """What changes with a file's content; a copy may keep the time of its origin, but not all of these."""
    about = file.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


#: Room for the files of several models: a cache that is smaller than one model hashes all of it at every load.
@lru_cache(maxsize=4 * MAX_FILES)
def _sha256(file: Path, *stamp: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _external_names(file: Path, size: int, *stamp: int) -> tuple[str, ...]:
    """The file names that a graph's external tensors lie in.

    Read without a protobuf parser, which the gateway does not carry: an external tensor has the entry
    {key: "location", value: NAME}, whose bytes are unmistakable. A name found by accident only adds a file to the key.
    Names of 128 bytes and more, and those in a graph above 2 GiB, are not found.
    """
    if size > 2**31:
        return ()
    marker = b"\x0a\x08location\x12"
    names = set()
    data = file.read_bytes()
    at = data.find(marker)
    while at >= 0:
        length, start = data[at + len(marker)], at + len(marker) + 1
        if length < 0x80:
            names.add(data[start : start + length].decode("utf-8", "replace"))
        at = data.find(marker, at + 1)
    return tuple(sorted(names))
