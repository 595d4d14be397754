"""A model's graph without its weights: what a look at its operators needs, read in a fraction of the time."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from workers.devices.onnx.file import INSIDE, Content, fields

if TYPE_CHECKING:
    from onnx import ModelProto

#: Numbers that a tensor holds are left out above this many bytes; a message below it is taken as it is.
SMALL_BYTES = 2048

#: The fields of TensorProto that hold its numbers.
_NUMBERS = frozenset({4, 5, 6, 7, 9, 10, 11})


def read_graph(source: Path | bytes) -> ModelProto:
    """The model, in which large tensors have their shape and dtype but hold no numbers. External data is not read.

    `source` has passed `onnx_file.inspect`. Raises google.protobuf's DecodeError where it is not protobuf.
    """
    import onnx

    model = onnx.ModelProto()
    if isinstance(source, bytes):
        model.ParseFromString(_without_weights(source, (0, len(source)), "model"))
        return model
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        model.ParseFromString(_without_weights(content, (0, len(content)), "model"))
    return model


def _without_weights(content: Content, span: tuple[int, int], message: str) -> bytes:
    pieces: list[bytes] = []
    inside = INSIDE.get(message, {})
    # What is taken as it is is copied in as few pieces as there are gaps.
    begun = before = span[0]
    for number, kind, at, stop in fields(content, *span):
        if kind == 2 and stop - at > SMALL_BYTES:
            if message == "tensor" and number in _NUMBERS:
                pieces.append(content[begun:before])
                begun = stop
            elif number in inside:
                pieces.append(content[begun:before])
                inner = _without_weights(content, (at, stop), inside[number])
                pieces += [_varint(number << 3 | 2), _varint(len(inner)), inner]
                begun = stop
        before = stop
    pieces.append(content[begun : span[1]])
    return b"".join(pieces)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
