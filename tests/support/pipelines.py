"""Tiny pipelines with random weights, made with diffusers' and transformers' classes and exported as Optimum does.

    tiny_vae(seed)                     diffusers' AutoencoderKL
    export_vae(vae, folder)            vae_decoder/, vae_encoder/: model.onnx and config.json each
    tokenizer_files(folder)            CLIP's tokenizer, trained on a few sentences
    tiny_sdxl(seed)                    UNet, text encoders and VAE of diffusers and transformers
    export_sdxl(modules, folder, …)    the whole layout
    reference(modules, folder, …)      diffusers' own pipeline over the same

Making and exporting one takes a second or two: fixtures of a whole session keep them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
    latents = torch.randn(1, vae.config.latent_channels, 8, 8, dtype=vae.dtype, device=vae.device)
    export(_Decoder(vae), folder / "vae_decoder", {"latent_sample": (latents, _IMAGE)}, {"sample": _IMAGE})
    write_json(folder / "vae_decoder" / "config.json", vae.config)
    if encoder:
        image = torch.randn(1, 3, 16, 16, dtype=vae.dtype, device=vae.device)
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


def tokenizer_files(folder: Path, pad: str = "<|endoftext|>", *, fast: bool = False) -> Path:
    """A CLIP tokenizer trained on a few sentences: vocab.json and merges.txt, or tokenizer.json if `fast`."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=900, end_of_word_suffix="</w>", special_tokens=["!", "<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    whole = json.loads(trained.to_str())
    if fast:
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    else:
        vocabulary = whole["model"]["vocab"]
        # Every single character ends a word too, as in CLIP's own vocabulary.
        for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
            for token in (letter, f"{letter}</w>"):
                vocabulary.setdefault(token, len(vocabulary))
        write_json(folder / "vocab.json", vocabulary)
        merges = "\n".join(" ".join(pair) for pair in whole["model"]["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    )
    return folder


def tiny_sdxl(seed: int = 0, *, width: int = 32, guidance_embedding: int | None = None) -> dict[str, Any]:
    """The modules of a small SDXL by the names that diffusers gives them; `width` is the UNet's narrowest block."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(width, 2 * width), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64, norm_num_groups=8, time_cond_proj_dim=guidance_embedding,
    )  # fmt: skip
    text = {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 32, "intermediate_size": 37,
        "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 1300, "hidden_act": "gelu",
        "projection_dim": 32, "max_position_embeddings": 77,
    }  # fmt: skip
    return {
        "unet": unet.eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval(),
        "vae": tiny_vae(seed),
    }


def export_sdxl(modules: Mapping[str, Any], folder: Path, scheduler: Any, *, encoder: bool = True) -> Path:
    """Writes a pipeline below `folder` in the layout that diffusers and Optimum export."""
    export_text_encoders(modules, folder)
    export_unet(modules["unet"], folder / "unet")
    export_vae(modules["vae"], folder, encoder=encoder)
    return write_rest(folder, scheduler)


def export_text_encoders(modules: Mapping[str, Any], folder: Path) -> None:
    """Writes both text encoders and their configurations."""
    text = {0: "batch_size", 1: "sequence_length"}
    for name in ("text_encoder", "text_encoder_2"):
        ids = torch.ones(1, 77, dtype=torch.int64, device=modules[name].device)
        layers = modules[name].config.num_hidden_layers
        first = {"text_embeds": {0: "batch_size"}} if name.endswith("2") else {"last_hidden_state": text}
        hidden = {f"hidden_states.{number}": text for number in range(layers + 1)}
        kind = torch.int64 if name.endswith("2") else torch.int32  # as Optimum has it
        wrapped = _TextEncoder(modules[name], pooled=name.endswith("2"))
        export(wrapped, folder / name, {"input_ids": (ids.to(kind), text)}, {**first, **hidden})
        write_json(folder / name / "config.json", modules[name].config.to_dict())


def write_rest(folder: Path, scheduler: Any) -> Path:
    """Writes what is no graph: tokenizers, the scheduler's configuration, the index."""
    tokenizer_files(folder / "tokenizer")
    tokenizer_files(folder / "tokenizer_2", pad="!")
    scheduler.save_pretrained(folder / "scheduler")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
    )
    return folder


def export_unet(unet: Any, folder: Path) -> Path:
    """Writes a UNet and its configuration."""
    kind, config = {"dtype": unet.dtype, "device": unet.device}, unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "sample": (torch.randn(2, 4, 16, 16, **kind), _IMAGE),
        "timestep": (torch.tensor(10, dtype=torch.int64, device=unet.device), {}),
        "encoder_hidden_states": (
            torch.randn(2, 77, config.cross_attention_dim, **kind),
            {0: "batch_size", 1: "sequence_length"},
        ),
        "text_embeds": (torch.randn(2, pooled, **kind), {0: "batch_size"}),
        "time_ids": (torch.randn(2, 6, **kind), {0: "batch_size"}),
    }
    if unet.config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = (torch.randn(2, config.time_cond_proj_dim, **kind), {0: "batch_size"})
    export(_Unet(unet), folder, inputs, {"out_sample": _IMAGE})
    write_json(folder / "config.json", unet.config)
    return folder


def reference(
    modules: Mapping[str, Any], folder: Path, scheduler: Any, kind: type[Any] = StableDiffusionXLPipeline
) -> Any:
    """diffusers' own pipeline over the same modules and tokenizers."""
    made = kind(
        vae=modules["vae"], text_encoder=modules["text_encoder"], text_encoder_2=modules["text_encoder_2"],
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=modules["unet"], scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


#: What the tokenizers are trained on.
SENTENCES = [
    "a photo of a cat on a windowsill", "an astronaut riding a green horse", "oil painting of a lighthouse in a storm",
    "a small house in the mountains, golden hour, highly detailed", "blurry, low quality, watermark",
    "the quick brown fox jumps over the lazy dog", "portrait of an old fisherman, black and white",
    "a bowl of fruit on a wooden table, still life", "it's a city at night, we're on the roof",
]  # fmt: skip


class _TextEncoder(torch.nn.Module):
    def __init__(self, encoder: Any, *, pooled: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = pooled

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.encoder(input_ids.long(), output_hidden_states=True)
        first = made.text_embeds if self.pooled else made.last_hidden_state
        return (first, *made.hidden_states)


class _Unet(torch.nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        text_embeds: Any,
        time_ids: Any,
        timestep_cond: Any = None,
    ) -> torch.Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
