"""diffusers' own pipeline in torch over the same weights, eager and compiled: `python -m benchmarks.gpu.sdxl_torch`.

A process of its own: it compiles while the graphs are exported, then waits for `FOLDER/go` before it is timed, so that
nothing else uses the GPU meanwhile. Writes `FOLDER/torch.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import sdxl_models
from tests.support import pipelines

PROMPT = "an astronaut riding a green horse"


def main() -> None:
    """Eager, then compiled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    made = sdxl_models.modules(*names, tiny=given.tiny)
    tokenizers = given.folder / "torch"
    pipelines.tokenizer_files(tokenizers / "tokenizer")
    pipelines.tokenizer_files(tokenizers / "tokenizer_2", pad="!")
    pipe = pipelines.reference(made, tokenizers, sdxl_models.scheduler())
    side, steps = (32, 3) if given.tiny else (sdxl_models.SIDE, sdxl_models.STEPS)
    figures: dict[str, Any] = {}

    def image() -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(7)
        factor = 2 if given.tiny else 8
        # Drawn in float32: of halves, torch draws others.
        latents = torch.randn(1, 4, side // factor, side // factor, generator=generator)
        pixels: torch.Tensor = pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=5.0,
            width=side,
            height=side,
            output_type="pt",
            latents=latents.to(pipe.unet.device, pipe.unet.dtype),
        ).images
        return (pixels[0] * 255).round().to(torch.uint8).cpu()

    def unet_steps() -> None:
        kind = {"dtype": pipe.unet.dtype, "device": pipe.unet.device}
        config = pipe.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled, **kind), "time_ids": torch.randn(2, 6, **kind)}
        latents = torch.randn(2, 4, side // (2 if given.tiny else 8), side // (2 if given.tiny else 8), **kind)
        text = torch.randn(2, 77, config.cross_attention_dim, **kind)
        with torch.no_grad():
            for _ in range(steps):
                pipe.unet(latents, torch.tensor(501, device=kind["device"]), text, added_cond_kwargs=added)
        if kind["device"].type == "cuda":
            torch.cuda.synchronize()

    def taken(what: str, rounds: int = 3) -> None:
        for name, step in (("unet", unet_steps), ("image", image)):
            figures[f"{what}_{name}"] = _median(step, rounds)
            (given.folder / "torch.json.part").write_text(json.dumps(figures))
            (given.folder / "torch.json.part").replace(given.folder / "torch.json")
            print(what, name, figures[f"{what}_{name}"], flush=True)

    np.save(given.folder / "torch.npy", image().permute(1, 2, 0).numpy())
    eager = pipe.unet
    began = time.perf_counter()
    compiled = eager if given.tiny else torch.compile(eager, dynamic=False)
    if not given.tiny:
        pipe.unet = compiled
        image()
        figures["compile_seconds"] = time.perf_counter() - began
    (given.folder / "torch.ready").touch()
    print("torch is ready", figures, flush=True)
    while not (given.folder / "go").exists():
        time.sleep(0.2)
    pipe.unet = eager
    taken("eager")
    pipe.unet = compiled
    taken("compiled")
    figures["done"] = True
    (given.folder / "torch.json").write_text(json.dumps(figures))


def _median(step: Callable[[], object], rounds: int) -> float:
    step()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
