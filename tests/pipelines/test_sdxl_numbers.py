"""What the sdxl pipeline computes, compared with diffusers in torch with the same weights and initial noise."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import CLIPTokenizer

from device_operations.errors import OperationError
from tests.devices.torch_on_cpu import TorchOnCpu
from tests.pipelines.conftest import base_scheduler, png
from tests.pipelines.driving import context, made, opened
from tests.support.pipelines import export_sdxl, reference, tiny_sdxl, tokenizer_files, write_json
from workers.devices.base import Device
from workers.devices.cpu import CpuDevice
from workers.pipelines.base import Parts, Pipeline, Result
from workers.pipelines.diffusion.prompts import PromptTokenizer

PROMPT = "a photo of an astronaut riding a horse"

#: Each scheduler of diffusers as a user of SDXL makes it.
MADE: dict[str, Callable[[Any], Any]] = {
    "euler": EulerDiscreteScheduler.from_config,
    "euler_ancestral": EulerAncestralDiscreteScheduler.from_config,
    "dpmpp_2m_karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "ddim": DDIMScheduler.from_config,
    "unipc": UniPCMultistepScheduler.from_config,
    "lcm": LCMScheduler.from_config,
}


@pytest.fixture(scope="module")
def pipeline(sdxl_folder: Path) -> Pipeline:
    return opened("sdxl", sdxl_folder)


def of_diffusers(modules: Mapping[str, Any], folder: Path, scheduler: Any, seed: int, **asked: Any) -> np.ndarray:
    """The pixels that diffusers makes, `[H, W, 3]` from 0 to 1."""
    kind = {"kind": StableDiffusionXLImg2ImgPipeline} if "image" in asked else {}
    whole = reference(modules, folder, scheduler, **kind)
    generator = torch.Generator("cpu").manual_seed(seed)
    return whole(generator=generator, output_type="np", **asked).images[0]


def request(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "seed": 7, "steps": 5, "width": 32, "height": 48, **more}


def assert_same(result: Result, wanted: np.ndarray, number: int = 0) -> None:
    difference = np.abs(result.images[number].pixels.astype(float) / 255 - wanted)
    assert difference.mean() < 1 / 255
    assert difference.max() < 4 / 255
    # The bounds are for rounding to pixels; an image of one colour would pass them, and shows nothing.
    assert result.images[number].pixels.std() > 5


@pytest.mark.parametrize("name", MADE)
def test_each_scheduler_makes_the_image_that_diffusers_makes(
    name: str, pipeline: Pipeline, sdxl: dict[str, Any], sdxl_folder: Path
) -> None:
    scheduler = MADE[name](base_scheduler().config)
    asked = {"guidance_scale": 4.0, "negative_prompt": "blurry"}
    result = made(pipeline, context(request(scheduler=name, **asked)))
    wanted = of_diffusers(
        sdxl, sdxl_folder, scheduler, 7, prompt=PROMPT, num_inference_steps=5, width=32, height=48, **asked
    )
    assert_same(result, wanted)
    assert result.facts["scheduler"] == name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param({}, {"guidance_scale": 5.0}, id="defaults, no negative prompt: zeros"),
        pytest.param({"guidance_scale": 1.0}, {"guidance_scale": 1.0}, id="guidance off"),
        pytest.param({"negative_prompt": "", "guidance_scale": 7.5}, {"negative_prompt": "", "guidance_scale": 7.5}, id="empty negative"),
        pytest.param({"width": 64, "height": 32}, {"width": 64, "height": 32}, id="wide"),
    ],
)  # fmt: skip
def test_prompts_guidance_and_sizes_are_diffusers(
    ours: dict[str, Any], theirs: dict[str, Any], pipeline: Pipeline, sdxl: dict[str, Any], sdxl_folder: Path
) -> None:
    result = made(pipeline, context(request(**ours)))
    asked = {"prompt": PROMPT, "num_inference_steps": 5, "width": 32, "height": 48, **theirs}
    assert_same(result, of_diffusers(sdxl, sdxl_folder, base_scheduler(), 7, **asked))


def test_a_second_size_of_unet_and_distilled_guidance(tmp_path: Path) -> None:
    modules = tiny_sdxl(3, width=16, guidance_embedding=32)
    lcm = LCMScheduler.from_config(base_scheduler().config)
    folder = export_sdxl(modules, tmp_path, lcm)
    result = made(opened("sdxl", folder), context({"prompt": PROMPT, "seed": 1, "width": 32, "height": 32}))
    assert (result.facts["scheduler"], result.facts["steps"]) == ("lcm", 4)
    wanted = of_diffusers(
        modules, folder, lcm, 1, prompt=PROMPT, num_inference_steps=4, guidance_scale=5.0, width=32, height=32
    )
    assert_same(result, wanted)


@pytest.mark.parametrize("name", MADE)
def test_image_to_image_is_diffusers(name: str, pipeline: Pipeline, sdxl: dict[str, Any], sdxl_folder: Path) -> None:
    picture = np.random.default_rng(5).integers(0, 256, (48, 32, 3), np.uint8)
    asked = {"strength": 0.6, "guidance_scale": 3.0}
    given = {"prompt": PROMPT, "seed": 9, "steps": 5, "scheduler": name, "image": {"blob_id": "picture"}, **asked}
    result = made(pipeline, context(given, files={"picture": png(picture)}))
    scheduler = MADE[name](base_scheduler().config)
    wanted = of_diffusers(
        sdxl, sdxl_folder, scheduler, 9, prompt=PROMPT, num_inference_steps=5, image=Image.fromarray(picture), **asked
    )
    assert_same(result, wanted)
    assert result.facts["steps"] == 3


@pytest.mark.parametrize("device", [CpuDevice(), TorchOnCpu()], ids=["host memory", "torch's memory"])
def test_a_seed_is_an_image_bit_for_bit_alone_and_among_others(device: Device, sdxl_folder: Path) -> None:
    pipeline = opened("sdxl", sdxl_folder, device)
    held = device.allocated_bytes
    together = made(pipeline, context(request(images=3, scheduler="euler_ancestral")))
    assert [image.facts["seed"] for image in together.images] == [7, 8, 9]
    for image in reversed(together.images):
        alone = made(pipeline, context(request(seed=image.facts["seed"], scheduler="euler_ancestral")))
        assert np.array_equal(alone.images[0].pixels, image.pixels)
    assert not np.array_equal(together.images[0].pixels, together.images[1].pixels)
    assert device.allocated_bytes == held, "a run gives back what it held on the device"


def test_a_run_that_is_stopped_gives_back_what_it_held_on_the_device(sdxl_folder: Path) -> None:
    device = TorchOnCpu()
    pipeline = opened("sdxl", sdxl_folder, device)
    held = device.allocated_bytes
    run = context(request())
    steps = pipeline.run(run)
    while not (next(steps).facts or {}).get("done"):
        pass
    assert device.allocated_bytes > held
    run.cancel.trip("cancelled")
    with pytest.raises(OperationError) as raised:
        next(steps)
    assert raised.value.code == "cancelled"
    assert device.allocated_bytes == held
    closed = pipeline.run(context(request()))
    while not (next(closed).facts or {}).get("done"):
        pass
    closed.close()
    assert device.allocated_bytes == held


def test_a_seed_is_an_image_bit_for_bit_while_other_runs_go_between_its_steps(pipeline: Pipeline) -> None:
    alone = made(pipeline, context(request()))
    steps = pipeline.run(context(request()))
    between = []
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result = stop.value
            break
        between.append(made(pipeline, context(request(steps=2, seed=len(between), width=64, scheduler="unipc"))))
    assert len(between) >= 5
    assert np.array_equal(result.images[0].pixels, alone.images[0].pixels)


def test_a_size_that_the_unet_does_not_halve_is_refused_before_the_first_step(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    write_json(folder / "unet" / "config.json", {**config, "block_out_channels": [8, 8, 8, 8, 8]})
    pipeline = opened("sdxl", folder)
    with pytest.raises(OperationError, match="sides are multiples of 32"):
        next(pipeline.run(context(request(width=40))))


def test_a_scheduler_that_keeps_what_was_predicted_is_given_its_own(
    sdxl: dict[str, Any], sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    config = base_scheduler(prediction_type="sample").config
    scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    write_json(folder / "scheduler" / "scheduler_config.json", {**config, "_class_name": "DDIMScheduler"})
    asked = {"guidance_scale": 0.0}
    result = made(opened("sdxl", folder), context(request(scheduler="dpmpp_2m_karras", **asked)))
    wanted = of_diffusers(
        sdxl, sdxl_folder, scheduler, 7, prompt=PROMPT, num_inference_steps=5, width=32, height=48, **asked
    )
    assert_same(result, wanted)


def test_where_nothing_can_be_bound_the_image_is_the_same(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = made(pipeline, context(request(scheduler="unipc")))
    monkeypatch.setattr(Parts, "binds", False)
    staged = made(pipeline, context(request(scheduler="unipc")))
    assert np.abs(bound.images[0].pixels.astype(int) - staged.images[0].pixels).max() <= 1


def test_with_low_memory_one_part_is_there_at_a_time_and_the_image_is_the_same(
    pipeline: Pipeline, sdxl_folder: Path
) -> None:
    frugal = opened("sdxl", sdxl_folder, low_memory=True)
    there: list[list[str]] = []

    def loaded() -> list[str]:
        return sorted(frugal.parts._open)

    assert loaded() == []
    steps = frugal.run(context(request()))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result = stop.value
            break
        there.append(loaded())
    assert max(map(len, there)) == 1
    assert {name for names in there for name in names} >= {"text_encoder", "text_encoder_2", "unet"}
    assert np.array_equal(result.images[0].pixels, made(pipeline, context(request())).images[0].pixels)
    parts = {part["name"]: part["memory_bytes"] for part in frugal.parts.facts()}
    assert frugal.parts.memory_bytes == max(parts.values())
    assert pipeline.parts.memory_bytes == sum(part["memory_bytes"] for part in pipeline.parts.facts())


def test_previews_are_small_images_every_few_steps(pipeline: Pipeline) -> None:
    kept: list[bytes] = []
    told = [p.facts for p in pipeline.run(context(request(preview_every=2, images=2), kept=kept)) if p.facts]
    previews = [one["preview"] for one in told if "preview" in one]
    assert [(one["image"], one["width"], one["height"]) for one in previews] == [(0, 16, 24)] * 2 + [(1, 16, 24)] * 2
    assert len(kept) == 4
    assert [(one["done"], one["total"]) for one in told] == [(number, 10) for number in range(1, 11)]
    assert all(one["seconds_left"] >= 0 for one in told)


def test_what_is_cut_off_a_prompt_is_said(pipeline: Pipeline) -> None:
    long = "cat " * 90
    result = made(pipeline, context(request(prompt=long, steps=1, guidance_scale=0.0)))
    assert result.facts["truncated"] == [
        {"field": "prompt", "text_encoder": name, "tokens": 90, "kept": 75}
        for name in ("text_encoder", "text_encoder_2")
    ]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("prompt", ["", "A Cat!", "it's  a\nnaïve ☃ test_1234 -- ok", "<|endoftext|> x", "x" * 300])
def test_prompts_are_cut_into_the_tokens_that_transformers_makes(prompt: str, pad: str, tmp_path: Path) -> None:
    folder = tokenizer_files(tmp_path / "tokenizer", pad)
    theirs = CLIPTokenizer.from_pretrained(folder)(prompt, padding="max_length", max_length=77, truncation=True)
    assert PromptTokenizer(folder, tmp_path).tokens(prompt).ids == theirs["input_ids"]


def test_float16_is_as_the_files_have_it(pipeline: Pipeline, tmp_path: Path) -> None:
    modules = tiny_sdxl()
    for name in ("unet", "vae"):
        modules[name] = modules[name].half()
    half = opened("sdxl", export_sdxl(modules, tmp_path, base_scheduler()))
    dtypes = {part["name"]: part["dtype"] for part in half.parts.facts()}
    assert (dtypes["unet"], dtypes["vae_decoder"], dtypes["text_encoder"]) == ("float16", "float16", "float32")
    exact, rounded = (made(one, context(request())).images[0].pixels.astype(int) for one in (pipeline, half))
    assert 0 < np.abs(exact - rounded).mean() < 4


def test_a_worker_without_the_extra_says_what_to_install(sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "workers.pipelines.sdxl",
        "workers.pipelines.diffusion.prompts",
        "workers.pipelines.diffusion.parts",
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OperationError, match=r"device-operations-server\[pipelines\]") as raised:
        opened("sdxl", sdxl_folder)
    assert raised.value.code == "model_invalid"


@pytest.mark.serial
def test_a_cancel_stops_inside_a_step(pipeline: Pipeline) -> None:
    # By the processor's time: what else runs on the machine makes no difference.
    run = context(request(width=224, height=224))
    steps = pipeline.run(run)
    for wanted in (1, 2):
        began = time.process_time()
        while (next(steps).facts or {}).get("done") != wanted:
            began = time.process_time()
    one_step = time.process_time() - began
    assert one_step > 0.2, "the step is too short to be stopped inside"
    timer = threading.Timer(0.02, run.cancel.trip)
    began = time.process_time()
    timer.start()
    with pytest.raises(OperationError) as raised:
        next(steps)
    assert raised.value.code == "cancelled"
    assert time.process_time() - began < 0.7 * one_step
