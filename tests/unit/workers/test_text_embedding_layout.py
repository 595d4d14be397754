"""What a text embedding model's folder says, and what is wrong with one that cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from device_operations.errors import OperationError
from tests.support import embedding
from workers.pipelines.text.layout import Layout, Pooling, read_layout

TYPE = "sentence_transformers.models."


def modules(*names: str, paths: tuple[str, ...] = ("", "1_Pooling", "2_Normalize", "3_More")) -> list[dict[str, Any]]:
    return [{"idx": at, "name": str(at), "path": paths[at], "type": TYPE + name} for at, name in enumerate(names)]


def test_the_whole_layout_is_read(tmp_path: Path) -> None:
    found = read_layout(embedding.write(tmp_path))
    assert found == Layout(
        graph=tmp_path / "model.onnx", tokenizer=tmp_path / "tokenizer.json", max_tokens=12, pooling=Pooling.MEAN,
        normalize=True, hidden_size=embedding.WIDTH, vocabulary=len(embedding.WORDS), pad_token="[PAD]",
    )  # fmt: skip


def test_a_tokenizer_and_a_graph_are_enough(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(embedding.tokenizer())
    (tmp_path / "any.onnx").write_bytes(embedding.graph())
    found = read_layout(tmp_path)
    assert (found.pooling, found.normalize, found.max_tokens) == (Pooling.MEAN, False, 512)
    assert found.graph == tmp_path / "any.onnx"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True}, Pooling.CLS),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
        ({"pooling_mode": "cls", "embedding_dimension": 4}, Pooling.CLS),
        ({"pooling_mode": ["mean"], "embedding_dimension": 4}, Pooling.MEAN),
        ({"word_embedding_dimension": 4}, Pooling.MEAN),
    ],
)
def test_both_forms_of_pooling_configurations_are_read(
    tmp_path: Path, config: dict[str, Any], expected: Pooling
) -> None:
    assert read_layout(embedding.write(tmp_path, {"1_Pooling/config.json": config})).pooling is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sentence_bert_config.json": None}, 32),
        ({"sentence_bert_config.json": None, "config.json": None}, 64),
        ({"sentence_bert_config.json": None, "config.json": None, "tokenizer_config.json": None}, 512),
        (
            {
                "sentence_bert_config.json": None,
                "config.json": None,
                "tokenizer_config.json": {"model_max_length": 1e30},
            },
            512,
        ),
        ({"sentence_bert_config.json": {"max_seq_length": 1000}}, 32),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, 32),
        (
            {
                "sentence_bert_config.json": None,
                "config.json": {"model_type": "xlm-roberta", "max_position_embeddings": 34, "pad_token_id": 1},
            },
            32,
        ),
    ],
)
def test_the_limit_of_tokens_is_the_smallest_that_the_files_name(
    tmp_path: Path, changes: dict[str, Any], expected: int
) -> None:
    assert read_layout(embedding.write(tmp_path, changes)).max_tokens == expected


def test_older_folders_hold_the_transformer_in_one_of_its_own(tmp_path: Path) -> None:
    inner = {path: content for path, content in embedding.files().items() if "/" not in path and path != "modules.json"}
    changes: dict[str, Any] = {f"0_Transformer/{path}": content for path, content in inner.items()}
    changes |= dict.fromkeys(inner)
    changes["modules.json"] = modules("Transformer", "Pooling", paths=("0_Transformer", "1_Pooling"))
    found = read_layout(embedding.write(tmp_path, changes))
    assert found.graph == tmp_path / "0_Transformer" / "model.onnx"
    assert (found.max_tokens, found.normalize, found.hidden_size) == (12, False, embedding.WIDTH)


def test_exports_lie_in_a_folder_named_onnx(tmp_path: Path) -> None:
    changes = {"model.onnx": None, "onnx/model.onnx": embedding.graph(), "onnx/model_O2.onnx": embedding.graph()}
    assert read_layout(embedding.write(tmp_path, changes)).graph == tmp_path / "onnx" / "model.onnx"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.json": None}, "no tokenizer.json"),
        ({"model.onnx": None}, "there are 0"),
        ({"model.onnx": None, "a.onnx": b"", "b.onnx": b""}, "there are 2"),
        ({"modules.json": b"{"}, "modules.json is not JSON"),
        ({"modules.json": {}}, "modules.json is not a list"),
        ({"modules.json": [1]}, "modules.json is not a list"),
        ({"modules.json": [{"type": 1, "path": ""}]}, "modules.json is not a list"),
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "Transformer, Pooling, Dense"),
        ({"modules.json": modules("WordEmbeddings", "Pooling")}, "WordEmbeddings, Pooling"),
        ({"modules.json": []}, "known are Transformer"),
        ({"modules.json": modules("Transformer", "Pooling", paths=("", "../1_Pooling"))}, "does not lie in"),
        ({"modules.json": modules("Transformer", "Pooling", paths=("/etc", "1_Pooling"))}, "does not lie in"),
        ({"modules.json": modules("Transformer", "Pooling", paths=("", "n" * 5000))}, "does not lie in"),
        ({"1_Pooling/config.json": None}, "no 1_Pooling/config.json"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "max"),
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, "cls and mean"),
        ({"1_Pooling/config.json": {"pooling_mode": "lasttoken"}}, "lasttoken"),
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": "yes"}}, "neither true nor false"),
        ({"1_Pooling/config.json": {"word_embedding_dimension": 8}}, "hidden_size 4"),
        ({"config.json": {"hidden_size": "4"}}, "hidden_size is '4'"),
        ({"config.json": {"hidden_size": 0}}, "hidden_size is '0'"),
        ({"config.json": [4]}, "config.json is not a JSON object"),
        ({"config.json": {"max_position_embeddings": 1, "model_type": "roberta", "pad_token_id": 1}}, "no room"),
        ({"config.json": {"matryoshka_dimensions": ["a"]}}, "matryoshka_dimensions"),
        ({"sentence_bert_config.json": {"max_seq_length": -1}}, "max_seq_length is '-1'"),
        ({"sentence_bert_config.json": {"max_seq_length": True}}, "max_seq_length is 'True'"),
        ({"config.json": b" " * (5 << 20)}, "more than"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "query", "prompts": {}}}, "no prompt 'query'"),
        (
            {
                "config_sentence_transformers.json": {"default_prompt_name": "q", "prompts": {"q": "query: "}},
                "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False},
            },
            "include_prompt",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OperationError) as refused:
        read_layout(embedding.write(tmp_path, changes))
    assert refused.value.code == "model_invalid"
    assert words in refused.value.message


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = embedding.write(tmp_path / "model", {"config.json": None})
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(OperationError, match="does not lie in"):
        read_layout(folder)
