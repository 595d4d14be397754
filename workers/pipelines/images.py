"""Pictures in and out: PNG and JPEG to arrays, arrays to PNG and WebP. Pixels are counted before they are decoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from device_operations.errors import failure
from workers.devices.arrays import Array

if TYPE_CHECKING:
    import torch

#: Pixels of a picture that is decoded, and the bytes of its file.
MAX_PIXELS = 1 << 24
MAX_FILE_BYTES = 64 << 20

#: What is read; any other decoder is not reached.
_READ = ("PNG", "JPEG")


def decode(data: bytes, what: str) -> Array:
    """A picture's pixels, `[H, W, 3]` of uint8; `what` names it in errors.

    Raises `input_mismatch` for what is no PNG or JPEG, is damaged, or has more than `MAX_PIXELS`.
    """
    if len(data) > MAX_FILE_BYTES:
        raise failure("input_mismatch", f"{what} has {len(data)} bytes; {MAX_FILE_BYTES} at most")
    try:
        with Image.open(io.BytesIO(data), formats=_READ) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise failure("input_mismatch", f"{what} has {width}x{height} pixels; {MAX_PIXELS} at most")
            turned = ImageOps.exif_transpose(picture)
            if turned.mode.startswith("I"):  # 16 bits of grey
                grey = (np.asarray(turned).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(turned.convert("RGB"))
    except UnidentifiedImageError:
        raise failure("input_mismatch", f"{what} is neither a PNG nor a JPEG file") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise failure("input_mismatch", f"{what} is damaged: {error}") from error


def encode(pixels: Array, form: Literal["png", "webp"]) -> bytes:
    """The file of an image `[H, W, 3]` of uint8. WebP is lossless."""
    written = io.BytesIO()
    picture = Image.fromarray(pixels, "RGB")
    if form == "png":
        picture.save(written, "PNG", compress_level=3)
    else:
        picture.save(written, "WEBP", lossless=True, method=2)
    return written.getvalue()


def resize(pixels: Array, width: int, height: int) -> Array:
    """The image in another size, by Lanczos' filter as diffusers resizes."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels, "RGB").resize((width, height), Image.Resampling.LANCZOS))


def to_signed(pixels: Array) -> Array:
    """Pixels `[H, W, 3]` of uint8 as `[1, 3, H, W]` of float32 from -1 to 1."""
    scaled: Array = pixels.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    return np.ascontiguousarray(scaled * np.float32(2) - np.float32(1))


@dataclass(frozen=True, slots=True)
class Pixels:
    """One image `[H, W, 3]` of uint8, and whether all the values that it was made of were finite."""

    values: Array
    finite: bool


def pixels_of(values: Array) -> Pixels:
    """See `to_pixels`."""
    return Pixels(to_pixels(values), bool(np.isfinite(values).all()))


def pixels_on_device(values: torch.Tensor) -> Pixels:
    """What `pixels_of` gives, bit for bit, of values `[3, H, W]` on a device: one byte a value comes to the host."""
    finite = values.isfinite().all()
    scaled = (values.float() / 2).add_(0.5).nan_to_num_(nan=0.0).clamp_(0, 1).mul_(255).round_()
    made = scaled.byte().permute(1, 2, 0).contiguous().cpu().numpy()
    return Pixels(made, bool(finite))


def to_pixels(values: Array) -> Array:
    """One image `[3, H, W]` from -1 to 1 as `[H, W, 3]` of uint8; what is not finite is black."""
    scaled = values.astype(np.float32)  # one array for all that follows: an image of 1024x1024 has 12 MB of it
    scaled /= np.float32(2)
    scaled += np.float32(0.5)
    np.fmax(scaled, np.float32(0), out=scaled)  # of a number and NaN, the number
    np.fmin(scaled, np.float32(1), out=scaled)
    scaled *= np.float32(255)
    np.rint(scaled, out=scaled)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))
