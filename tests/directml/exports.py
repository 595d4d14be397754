"""The tiny random SDXL of tests/pipelines and what its graphs give on the CPU, made on Linux for tests in the rig.

    python -m tests.directml.exports FOLDER

Leaves FOLDER/sdxl, the exported pipeline, and FOLDER/expected.npz: `PART/CASE/in/NAME` and `PART/CASE/out/NAME` of each
graph's runs on the CPU provider, and `image/CASE`, the pixels `[H, W, 3]` of the whole pipeline's images there. The rig's
own Python has neither diffusers' models nor transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

#: Runs of the whole pipeline, by name.
REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {"prompt": "a lighthouse in a storm", "seed": 7, "steps": 4, "width": 32, "height": 32},
    "unguided": {
        "prompt": "an astronaut", "seed": 3, "steps": 3, "width": 48, "height": 32, "guidance_scale": 1.0,
        "scheduler": "unipc",
    },
}  # fmt: skip


def feeds() -> dict[str, dict[str, dict[str, np.ndarray[Any, Any]]]]:
    """Inputs of each part's runs, by part and case: batches of one and two, square and not."""
    drawn = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return drawn.standard_normal(shape).astype(np.float32)

    ids = drawn.integers(0, 900, (1, 77))
    return {
        "vae_decoder": {"square": {"latent_sample": normal(1, 4, 16, 16)}, "wide": {"latent_sample": normal(1, 4, 8, 24)}},
        "vae_encoder": {"square": {"sample": normal(1, 3, 32, 32)}, "wide": {"sample": normal(1, 3, 16, 48)}},
        "unet": {
            "guided": {
                "sample": normal(2, 4, 16, 16), "timestep": np.array(501), "encoder_hidden_states": normal(2, 77, 64),
                "text_embeds": normal(2, 32), "time_ids": normal(2, 6) * 32,
            },
            "wide": {
                "sample": normal(1, 4, 8, 24), "timestep": np.array(1), "encoder_hidden_states": normal(1, 77, 64),
                "text_embeds": normal(1, 32), "time_ids": normal(1, 6) * 32,
            },
        },
        "text_encoder": {"prompt": {"input_ids": ids.astype(np.int32)}},
        "text_encoder_2": {"prompt": {"input_ids": ids}},
    }  # fmt: skip


def main() -> None:
    """Exports the pipeline, runs it on the CPU, and writes what came out."""
    from tests.pipelines.conftest import base_scheduler
    from tests.pipelines.driving import context, made, opened
    from tests.support.pipelines import export_sdxl, tiny_sdxl

    folder = Path(sys.argv[1])
    pipeline = opened("sdxl", export_sdxl(tiny_sdxl(), folder / "sdxl", base_scheduler()))
    kept: dict[str, np.ndarray[Any, Any]] = {}
    for part, cases in feeds().items():
        for case, given in cases.items():
            came = pipeline.parts.get(part).run(given)
            kept |= {f"{part}/{case}/in/{name}": value for name, value in given.items()}
            kept |= {f"{part}/{case}/out/{name}": np.asarray(value) for name, value in came.items()}
    for case, request in REQUESTS.items():
        kept[f"image/{case}"] = made(pipeline, context(request)).images[0].pixels
    np.savez(folder / "expected.npz", **kept)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
