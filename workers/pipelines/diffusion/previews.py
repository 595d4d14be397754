"""Small images of latents while they are made: a pixel for each, in roughly the colours that the decoder gives them."""

from __future__ import annotations

import numpy as np

from workers.devices.arrays import Array
from workers.pipelines import images

#: Of each channel of SDXL's latents, red, green and blue; and what is added.
_COLOURS = np.array(
    [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362], [-0.3165, -0.2492, -0.2188]],
    np.float32,
)
_BIAS = np.array([0.1084, -0.0175, -0.0011], np.float32)


def pixels_of(latents: Array) -> Array:
    """The pixels `[h, w, 3]` of latents `[c, h, w]`; of other than four channels, the first in grey."""
    values = latents.transpose(1, 2, 0)
    if values.shape[2] == len(_COLOURS):
        colours = values @ _COLOURS + _BIAS
    else:
        colours = np.repeat(values[..., :1], 3, axis=2) / max(float(np.abs(values).max()), 1e-6)
    return images.to_pixels(colours.transpose(2, 0, 1))
