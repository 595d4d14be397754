"""The parts of Stable Diffusion XL: whether they fit each other, and how its text encoders are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from device_operations.errors import failure
from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel
from workers.pipelines.base import Parts
from workers.pipelines.diffusion.autoencoder import DECODER
from workers.pipelines.diffusion.denoising import Unet
from workers.pipelines.diffusion.prompts import PromptTokenizer, PromptTokens

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

#: What the UNet takes besides the latents.
_CONDITIONS = ("encoder_hidden_states", "text_embeds", "time_ids")
_HIDDEN = "hidden_states."


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the configurations say of sizes.

    `sample_side` is the side of the latents that the model was trained on, `unet_step` what a side of the latents is a
    multiple of. `guidance_embedding` is the length of the guidance that a distilled UNet takes, None if it takes none.
    """

    channels: int
    sample_side: int
    unet_step: int
    guidance_embedding: int | None
    zeros_for_empty_prompt: bool


def check_fit(
    parts: Parts, configs: Mapping[str, Mapping[str, Any]], tokenizers: Mapping[str, PromptTokenizer],
    index: Mapping[str, Any],
) -> Sizes:  # fmt: skip
    """The sizes, where the parts fit each other by what their graphs and configurations say; else `model_invalid`."""
    config = configs[UNET]
    unet = parts[UNET]
    missing = [name for name in _CONDITIONS if name not in unet.inputs]
    if missing:
        raise failure("model_invalid", f"unet has no input {', '.join(missing)}: it is not one of SDXL")
    sample = unet.input("sample").shape
    predicted = unet.output("out_sample", "sample", "noise_pred").shape
    channels = _size(sample, 1, config.get("in_channels"), 4)
    if len(predicted) == 4 and isinstance(predicted[1], int) and predicted[1] != channels:
        raise failure("model_invalid", f"unet takes {channels} channels and gives {predicted[1]}: it is no SDXL base")
    _equal("unet takes latents of", channels, "vae_decoder of", _known(parts[DECODER].inputs, 1), "channels")
    widths = [_hidden_size(parts, name, configs[name]) for name in TEXT_ENCODERS]
    wanted = _known_side(unet.input("encoder_hidden_states").shape, 2) or _whole(config.get("cross_attention_dim"))
    if None not in widths and wanted is not None and sum(width or 0 for width in widths) != wanted:
        raise failure(
            "model_invalid",
            f"the text encoders give {widths[0]} + {widths[1]} hidden values a token, and unet takes {wanted}",
        )
    pooled = parts["text_encoder_2"].output("text_embeds").shape
    _equal(
        "text_encoder_2 gives text_embeds of", _known_side(pooled, 1), "unet takes",
        _known_side(unet.input("text_embeds").shape, 1), "values",
    )  # fmt: skip
    _check_projection(config, _known_side(pooled, 1) or _whole(configs["text_encoder_2"].get("projection_dim")))
    lengths = {name: tokenizer.length for name, tokenizer in tokenizers.items()}
    if len(set(lengths.values())) > 1:
        raise failure("model_invalid", f"the tokenizers make prompts of unequal lengths: {lengths}")
    for name, tokenizer in tokenizers.items():
        vocabulary = _whole(configs[name].get("vocab_size"))
        if vocabulary is not None and tokenizer.vocabulary > vocabulary:
            raise failure(
                "model_invalid",
                f"{tokenizer.name} has {tokenizer.vocabulary} tokens, and {name} knows {vocabulary}",
            )
    blocks = config.get("block_out_channels")
    side = config.get("sample_size")
    embedding = unet.inputs.get("timestep_cond")
    return Sizes(
        channels=channels,
        sample_side=side if isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 512 else 128,
        unet_step=2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 8 else 1,
        guidance_embedding=None
        if embedding is None
        else _size(embedding.shape, 1, config.get("time_cond_proj_dim"), 256),
        zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True) is not False,
    )


def unet_of(parts: Parts, sizes: Sizes) -> Unet:
    """The UNet as the loop takes it."""
    unet = parts[UNET]
    known = {"sample", "timestep", "timestep_cond", *_CONDITIONS}
    unknown = sorted(unet.inputs.keys() - known)
    if unknown:
        raise failure("model_invalid", f"unet has inputs that are not given here: {', '.join(unknown)}")
    return Unet(UNET, unet.input("sample"), unet.input("timestep"), unet.output("out_sample", "sample", "noise_pred"))


class TextEncoder:
    """A text encoder with its tokenizer."""

    def __init__(self, parts: Parts, name: str, tokenizer: PromptTokenizer) -> None:
        """Raises `model_invalid` where the graph does not give its hidden states."""
        self.name = name
        self.tokenizer = tokenizer
        self._parts = parts
        part = parts[name]
        self._ids = part.input("input_ids")
        unknown = sorted(part.inputs.keys() - {"input_ids", "attention_mask"})
        if unknown:
            raise failure("model_invalid", f"{name} has inputs that are not given here: {', '.join(unknown)}")
        self._hidden = _hidden_output(parts, name)
        self._pooled = "text_embeds" if "text_embeds" in part.outputs else None

    def run(self, tokens: PromptTokens, cancel: Cancel) -> tuple[Array, Array | None]:
        """The hidden states of the layer before the last, `[1, length, width]`, and the pooled ones, if it has any."""
        feeds = {"input_ids": np.array([tokens.ids], numpy_dtype(self._ids.dtype))}
        mask = self._parts[self.name].inputs.get("attention_mask")
        if mask is not None:
            feeds["attention_mask"] = np.ones((1, len(tokens.ids)), numpy_dtype(mask.dtype))
        wanted = [self._hidden, *([self._pooled] if self._pooled else [])]
        made = self._parts.get(self.name, cancel).run(feeds, wanted, cancel=cancel)
        pooled = None if self._pooled is None else np.asarray(made[self._pooled])
        return np.asarray(made[self._hidden]), pooled


def _hidden_output(parts: Parts, name: str) -> str:
    """The output of the layer before the last: the last but one of the numbered hidden states."""
    numbered = [output for output in parts[name].outputs if output.startswith(_HIDDEN)]
    numbered = sorted(
        (one for one in numbered if one[len(_HIDDEN) :].isdigit()), key=lambda one: int(one[len(_HIDDEN) :])
    )
    if len(numbered) < 2:
        raise failure(
            "model_invalid",
            f"{name} gives {', '.join(sorted(parts[name].outputs))}: it was exported without its hidden states "
            "(output_hidden_states=True)",
        )
    return numbered[-2]


def _hidden_size(parts: Parts, name: str, config: Mapping[str, Any]) -> int | None:
    in_graph = _known_side(parts[name].outputs[_hidden_output(parts, name)].shape, 2)
    said = _whole(config.get("hidden_size"))
    _equal(f"{name}/config.json says hidden_size", said, f"{name} gives", in_graph, "values")
    return in_graph or said


def _check_projection(config: Mapping[str, Any], pooled: int | None) -> None:
    whole = _whole(config.get("projection_class_embeddings_input_dim"))
    each = _whole(config.get("addition_time_embed_dim"))
    if None in (whole, each, pooled):
        return
    assert whole is not None
    assert each is not None
    assert pooled is not None
    if pooled + 6 * each != whole:
        raise failure(
            "model_invalid",
            f"unet takes {whole} values of text and sizes together, and gets {pooled} of text_encoder_2 + 6 x {each}",
        )


def _equal(first: str, one: int | None, second: str, other: int | None, what: str) -> None:
    if one is not None and other is not None and one != other:
        raise failure("model_invalid", f"{first} {one} {what}, and {second} {other}")


def _known(specs: Mapping[str, Any], axis: int) -> int | None:
    return _known_side(next(iter(specs.values())).shape, axis)


def _known_side(shape: tuple[int | str | None, ...], axis: int) -> int | None:
    side = shape[axis] if len(shape) > axis else None
    return side if isinstance(side, int) else None


def _size(shape: tuple[int | str | None, ...], axis: int, said: object, default: int) -> int:
    return _known_side(shape, axis) or _whole(said) or default


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
