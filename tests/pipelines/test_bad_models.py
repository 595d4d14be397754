"""Folders that are no pipeline: each is refused when it is read, before anything is loaded, and says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from device_operations.errors import OperationError
from tests.support.pipelines import export_vae, tiny_vae
from workers import pipelines


def _edit(place: str, **changes: Any) -> Callable[[Path], None]:
    """Changes entries of a JSON file."""

    def change(folder: Path) -> None:
        file = folder / place
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _write(place: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(content)

    return change


def _without(place: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        there = folder / place
        shutil.rmtree(there) if there.is_dir() else there.unlink()

    return change


def _graph(place: str, change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        model = onnx.load(folder / place)
        change(model)
        onnx.save(model, folder / place)

    return changed


def _side(name: str, axis: int, size: int) -> Callable[[onnx.ModelProto], None]:
    """Says another size of one side of an input or output."""

    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name == name:
                value.type.tensor_type.shape.dim[axis].dim_value = size

    return change


def _retype(model: onnx.ModelProto, kind: int) -> None:
    model.graph.input[0].type.tensor_type.elem_type = kind


def _outputs(wanted: Callable[[str], bool]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        kept = [value for value in model.graph.output if wanted(value.name)]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    return change


def _external(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def _link(place: str, to: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / place).unlink()
        (folder / place).symlink_to(to)

    return change


SDXL = {
    "no unet": (_without("unet"), "missing: unet"),
    "no text encoder": (_without("text_encoder_2/model.onnx"), "missing: text_encoder_2"),
    "no tokenizer": (_without("tokenizer_2"), "missing: tokenizer_2"),
    "no scheduler": (_without("scheduler/scheduler_config.json"), "missing: scheduler/scheduler_config.json"),
    "no vocabulary": (_without("tokenizer/vocab.json"), "neither tokenizer.json nor vocab.json"),
    "other text encoder": (_graph("text_encoder/model.onnx", _side("hidden_states.2", 2, 48)), "hidden_size 32"),
    "unet for wider text": (_graph("unet/model.onnx", _side("encoder_hidden_states", 2, 96)), "give 32 \\+ 32 hidden values"),
    "unet for wider pools": (_graph("unet/model.onnx", _side("text_embeds", 1, 48)), "text_embeds of 32 values"),
    "unet of other sizes": (_edit("unet/config.json", projection_class_embeddings_input_dim=100), "takes 100 values of text"),
    "unet of more channels": (_graph("unet/model.onnx", _side("sample", 1, 9)), "9 channels"),
    "vae of more channels": (_graph("vae_decoder/model.onnx", _side("latent_sample", 1, 16)), "16"),
    "no hidden states": (
        _graph("text_encoder/model.onnx", _outputs(lambda name: "hidden_states." not in name)), "without its hidden states",
    ),
    "unknown scheduler": (_edit("scheduler/scheduler_config.json", _class_name="KarrasVeScheduler"), "KarrasVeScheduler"),
    "a class of the system": (_edit("scheduler/scheduler_config.json", _class_name=["os", "system"]), "there are"),
    "endless training": (_edit("scheduler/scheduler_config.json", num_train_timesteps=10**9), "num_train_timesteps"),
    "no such schedule": (_edit("scheduler/scheduler_config.json", beta_schedule="none"), "makes no scheduler"),
    "betas without end": (_edit("scheduler/scheduler_config.json", beta_start=1e30, beta_end=1e38), "not finite"),
    "betas of text": (_edit("scheduler/scheduler_config.json", beta_start="x"), "makes no scheduler"),
    "tokenizer of noise": (_write("tokenizer/tokenizer.json", b"\x89PNG\x00 noise"), "tokenizer.json is not JSON"),
    "tokenizer of other JSON": (_write("tokenizer/tokenizer.json", b'{"model": {"type": "Nothing"}}'), "no tokenizer that can be used"),
    "vocabulary of lists": (_write("tokenizer/vocab.json", b'{"a": []}'), "no tokenizer that can be used"),
    "merges of noise": (_write("tokenizer/merges.txt", b"\xff\xfe\x00"), "no tokenizer that can be used"),
    "merges of unknown words": (_write("tokenizer/merges.txt", b"zz qq\n"), "no tokenizer that can be used"),
    "more tokens than known": (_edit("text_encoder/config.json", vocab_size=100), "knows 100"),
    "unequal lengths": (_edit("tokenizer/tokenizer_config.json", model_max_length=64), "unequal lengths"),
    "a length of text": (_edit("tokenizer/tokenizer_config.json", model_max_length="long"), "model_max_length"),
    "a config of lists": (_write("unet/config.json", b"[]"), "not a JSON object"),
    "a config without end": (_write("unet/config.json", b" " * (2 << 20)), "bytes; "),
    "a file outside": (_edit("tokenizer/tokenizer_config.json", vocab_file="../../vocab.json"), "outside the folder"),
    "an absolute file": (_edit("text_encoder/config.json", weights_file="/etc/passwd"), "outside the folder"),
    "a part outside": (_edit("model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]}), "outside the folder"),
    "a link outside": (_link("unet/config.json", "/etc/hostname"), "leads out of the model's folder"),
    "a graph outside": (_link("unet/model.onnx", "/proc/self/exe"), "leads out of the model's folder"),
    "weights outside": (_graph("unet/model.onnx", _external("../../weights")), "unet: .*not a file inside"),
    "weights that are missing": (_graph("vae_decoder/model.onnx", _external("weights.bin")), "vae_decoder: .*not a file inside"),
    "a part of bfloat16": (_graph("unet/model.onnx", lambda model: _retype(model, onnx.TensorProto.BFLOAT16)), "is bfloat16"),
    "a part of text": (_graph("unet/model.onnx", lambda model: _retype(model, onnx.TensorProto.STRING)), "is string"),
    "a graph of noise": (_write("vae_encoder/model.onnx", b"\x08\x07noise"), "vae_encoder"),
    "an empty graph": (_write("unet/model.onnx", b""), "empty"),
    "scaling of text": (_edit("vae_decoder/config.json", scaling_factor="0.1"), "scaling_factor"),
    "scaling of 0": (_edit("vae_decoder/config.json", scaling_factor=0), "scaling_factor"),
    "means of other channels": (_edit("vae_decoder/config.json", latents_mean=[0.0], latents_std=[1.0]), "latents_mean has 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SDXL)
def test_a_folder_that_is_no_sdxl_is_refused_when_it_is_read(name: str, sdxl_folder: Path, tmp_path: Path) -> None:
    change, says = SDXL[name]
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    pipelines.read("sdxl", folder, folder, {})
    change(folder)
    with pytest.raises(OperationError, match=says) as raised:
        pipelines.read("sdxl", folder, folder, {})
    assert raised.value.code == "model_invalid"


def test_options_that_no_part_has_are_refused(sdxl_folder: Path) -> None:
    with pytest.raises(OperationError, match="no part has a free dimension nothing"):
        pipelines.read("sdxl", sdxl_folder, sdxl_folder, {"free_dimensions": {"nothing": 1}})
    pipelines.read("sdxl", sdxl_folder, sdxl_folder, {"free_dimensions": {"sequence_length": 77}})


def test_a_single_file_is_no_sdxl(sdxl_folder: Path) -> None:
    with pytest.raises(OperationError, match="a folder of parts"):
        pipelines.read("sdxl", sdxl_folder / "unet" / "model.onnx", sdxl_folder / "unet", {})


VAE = {
    "nothing": (_without("vae_decoder"), "neither is there"),
    "two graphs": (
        lambda folder: shutil.move(
            shutil.copy(folder / "vae_decoder" / "model.onnx", folder / "vae_decoder" / "a.onnx"),
            folder / "vae_decoder" / "b.onnx",
        )
        and shutil.move(folder / "vae_decoder" / "model.onnx", folder / "vae_decoder" / "c.onnx"),
        "has 2 graphs",
    ),
    "a decoder of three sides": (_graph("vae_decoder/model.onnx", lambda model: model.graph.input[0].type.tensor_type.shape.dim.pop()), "has 3 sides"),
    "blocks of text": (_edit("vae_decoder/config.json", block_out_channels="8"), "block_out_channels"),
    "other channels": (_edit("vae_decoder/config.json", latent_channels=16), "latent_channels is 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", VAE)
def test_a_folder_that_is_no_vae_is_refused_when_it_is_read(name: str, tmp_path: Path) -> None:
    change, says = VAE[name]
    folder = export_vae(tiny_vae(), tmp_path / "vae", encoder=False)
    change(folder)
    with pytest.raises(OperationError, match=says) as raised:
        pipelines.read("vae", folder, folder, {})
    assert raised.value.code == "model_invalid"


ODD = [None, [], {}, "x", "", -1, 0, 1e308, True, 10**18, ["x"], [None], {"content": 1}]
CONFIGS = [
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json",
    "text_encoder_2/config.json", "vae_decoder/config.json", "tokenizer/tokenizer_config.json",
    "tokenizer_2/special_tokens_map.json",
]  # fmt: skip


def test_whatever_a_config_holds_it_is_read_or_refused(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    chance = random.Random(16)
    entries = [(place, key) for place in CONFIGS for key in json.loads((folder / place).read_text())]
    codes = []
    for place, key in chance.sample(entries, 60):
        whole = (folder / place).read_text()
        _edit(place, **{key: chance.choice(ODD)})(folder)
        try:
            pipelines.read("sdxl", folder, folder, {})
        except OperationError as error:
            codes.append(error.code)
        (folder / place).write_text(whole)
    assert len(codes) > 5
    assert set(codes) == {"model_invalid"}


def test_libraries_that_do_not_go_together_are_said(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apart.py").write_text("import types\ntypes.ModuleType('torch').accelerator\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(pipelines.PIPELINES, "sdxl", "apart:SdxlPipeline")
    with pytest.raises(OperationError, match=r"do not go together.*accelerator") as raised:
        pipelines.read("sdxl", sdxl_folder, sdxl_folder, {})
    assert raised.value.code == "model_invalid"
