"""Text embedding models for tests: a tiny one made on the spot, and MiniLM with its real weights.

The tiny one has a vocabulary of words and letters, and vectors of four numbers: each token's own, and with them the
mean of all tokens that its attention mask keeps, so that padding shows where a mask is not heeded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "hello", "world", "lighthouse", "dusk"]
WIDTH = 4

#: A slow graph multiplies square matrices of that side, so often.
SLOW, SLOW_TURNS = 1000, 8


def tokenizer() -> str:
    """The text of a tokenizer.json: words by white space, [CLS] before and [SEP] behind."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As in many files: settings that were saved with it, which do not count.
    made.enable_padding(length=50)
    made.enable_truncation(2)
    return str(made.to_str())


def graph(
    *,
    heeds_mask: bool = True,
    takes_mask: bool = True,
    types: bool = False,
    width: int = WIDTH,
    symbolic_width: bool = False,
    mean_over_batch: bool = False,
    slow: bool = False,
) -> bytes:
    """last_hidden_state [texts, tokens, width] of input_ids and attention_mask.

    With `mean_over_batch` rows touch each other; with `slow` they also do, and a run takes some tenths of a second.
    """
    table = np.random.default_rng(3).standard_normal((len(WORDS), width)).astype(np.float32)
    weights = "mask" if heeds_mask else "ones"
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["own"]),
        helper.make_node("Cast", ["attention_mask"], ["mask2"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask2", "two"], ["mask"]),
        helper.make_node("Mul", ["mask", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("Mul", ["own", weights], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", [weights, "axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Add", ["own", "mean"], ["hidden" if mean_over_batch or slow else "last_hidden_state"]),
    ]
    initializers = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([0.0], np.float32), "zero"),
        numpy_helper.from_array(np.array([1.0], np.float32), "one"),
        numpy_helper.from_array(np.array([2]), "two"),
        numpy_helper.from_array(np.array([1]), "axis"),
        numpy_helper.from_array(np.array([0]), "rows"),
    ]
    if mean_over_batch:
        nodes += [
            helper.make_node("ReduceMean", ["hidden", "rows"], ["over"], keepdims=1),
            helper.make_node("Add", ["hidden", "over"], ["last_hidden_state"]),
        ]
    if slow:
        initializers += [
            numpy_helper.from_array(np.full((SLOW, SLOW), 1 / SLOW, np.float32), "large"),
            numpy_helper.from_array(np.array([0, 1, 2]), "all"),
        ]
        nodes.append(helper.make_node("ReduceMean", ["hidden", "all"], ["level"], keepdims=0))
        nodes.append(helper.make_node("Mul", ["large", "level"], ["power0"]))
        for turn in range(SLOW_TURNS):
            nodes.append(helper.make_node("MatMul", [f"power{turn}", "large"], [f"power{turn + 1}"]))
        nodes += [
            helper.make_node("ReduceMean", [f"power{SLOW_TURNS}"], ["last"], keepdims=0),
            helper.make_node("Mul", ["last", "zero"], ["nothing"]),
            helper.make_node("Add", ["hidden", "nothing"], ["last_hidden_state"]),
        ]
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    if not takes_mask:  # each token counts, whichever it is
        names = ["input_ids"]
        nodes[1:2] = [
            helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["numbers", "zero"], ["no_numbers"]),
            helper.make_node("Add", ["no_numbers", "one"], ["mask2"]),
        ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in names]
    sides = ["texts", "tokens", "width" if symbolic_width else width]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, sides)
    made = helper.make_model(
        helper.make_graph(nodes, "embedding", inputs, [output], initializers),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    return bytes(made.SerializeToString())


def files(changes: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """A tiny model's files by their relative paths, with others in the place of some: None leaves one out."""
    kinds = {name: f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": kinds[name]}
        for at, (name, path) in enumerate([("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    ]
    made: dict[str, Any] = {
        "model.onnx": graph(),
        "tokenizer.json": tokenizer(),
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": False},
        "tokenizer_config.json": {"pad_token": "[PAD]", "model_max_length": 64},
        "config.json": {"hidden_size": WIDTH, "vocab_size": len(WORDS), "max_position_embeddings": 32},
    }
    made |= changes or {}
    return {path: _bytes(content) for path, content in made.items() if content is not None}


def write(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Writes a tiny model's files."""
    for path, content in files(changes).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def _bytes(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    return content.encode() if isinstance(content, str) else json.dumps(content).encode()


def export_minilm(weights: Path, folder: Path) -> Path:
    """Writes MiniLM as a text embedding model: the package's own files, and its weights as an ONNX graph in float32.

    The attention mask goes in as the sum that older exports have: rows are proven apart then.
    """
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(weights), attn_implementation="eager").eval()

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            kept = attention_mask[:, None, None, :].to(torch.float32)
            left_out = (1.0 - kept) * torch.finfo(torch.float32).min
            return self.model(
                input_ids=input_ids, attention_mask=left_out, token_type_ids=token_type_ids
            ).last_hidden_state

    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(2, 8, dtype=torch.long)
    sides = {name: {0: "texts", 1: "tokens"} for name in (*names, "last_hidden_state")}
    torch.onnx.export(
        Exported(), (ids, ids, ids * 0), str(folder / "model.onnx"), input_names=names,
        output_names=["last_hidden_state"], dynamic_axes=sides, dynamo=False, opset_version=17,
    )  # fmt: skip
    return folder
