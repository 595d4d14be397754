"""A request that is nothing but the bytes of a model's only input: `Inference-Header-Content-Length: 0`.

Which input, and its shape, follow from the model, as Triton has them follow: of the shape one side may be open, and
text is one string, which is the whole body without a length before it.
"""

from __future__ import annotations

import math

from api_gateway.oip.tensors import NAMES, Given
from api_gateway.submission.bodies import Raw
from device_operations.errors import failure
from device_operations.tensors import FIXED_DTYPES, TEXT_DTYPES
from device_operations.wire.texts import pack_texts, unpack_texts
from tasks.statements import Row


def only_input(model: Row, raw: Raw) -> dict[str, Given]:
    """The input that the bytes are, by its name. Raises `input_mismatch` where the model leaves that open."""
    named = f"model {model['name']!r}"
    if model["inputs"] is None:
        raise failure("input_mismatch", f"{named} is still loading: until then the shape of raw bytes is not known")
    inputs = [spec for spec in model["inputs"] if not spec.get("optional")]
    if len(inputs) != 1:
        raise failure("input_mismatch", f"raw bytes are for models of one input, and {named} has {len(inputs)}")
    (spec,) = inputs
    name, dtype, shape = spec["name"], spec["dtype"], spec["shape"]
    if dtype in TEXT_DTYPES:
        return {name: Given("string", _of_one(shape, name), _one_text(raw, name))}
    return {name: Given(dtype, _shape(shape, len(raw), dtype, name), raw)}


def _shape(wanted: list[int | str | None], size_bytes: int, dtype: str, name: str) -> list[int]:
    fixed = math.prod(side for side in wanted if isinstance(side, int))
    still_open = [index for index, side in enumerate(wanted) if not isinstance(side, int)]
    if len(still_open) > 1:
        raise failure("input_mismatch", f"input {name!r} leaves {len(still_open)} sides open: {wanted}; give its shape")
    width = fixed * FIXED_DTYPES[dtype]
    # Where a side is 0 there are no bytes to count by.
    rows = size_bytes // width if width else 0
    if (rows * width != size_bytes) if still_open else (width != size_bytes):
        of = "multiples of " if still_open else ""
        raise failure(
            "input_mismatch", f"input {name!r} of {NAMES[dtype]} {wanted} takes {of}{width} bytes, {size_bytes} came"
        )
    return [side if isinstance(side, int) else rows for side in wanted]


def _of_one(wanted: list[int | str | None], name: str) -> list[int]:
    shape = [side if isinstance(side, int) else 1 for side in wanted]
    if math.prod(shape) != 1:
        raise failure("input_mismatch", f"input {name!r} is text of shape {wanted}, and raw bytes are one string")
    return shape


def _one_text(raw: Raw, name: str) -> bytes:
    packed = pack_texts([bytes(raw)])
    unpack_texts(packed, 1, f"input {name!r}")
    return packed
