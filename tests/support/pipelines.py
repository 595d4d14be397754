"""Tiny pipelines with random weights, made with diffusers' and transformers' classes and exported as Optimum does.

    tiny_vae(seed)                     diffusers' AutoencoderKL
    export_vae(vae, folder)            vae_decoder/, vae_encoder/: model.onnx and config.json each

Making and exporting one takes a second or two: fixtures of a whole session keep them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

#: What an exported graph's batch and sides are called.
_IMAGE = {0: "batch_size", 2: "height", 3: "width"}


def tiny_vae(seed: int = 0, scaling_factor: float = 0.13025, shift_factor: float | None = None) -> AutoencoderKL:
    """An autoencoder of two blocks: 4 channels of latents, 2 pixels a side for each."""
    torch.manual_seed(seed)
    made = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        sample_size=32, scaling_factor=scaling_factor, shift_factor=shift_factor,
    )  # fmt: skip
    return made.eval()


def export_vae(vae: AutoencoderKL, folder: Path, *, encoder: bool = True) -> Path:
    """Writes the halves of an autoencoder below `folder`, in the layout of diffusers and Optimum."""
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, dtype=vae.dtype)
    export(_Decoder(vae), folder / "vae_decoder", {"latent_sample": (latents, _IMAGE)}, {"sample": _IMAGE})
    write_json(folder / "vae_decoder" / "config.json", vae.config)
    if encoder:
        image = torch.randn(1, 3, 16, 16, dtype=vae.dtype)
        export(_Encoder(vae), folder / "vae_encoder", {"sample": (image, _IMAGE)}, {"latent_parameters": _IMAGE})
        write_json(folder / "vae_encoder" / "config.json", vae.config)
    return folder


def export(
    module: torch.nn.Module,
    folder: Path,
    inputs: Mapping[str, tuple[torch.Tensor, Mapping[int, str]]],
    outputs: Mapping[str, Mapping[int, str]],
) -> Path:
    """Exports a module as `folder/model.onnx`. Inputs and outputs are named, with the names of their open sides."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = {name: dict(sides) for name, (_, sides) in inputs.items()} | {
        name: dict(sides) for name, sides in outputs.items()
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: what it takes as constant is constant in these
        torch.onnx.export(
            module.eval(), tuple(tensor for tensor, _ in inputs.values()), str(folder / "model.onnx"),
            input_names=list(inputs), output_names=list(outputs), dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    return folder / "model.onnx"


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a configuration."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(value), default=str))


class _Decoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class _Encoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(sample).latent_dist.parameters
