"""The `sdxl` pipeline: Stable Diffusion XL as diffusers and Optimum export it, text to image and image to image.

    prompts ─▶ tokenizers ─▶ text encoders ─▶ conditions ─┐
    seed, or image ─▶ latents ────────────────────────────┴▶ steps (denoising) ─▶ VAE ─▶ image

Images of one run are made one after the other, each from a seed of its own: an image is the same whether it is made
alone or among others.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from device_operations.errors import failure
from device_operations.requests.pipelines import MAX_PIXELS
from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array
from workers.execution.claimed_job import Progress
from workers.pipelines import images
from workers.pipelines.base import Pace, Parts, Pipeline, PixelImage, Result, RunContext, Steps
from workers.pipelines.diffusion import previews
from workers.pipelines.diffusion.autoencoder import DECODER, ENCODER, Autoencoder
from workers.pipelines.diffusion.denoising import Conditions, Preview, denoise
from workers.pipelines.diffusion.parts import TEXT_ENCODERS, UNET, Sizes, TextEncoder, check_fit, unet_of
from workers.pipelines.diffusion.prompts import PromptTokenizer, PromptTokens
from workers.pipelines.diffusion.schedulers import Schedule, Schedulers
from workers.pipelines.files import find_graph, read_config, read_json, read_part

T = TypeVar("T")

#: Where each part lies; the encoder of images may be missing.
PLACES = {
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    UNET: ("unet",),
    DECODER: ("vae_decoder",),
    ENCODER: ("vae_encoder",),
}

#: Steps, guidance and strength where neither the run nor the model says them; of models that take few steps.
STEPS, GUIDANCE, STRENGTH = 30, 5.0, 0.3
FEW_STEPS = 4


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A run's request with what the model's configuration adds to it; sizes are pixels."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    images: int
    scheduler: str | None
    strength: float | None
    image: Array | None


class SdxlPipeline(Pipeline):
    """Two text encoders, a UNet and a VAE."""

    model_type: ClassVar[str] = "sdxl"

    def __init__(
        self,
        parts: Parts,
        tokenizers: Mapping[str, PromptTokenizer],
        schedulers: Schedulers,
        sizes: Sizes,
        vae_config: Mapping[str, Any],
    ) -> None:
        super().__init__(parts)
        self._autoencoder = Autoencoder(parts, vae_config, "vae_decoder/config.json")
        self._encoders = [TextEncoder(parts, name, tokenizers[name]) for name in TEXT_ENCODERS]
        self._schedulers = schedulers
        self._sizes = sizes
        self._unet = unet_of(parts, sizes)
        #: How long decoding an image took last, in seconds by its pixels: what comes after the last step.
        self._decoding: dict[int, float] = {}

    @classmethod
    def read(cls, source: Path, root: Path, options: Mapping[str, Any]) -> Self:
        """See `Pipeline.read`."""
        if not source.is_dir():
            raise failure("model_invalid", "sdxl is a folder of parts (or blobs by their paths), and this is one file")
        index = read_config(source, "model_index.json")
        for name in index:
            if "/" in name or "\\" in name or ".." in name:
                raise failure("model_invalid", f"model_index.json names the part {name[:100]!r}, outside the folder")
        found = {name: find_graph(source, *places) for name, places in PLACES.items()}
        missing = [name for name, file in found.items() if file is None and name != ENCODER]
        missing += [name for name in ("tokenizer", "tokenizer_2") if not (source / name).is_dir()]
        if not (source / "scheduler" / "scheduler_config.json").is_file():
            missing.append("scheduler/scheduler_config.json")
        if missing:
            raise failure("model_invalid", f"missing: {', '.join(missing)}; see docs/pipelines.md for the layout")
        configs = {name: read_config(source, f"{name}/config.json") for name in PLACES}
        schedulers = Schedulers(read_json(source / "scheduler" / "scheduler_config.json", source))
        tokenizers = {
            name: PromptTokenizer(source / name.replace("text_encoder", "tokenizer"), source) for name in TEXT_ENCODERS
        }
        parts = Parts([read_part(name, file, root) for name, file in found.items() if file is not None], root, options)
        sizes = check_fit(parts, configs, tokenizers, index)
        vae_config = configs[DECODER] or read_config(source, "vae/config.json")
        return cls(parts, tokenizers, schedulers, sizes, vae_config)

    def about(self) -> dict[str, Any]:
        return {"scheduler": self._schedulers.own_name, "image_to_image": ENCODER in self.parts}

    def run(self, run: RunContext) -> Steps:
        """Text, then for each image its steps and its decoding."""
        asked = self._asked(run)
        schedule = self._schedule(asked)
        self._check(asked, run)
        conditions, said = yield from self._conditions(asked, run)
        encoded = None
        pace = Pace(len(schedule.timesteps) * asked.images)
        if asked.image is not None:
            encoded = yield from _paused(self._autoencoder.encode(images.to_signed(asked.image), run.cancel), pace)
        made = []
        for number in range(asked.images):
            seed = (asked.seed + number) % 2**63
            schedule = self._schedule(asked)
            generator = torch.Generator("cpu").manual_seed(seed)
            latents = self._start(asked, schedule, generator, encoded)
            seconds = self._decoding.get(asked.width * asked.height, 0.0)
            denoised = yield from denoise(
                self.parts, self._unet, schedule, latents, conditions, generator, run.cancel, pace,
                then_seconds=seconds * (asked.images - number),
                preview=self._preview(run, number),
            )  # fmt: skip
            began = time.perf_counter()
            decoded = yield from _paused(self._autoencoder.decode_pixels(denoised, run.cancel), pace)
            self._decoding = {asked.width * asked.height: time.perf_counter() - began}
            if not decoded.finite:
                raise failure(
                    "run_failed",
                    f"{DECODER} gave values that are not finite; exports of this VAE in float16 overflow: export it in "
                    "float32",
                )
            made.append(PixelImage(decoded.values, run.request.get("output_format", "png"), {"seed": seed}))
        facts = {
            "seed": asked.seed, "steps": len(schedule.timesteps), "guidance_scale": asked.guidance_scale,
            "scheduler": schedule.name, **said,
        }  # fmt: skip
        return Result(images=made, facts=facts)

    # ---- what is asked

    def _asked(self, run: RunContext) -> ImageRequest:
        given = run.request
        few = self._schedulers.is_distilled or self._sizes.guidance_embedding is not None
        image = None
        if "image" in given:
            if ENCODER not in self.parts:
                raise failure("input_mismatch", f"an image needs {ENCODER}, which this model was loaded without")
            image = images.decode(run.picture(given["image"]), "image")
        own = self._sizes.sample_side * self._autoencoder.factor(run.cancel)
        height, width = image.shape[:2] if image is not None else (own, own)
        step = self._side_step(run)
        # An image's own size is brought to what the model takes; a size that is asked for is not.
        width, height = (max(step, side // step * step) for side in (width, height))
        width, height = given.get("width", width), given.get("height", height)
        if image is not None:
            image = images.resize(image, width, height)
        embeds = self._sizes.guidance_embedding is not None
        return ImageRequest(
            prompt=given["prompt"],
            negative_prompt=given.get("negative_prompt"),
            width=width,
            height=height,
            steps=given.get("steps", FEW_STEPS if few else STEPS),
            guidance_scale=given.get("guidance_scale", GUIDANCE if embeds or not few else 0.0),
            seed=given["seed"],
            images=given.get("images", 1),
            scheduler=given.get("scheduler"),
            strength=None if image is None else given.get("strength", STRENGTH),
            image=image,
        )

    def _side_step(self, run: RunContext) -> int:
        """A side is a multiple of so many pixels: what the VAE and the UNet halve comes back in the same size."""
        return self._autoencoder.factor(run.cancel) * self._sizes.unet_step

    def _check(self, asked: ImageRequest, run: RunContext) -> None:
        step = self._side_step(run)
        if asked.width % step or asked.height % step:
            raise failure(
                "input_mismatch",
                f"an image of {asked.width}x{asked.height} pixels was asked; with this model sides are multiples of "
                f"{step}",
            )
        if asked.width * asked.height > MAX_PIXELS:
            raise failure("input_mismatch", f"an image has {MAX_PIXELS} pixels at most; give width and height")

    def _schedule(self, asked: ImageRequest) -> Schedule:
        return self._schedulers.schedule(asked.scheduler, asked.steps, asked.strength)

    # ---- before the first step

    def _conditions(
        self, asked: ImageRequest, run: RunContext
    ) -> Generator[Progress, None, tuple[Conditions, dict[str, Any]]]:
        """What the steps are conditioned on, and what the result says of the prompts."""
        guided = asked.guidance_scale > 1 and self._sizes.guidance_embedding is None
        prompts = {"prompt": asked.prompt}
        zeros = guided and asked.negative_prompt is None and self._sizes.zeros_for_empty_prompt
        if guided and not zeros:
            prompts["negative_prompt"] = asked.negative_prompt or ""
        truncated = []
        hidden: dict[str, Array] = {}
        pooled: dict[str, Array] = {}
        for encoder in self._encoders:  # each is needed once: with low_memory it is loaded once
            for field, prompt in prompts.items():
                tokens = encoder.tokenizer.tokens(prompt)
                if tokens.kept < tokens.count:
                    truncated.append(_cut(field, encoder.name, tokens))
                states, pools = encoder.run(tokens, run.cancel)
                hidden[field] = states if field not in hidden else np.concatenate([hidden[field], states], axis=-1)
                if pools is not None:
                    pooled[field] = pools
                yield Progress()
        if zeros:
            hidden["negative_prompt"] = np.zeros_like(hidden["prompt"])
            pooled["negative_prompt"] = np.zeros_like(pooled["prompt"])
        order = ["negative_prompt", "prompt"] if guided else ["prompt"]
        time_ids = [asked.height, asked.width, 0, 0, asked.height, asked.width]
        inputs = self.parts[UNET].inputs
        values = {
            "encoder_hidden_states": np.concatenate([hidden[field] for field in order]),
            "text_embeds": np.concatenate([pooled[field] for field in order]),
            "time_ids": np.array([time_ids] * len(order)),
        }
        if self._sizes.guidance_embedding is not None:
            values["timestep_cond"] = _guidance_embedding(asked.guidance_scale - 1, self._sizes.guidance_embedding)
        typed = {name: value.astype(numpy_dtype(inputs[name].dtype)) for name, value in values.items()}
        return Conditions(typed, asked.guidance_scale if guided else 1.0), {"truncated": truncated}

    def _start(
        self, asked: ImageRequest, schedule: Schedule, generator: torch.Generator, encoded: Array | None
    ) -> torch.Tensor:
        """The latents before the first step: noise, or the image's with noise for what is to be changed."""
        factor = self._autoencoder.factor()
        shape = (1, self._sizes.channels, asked.height // factor, asked.width // factor)

        def noise(of: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(of, generator=generator, dtype=torch.float32)

        if encoded is None:
            begun: torch.Tensor = noise(shape) * schedule.scheduler.init_noise_sigma
            return begun
        drawn = self._autoencoder.latents_of(encoded, lambda of: noise(of).numpy())
        latents: torch.Tensor = schedule.scheduler.add_noise(
            torch.from_numpy(np.ascontiguousarray(drawn)), noise(shape), schedule.timesteps[0].reshape(1)
        )
        return latents

    # ---- between steps

    def _preview(self, run: RunContext, number: int) -> Preview | None:
        """Small images of one image's latents, as blobs, if the run asks for them."""
        every = run.request.get("preview_every")
        if every is None:
            return None

        def show(foreseen: Array) -> dict[str, Any]:
            pixels = previews.pixels_of(foreseen[0])
            height, width = pixels.shape[:2]
            blob_id = run.keep(images.encode(pixels, "png"))
            return {"blob_id": blob_id, "media_type": "image/png", "width": width, "height": height, "image": number}

        return Preview(every, show)


def _cut(field: str, encoder: str, tokens: PromptTokens) -> dict[str, Any]:
    return {"field": field, "text_encoder": encoder, "tokens": tokens.count, "kept": tokens.kept}


def _guidance_embedding(weight: float, size: int) -> Array:
    """How distilled models take their guidance: sines and cosines of it, `[1, size]`."""
    half = size // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -(np.log(10000.0) / (half - 1)))
    angles = np.float32(weight * 1000.0) * frequencies
    made = np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)
    return np.pad(made, ((0, 0), (0, size - 2 * half)))


def _paused(work: Generator[None, None, T], pace: Pace) -> Generator[Progress, None, T]:
    """What `work` gives, with a pause where it yields, and one after it."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            made: T = stop.value
            yield from pace.pause()
            return made
        yield from pace.pause()
