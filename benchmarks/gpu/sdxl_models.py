"""Stable Diffusion XL in its full size with random weights, and a tiny one, made and exported part by part.

    python -m benchmarks.gpu.sdxl_models FOLDER unet|rest [--tiny]

Weights are drawn from one seed on the device that has them, so that every process makes the same ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import onnx
import torch

from tests.support import pipelines

#: The side of an image in pixels, and the steps of one.
SIDE, STEPS = 1024, 30

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UNET = {
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "sample_size": 128, "in_channels": 4,
    "out_channels": 4, "down_block_types": _BLOCKS,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 1024, "scaling_factor": 0.13025,
    "force_upcast": False,
}  # fmt: skip
# The traced export of the other attention mixes float32 into halves, and ONNX Runtime refuses the graph.
_TEXT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 49408, "max_position_embeddings": 77}
TEXT_1 = {**_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
          "hidden_act": "quick_gelu", "projection_dim": 768, "attn_implementation": "eager"}  # fmt: skip
TEXT_2 = {**_TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
          "hidden_act": "gelu", "projection_dim": 1280, "attn_implementation": "eager"}  # fmt: skip


def scheduler() -> Any:
    """SDXL's own: Euler, scaled linear betas."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def modules(*names: str, tiny: bool = False) -> dict[str, Any]:
    """The modules named, unet, vae, text_encoder, text_encoder_2: halves on the GPU, tiny ones in float32 on the CPU."""
    if tiny:
        return {name: module for name, module in pipelines.tiny_sdxl(3).items() if name in names}
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    make = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT_1)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)),
    }
    made = {}
    for number, (name, one) in enumerate(make.items()):
        if name in names:
            torch.manual_seed(number)
            with torch.device("cuda"):
                module = one()
                with torch.no_grad():  # else every norm's scale is 1 and its shift 0
                    for parameter in module.parameters():
                        if parameter.ndim == 1:
                            parameter.add_(0.1 * torch.randn_like(parameter))
            made[name] = module.to("cuda", torch.float16).eval()
    return made


def export(folder: Path, part: str, *, tiny: bool = False) -> None:
    """Exports the UNet, or all the rest."""
    if part == "unet":
        file = folder / "unet" / "model.onnx"
        pipelines.export_unet(modules("unet", tiny=tiny)["unet"], folder / "unet")
        model = onnx.load(file)
        for loose in [one for one in file.parent.iterdir() if one.name != "config.json"]:
            loose.unlink()  # torch writes a file for each tensor; Optimum leaves one
        onnx.save(model, file, save_as_external_data=True, location="model.onnx_data")
        return
    made = modules("vae", "text_encoder", "text_encoder_2", tiny=tiny)
    pipelines.export_text_encoders(made, folder)
    pipelines.export_vae(made["vae"], folder, encoder=False)
    pipelines.write_rest(folder, scheduler())


def main() -> None:
    """Exports a part, by the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["unet", "rest"])
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    began = time.perf_counter()
    export(given.folder, given.part, tiny=given.tiny)
    print(f"{given.part} made and exported in {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
