"""What an ONNX file says about itself, read from its bytes before ONNX Runtime is let near it.

A model comes from a caller. Older releases of ONNX Runtime follow external data out of the model's folder, and some
take a marker in place of a path for an address in memory; so every external file is resolved here, links included, and
one that leaves the folder refuses the model, in any version of the runtime. The reader walks protobuf's wire format,
needs no `onnx` package, and skips weights without touching them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from device_operations.errors import failure

#: Fields to descend into, by message: number ─▶ message. Everything else is skipped by its length.
#: Source: onnx.proto of ONNX 1.19; numbers never change once given.
INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "value", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "value": {2: "type"},
    "type": {1: "tensor_type"},
    "tensor_type": {2: "shape"},
    "shape": {1: "dimension"},
}
_EXTERNAL_DATA = 13  # of TensorProto
_DEEPEST = 100

#: Of most nodes, one search through their few bytes shows that no tensor inside has external data: each such tensor
#: names its file by this key. Larger ones are walked, so that weights are not touched.
_LOCATION, _SMALL_NODE = b"location", 1 << 14


#: A file's bytes, where they lie.
Content = mmap.mmap | bytes


@dataclass(slots=True)
class OnnxFile:
    """The opsets by domain, the names of symbolic input dimensions, the external files, and all bytes on disk."""

    opsets: dict[str, int] = field(default_factory=dict)
    symbols: set[str] = field(default_factory=set)
    #: For each external file, how many bytes the model's tensors need of it.
    locations: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0


def inspect(source: Path | bytes, root: Path | None = None) -> OnnxFile:
    """Reads a file, or the bytes of one, which has no folder to refer to.

    Raises `model_invalid` where it is no ONNX model or refers to data outside `root` (the file's folder).
    """
    if isinstance(source, bytes):
        return _read(source, "the model", None, None)
    try:
        size = source.stat().st_size
    except OSError as error:
        raise failure("model_invalid", f"{source.name} cannot be read: {error.strerror}.") from error
    if not source.is_file():
        raise failure("model_invalid", f"{source.name} is not a file.")
    if size == 0:
        raise failure("model_invalid", f"{source.name} is empty (0 bytes).")
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _read(content, source.name, source.parent, root)


def _read(content: Content, name: str, folder: Path | None, root: Path | None) -> OnnxFile:
    found = OnnxFile(size_bytes=len(content))
    try:
        _walk(content, (0, len(content)), "model", found, 0)
    except _MalformedError as error:
        raise failure("model_invalid", f"{name} is not an ONNX model: {error}.") from error
    if not found.opsets:
        raise failure("model_invalid", f"{name} is not an ONNX model: it names no operator set.")
    for location, needed in found.locations.items():
        held = _external(name, folder, location, root or folder).stat().st_size
        if held < needed:
            raise failure("model_invalid", f"{name} needs {needed} bytes of {location}, which has {held}.")
        found.size_bytes += held
    return found


def _external(name: str, folder: Path | None, location: str, root: Path | None) -> Path:
    """The external file that `location` names. Raises `model_invalid` where it is missing or outside `root`."""
    refused = failure(
        "model_invalid",
        f"{name} keeps weights in {location!r}, which is not a file inside the model's folder. "
        "External data must lie beside the model, under a relative path.",
    )
    if folder is None or root is None or not location or "\0" in location or Path(location).is_absolute():
        raise refused
    try:
        resolved = (folder / location).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise refused from error
    if not resolved.is_relative_to(root.resolve()) or not resolved.is_file():
        raise refused
    return resolved


class _MalformedError(Exception):
    """Raised where the bytes are not protobuf's wire format, or nest deeper than any model does."""


def _walk(content: Content, span: tuple[int, int], message: str, found: OnnxFile, depth: int) -> None:
    if depth > _DEEPEST:
        raise _MalformedError("its graphs nest too deeply")
    if message == "node" and span[1] - span[0] < _SMALL_NODE and content.find(_LOCATION, *span) < 0:
        return
    if message == "opset":
        texts, numbers = _flat(content, span)
        found.opsets[texts.get(1, "")] = numbers.get(2, 0)
    elif message == "tensor":
        _note_external(content, span, found)
    elif message == "dimension":
        texts, _ = _flat(content, span)
        if texts.get(2):
            found.symbols.add(texts[2])
    else:
        inside = INSIDE[message]
        for number, kind, at, stop in fields(content, *span):
            if kind == 2 and number in inside:
                _walk(content, (at, stop), inside[number], found, depth + 1)


def _note_external(content: Content, span: tuple[int, int], found: OnnxFile) -> None:
    """Notes where a tensor's bytes lie, if not in the model itself: in `external_data`, pairs of key and value."""
    pairs = [
        _flat(content, (at, stop))[0]
        for number, kind, at, stop in fields(content, *span)
        if (number, kind) == (_EXTERNAL_DATA, 2)
    ]
    entries = {pair.get(1, ""): pair.get(2, "") for pair in pairs}
    if pairs:
        end = sum(int(entries[key]) for key in ("offset", "length") if entries.get(key, "").isdigit())
        location = entries.get("location", "")
        found.locations[location] = max(end, found.locations.get(location, 0))


def _flat(content: Content, span: tuple[int, int]) -> tuple[dict[int, str], dict[int, int]]:
    """A small message's strings and whole numbers, by field number."""
    texts: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for number, kind, at, stop in fields(content, *span):
        if kind == 2:
            texts[number] = content[at:stop].decode("utf-8", "replace")
        elif kind == 0:
            numbers[number] = _varint(content, at, stop)[0]
    return texts, numbers


def fields(content: Content, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message: number, wire type, and where its value begins and ends."""
    at = start
    while at < end:
        # Most keys and lengths are one byte, and most of the time that reading takes is spent here.
        key = content[at]
        at += 1
        if key >= 0x80:
            key, at = _varint(content, at - 1, end)
        number, kind = key >> 3, key & 7
        if kind == 2:
            length = content[at] if at < end else 0x80
            at += 1
            if length >= 0x80:
                length, at = _varint(content, at - 1, end)
            stop = at + length
        elif kind == 0:
            stop = _varint(content, at, end)[1]
        elif kind == 1:
            stop = at + 8
        elif kind == 5:
            stop = at + 4
        else:
            raise _MalformedError(f"byte {at} begins no field that ONNX has")
        if stop > end or number == 0:
            raise _MalformedError(f"it is cut off or damaged at byte {at}")
        yield number, kind, at, stop
        at = stop


def _varint(content: Content, at: int, end: int) -> tuple[int, int]:
    """The whole number at `at`, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _MalformedError(f"it is cut off or damaged at byte {at}")
