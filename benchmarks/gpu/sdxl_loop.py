"""The pipeline in this process, without a service around it, beside the least that its own sessions need."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.gpu import sdxl_models
from benchmarks.gpu.sdxl_torch import PROMPT
from benchmarks.measure import Figure, absolute, compare
from workers.devices.base import Device
from workers.devices.onnx.runtime import Cancel
from workers.pipelines import images
from workers.pipelines.base import RunContext, run_to_end
from workers.pipelines.sdxl import SdxlPipeline

#: The weight of the text against no text, and the seed.
GUIDANCE, SEED = 5.0, 7


class Bare:
    """A loop over a pipeline's sessions with nothing but the work: tensors bound once, no wait between steps."""

    def __init__(self, pipeline: SdxlPipeline, device: Device, side: int, steps: int) -> None:
        self._pipeline, self._steps = pipeline, steps
        self._cuda = device.backend == "cuda"
        self._where = torch.device("cuda:0") if self._cuda else torch.device("cpu")
        self._stream = getattr(device, "_stream", None)
        self._side = side // pipeline._autoencoder.factor()
        part = pipeline.parts["unet"]
        self._kind = torch.float16 if part.dtype == "float16" else torch.float32
        unet = part.inputs
        width, pooled = unet["encoder_hidden_states"].shape[2], unet["text_embeds"].shape[1]
        assert isinstance(width, int)
        assert isinstance(pooled, int)
        self._sample = self._zeros(2, 4, self._side, self._side)
        self._predicted = torch.zeros_like(self._sample)
        self._fixed = {
            "encoder_hidden_states": self._zeros(2, 77, width), "text_embeds": self._zeros(2, pooled),
            "time_ids": self._zeros(2, 6),
        }  # fmt: skip
        self._timestep = np.array(501)
        self.own = _session(pipeline.parts, "unet")

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._kind, device=self._where)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            yield

    def _bind(self, session: ort.InferenceSession) -> ort.IOBinding:
        binding = session.io_binding()
        for name, tensor in ({"sample": self._sample} | self._fixed).items():
            self._bound(binding.bind_input, name, tensor)
        self._bound(binding.bind_output, session.get_outputs()[0].name, self._predicted)
        return binding

    def _bound(self, bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        kind = np.float16 if tensor.dtype == torch.float16 else np.float32
        bind(name, self._where.type, 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def _run(self, session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        binding.bind_cpu_input("timestep", self._timestep)
        session.run_with_iobinding(binding, options)

    def _options(self) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._cuda:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def unet(self, session: ort.InferenceSession) -> float:
        """Seconds of the steps' graphs alone, back to back."""
        binding, options = self._bind(session), self._options()
        with self._on_stream(), torch.no_grad():
            self._sample.normal_()
            self._synchronize()
            began = time.perf_counter()
            for _ in range(self._steps):
                self._run(session, binding, options)
            self._synchronize()
            return time.perf_counter() - began

    def predicted_by(self, session: ort.InferenceSession) -> torch.Tensor:
        """What a graph predicts of fixed random inputs, in float32."""
        with self._on_stream(), torch.no_grad():
            torch.manual_seed(1)
            for tensor in (self._sample, *self._fixed.values()):
                tensor.normal_()
            self._run(session, self._bind(session), self._options())
            made = self._predicted.float()
            self._synchronize()
            return made

    def image(self) -> np.ndarray[Any, Any]:
        """One image, `[H, W, 3]` of uint8."""
        parts = self._pipeline.parts
        with self._on_stream(), torch.no_grad():
            hidden, pooled = [], None
            for encoder in self._pipeline._encoders:
                tokens = np.array([encoder.tokenizer.tokens(PROMPT).ids], encoder._ids.dtype)
                session = _session(parts, encoder.name)
                wanted = [encoder._hidden, *([encoder._pooled] if encoder._pooled else [])]
                states, *pools = session.run(wanted, {"input_ids": tokens})
                hidden.append(states)
                pooled = pools[0] if pools else pooled
            given = {
                "encoder_hidden_states": np.concatenate(hidden, -1), "text_embeds": pooled,
                "time_ids": np.array([self._pixels, self._pixels, 0, 0, self._pixels, self._pixels])[None],
            }  # fmt: skip
            for name, tensor in self._fixed.items():
                tensor.zero_()
                tensor[1:].copy_(torch.from_numpy(np.asarray(given[name])))
            self._fixed["time_ids"][0] = self._fixed["time_ids"][1]
            scheduler = sdxl_models.scheduler()
            scheduler.set_timesteps(self._steps, device="cpu")
            generator = torch.Generator("cpu").manual_seed(SEED)
            latents = torch.randn(1, *self._sample.shape[1:], generator=generator).to(self._where)
            latents = latents * scheduler.init_noise_sigma
            unet = _session(parts, "unet")
            binding, options = self._bind(unet), self._options()
            for timestep in scheduler.timesteps:
                self._sample.copy_(scheduler.scale_model_input(latents, timestep).expand(self._sample.shape))
                self._timestep = np.array(float(timestep)).astype(np.int64)
                self._run(unet, binding, options)
                negative, positive = self._predicted.float().chunk(2)
                guided = negative + GUIDANCE * (positive - negative)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            return self._decoded(latents)

    def _decoded(self, latents: torch.Tensor) -> np.ndarray[Any, Any]:
        session = _session(self._pipeline.parts, "vae_decoder")
        scaled = (latents / self._pipeline._autoencoder.scale.scaling).to(self._kind).contiguous()
        image = torch.zeros(1, 3, self._pixels, self._pixels, dtype=self._kind, device=self._where)
        binding = session.io_binding()
        self._bound(binding.bind_input, session.get_inputs()[0].name, scaled)
        self._bound(binding.bind_output, session.get_outputs()[0].name, image)
        session.run_with_iobinding(binding, self._options())
        pixels = ((image[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        made: np.ndarray[Any, Any] = pixels.permute(1, 2, 0).cpu().numpy()
        return made

    @property
    def _pixels(self) -> int:
        return self._side * self._pipeline._autoencoder.factor()

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def figures(folder: Path, facts: dict[str, Any], *, tiny: bool) -> list[Figure]:
    """Seconds of an image, of the graph alone, and how far the images are apart; `facts` takes the rest."""
    from workers.devices import open_device

    side, steps = (32, 3) if tiny else (sdxl_models.SIDE, sdxl_models.STEPS)
    device = open_device("cpu" if tiny else "cuda", 0)
    began = time.perf_counter()
    pipeline = SdxlPipeline.read(folder, folder, {})
    pipeline.open(device, None)
    facts["load_seconds"] = time.perf_counter() - began
    facts["parts"] = pipeline.parts.facts()
    facts["kept"] = {str(one.relative_to(folder)): one.stat().st_size for one in folder.rglob("*.fused")}
    facts["cpu_fallback_ops"] = pipeline.parts.cpu_fallback_ops
    print("loaded", facts, flush=True)
    began = time.perf_counter()
    bare = Bare(pipeline, device, side, steps)

    def ours() -> np.ndarray[Any, Any]:
        request = {
            "prompt": PROMPT,
            "seed": SEED,
            "steps": steps,
            "guidance_scale": GUIDANCE,
            "width": side,
            "height": side,
        }
        run = RunContext(request, Cancel(), lambda _: np.zeros(0), lambda _: b"", lambda _: "")
        made: np.ndarray[Any, Any] = run_to_end(pipeline.run(run)).images[0].pixels
        return made

    apart = np.abs(ours().astype(int) - bare.image().astype(int))
    facts["first_image_seconds"] = time.perf_counter() - began
    found = [absolute("the same image as the bare loop's, largest difference", "of 255", float(apart.max()), at_most=4)]
    in_torch = folder / "torch.npy"
    if in_torch.exists():
        off = np.abs(ours().astype(int) - np.load(in_torch).astype(int))
        facts["from_torch"] = {"mean": float(off.mean()), "largest": int(off.max())}
    rounds = 3 if tiny else 5
    image = compare(
        f"an image of {side}x{side} in {steps} steps, guidance on", "s", lambda: _seconds(ours),
        lambda: _seconds(bare.image), "bare loop over the same ONNX Runtime sessions, I/O binding", at_most=1.02,
        rounds=rounds,
    )  # fmt: skip
    facts["ours_seconds"] = image.figure
    facts["bare_seconds"] = [image.yardstick]
    session = _session(pipeline.parts, "unet")
    bare.unet(session)
    alone = statistics.median(bare.unet(session) for _ in range(rounds))
    found += [image, absolute("an image, in seconds", "s", image.figure, at_most=1.9),
              absolute(f"of it the UNet's {steps} graphs alone", "s", alone)]  # fmt: skip
    print("image", image.figure, image.yardstick, "unet alone", alone, facts.get("from_torch"), flush=True)
    with bare._on_stream(), torch.no_grad():
        latents = bare._sample[:1].float()
        facts["decoder_seconds"] = min(_seconds(lambda: bare._decoded(latents)) for _ in range(4))
    facts["decoded_to_pixels_seconds"] = _decoding(pipeline, latents.cpu().numpy())
    print("decoder", facts["decoder_seconds"], facts["decoded_to_pixels_seconds"], flush=True)
    facts["encoders_seconds"] = min(_seconds(lambda: _encode(pipeline)) for _ in range(4))
    for name, level, options in _variants(tiny=tiny):
        try:
            taken = _variant(device, folder, bare, level, options, facts.setdefault("joined_from_exported", {}))
        except Exception as error:  # noqa: BLE001 - a variant that this build has not is said
            facts[f"unet {name}"] = str(error)[:300]
        else:
            facts[f"unet {name}"] = taken
        print(name, facts[f"unet {name}"], flush=True)
    pipeline.close()
    return found


def _decoding(pipeline: SdxlPipeline, latents: np.ndarray[Any, Any]) -> dict[str, float]:
    """Seconds from the last latents to pixels: by the device, and by the host out of the decoder's values."""
    autoencoder = pipeline._autoencoder

    def by_device() -> None:
        assert run_to_end(autoencoder.decode_pixels(latents, Cancel())).values.dtype == np.uint8

    def by_host() -> None:
        images.pixels_of(run_to_end(autoencoder.decode(latents, Cancel()))[0])

    ways = (("by the device", by_device), ("by the host", by_host))
    return {name: min(_seconds(way) for _ in range(6)) for name, way in ways}


def _variants(*, tiny: bool) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The UNet's graph in other ways, for comparison: name, level, options of the provider."""
    yield "as exported", "all", {}
    if not tiny and os.environ.get("SDXL_EXPLORE"):
        yield "fused, cuDNN attention", "fused", {"sdpa_kernel": "8"}
        yield "fused, exhaustive", "fused", {"cudnn_conv_algo_search": "EXHAUSTIVE"}


def facts_of_difference(bare: Bare, session: ort.InferenceSession, apart: dict[str, float]) -> None:
    """How far the joined graph's result, which `bare` has, is from that of the graph as exported, same inputs."""
    joined = bare.predicted_by(bare.own)
    exported = bare.predicted_by(session)
    off = (joined - exported).abs()
    apart |= {"largest": float(off.max()), "mean": float(off.mean()), "spread": float(exported.std())}


def _encode(pipeline: SdxlPipeline) -> None:
    for encoder in pipeline._encoders:
        encoder.run(encoder.tokenizer.tokens(PROMPT), Cancel())


def _variant(
    device: Device, folder: Path, bare: Bare, level: str, options: dict[str, str], apart: dict[str, float]
) -> float:
    from dataclasses import replace

    from workers.devices.values import SessionOptions

    provider = device.provider()
    given = replace(provider, options={**provider.options, **options})
    own = device.provider
    device.provider = lambda: given  # type: ignore[method-assign]
    try:
        model = device.open_model(folder / "unet" / "model.onnx", SessionOptions(graph_optimization=level), None)
    finally:
        device.provider = own  # type: ignore[method-assign]
    session = model._session
    assert session is not None
    bare.unet(session)
    if level == "all":
        facts_of_difference(bare, session, apart)
    taken = min(bare.unet(session) for _ in range(2))
    del session
    model.close()
    return taken


def _session(parts: Any, name: str) -> ort.InferenceSession:
    session: ort.InferenceSession | None = parts.get(name)._session
    assert session is not None
    return session


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
