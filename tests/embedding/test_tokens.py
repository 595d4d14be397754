"""Texts as tokens: as the tokenizer's file has them, cut at the model's limit, or given as ids."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.support import embedding
from workers.pipelines.text.layout import read_layout
from workers.pipelines.text.tokens import Tokens


def tokens(folder: Path, changes: dict[str, Any] | None = None) -> Tokens:
    return Tokens(read_layout(embedding.write(folder, changes)))


def words(*texts: str) -> list[int]:
    return [embedding.WORDS.index(text) for text in texts]


def test_settings_saved_with_the_tokenizer_do_not_count(tmp_path: Path) -> None:
    (made,) = tokens(tmp_path).encode(["a b c d e f"])
    assert made.ids.tolist() == words("[CLS]", *"abcdef", "[SEP]")
    assert not made.truncated


def test_a_text_over_the_limit_is_cut_and_said_to_be(tmp_path: Path) -> None:
    fits, cut = tokens(tmp_path).encode([" ".join("abcdefghij"), " ".join("abcdefghijk")])
    assert fits.ids.tolist() == cut.ids.tolist() == words("[CLS]", *"abcdefghij", "[SEP]")
    assert (fits.truncated, cut.truncated) == (False, True)


def test_ids_are_completed_by_the_special_tokens_unless_they_have_them(tmp_path: Path) -> None:
    ids = words("hello", "world")
    whole = words("[CLS]", "hello", "world", "[SEP]")
    plain, complete, long = tokens(tmp_path).encode([ids, whole, words(*"abcdefghijk")])
    assert plain.ids.tolist() == complete.ids.tolist() == whole
    assert long.ids.tolist() == words("[CLS]", *"abcdefghij", "[SEP]")
    assert (plain.truncated, long.truncated) == (False, True)


@pytest.mark.parametrize("bad", [-1, len(embedding.WORDS), 2**31, -(2**63), 2**64 - 1])
def test_ids_that_are_no_tokens_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(OperationError, match="text 6 has tokens") as refused:
        tokens(tmp_path).encode(["a", [4, bad]], first=5)
    assert refused.value.code == "input_mismatch"


def test_prompt_and_lower_case_are_the_folders(tmp_path: Path) -> None:
    prompts = {"default_prompt_name": "q", "prompts": {"q": "hello "}}
    bare = json.loads(embedding.tokenizer()) | {"normalizer": None}
    changes = {
        "config_sentence_transformers.json": prompts,
        "tokenizer.json": bare,
        "sentence_bert_config.json": {"do_lower_case": True},
    }
    (made,) = tokens(tmp_path, changes).encode(["WORLD"])
    assert made.ids.tolist() == words("[CLS]", "hello", "world", "[SEP]")


@pytest.mark.serial
def test_a_text_of_megabytes_costs_no_more_than_its_beginning(tmp_path: Path) -> None:
    tokenizer = tokens(tmp_path)
    small, large, blank = tokenizer.encode(["a " * 500, "a " * 10_000_000, " " * 200_000 + "a b"])
    assert large.ids.tolist() == small.ids.tolist()
    assert large.truncated
    assert blank.ids.tolist() == words("[CLS]", "a", "b", "[SEP]"), "what lies behind a long run of spaces is lost"
    began = time.perf_counter()
    tokenizer.encode(["a " * 10_000_000])
    assert time.perf_counter() - began < 2


def test_empty_texts_are_the_special_tokens_alone_and_none_at_all_is_refused(tmp_path: Path) -> None:
    assert tokens(tmp_path / "with").encode([""])[0].ids.tolist() == words("[CLS]", "[SEP]")
    bare = json.loads(embedding.tokenizer()) | {"post_processor": None}
    tokenizer = tokens(tmp_path / "without", {"tokenizer.json": bare})
    assert tokenizer.encode([" a "])[0].ids.tolist() == words("a")
    with pytest.raises(OperationError, match="text 1 gives no tokens"):
        tokenizer.encode(["a", ""])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no tokenizer"),
        (b"{}", "no tokenizer"),
        (b"not json", "no tokenizer"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}', "no tok"),
        (b"[" * 100_000, "no tokenizer"),
        ({"model": {"type": "Unknown"}}, "no tokenizer"),
        (embedding.graph(), "cannot be read"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(OperationError, match=expected) as refused:
        tokens(tmp_path, {"tokenizer.json": content})
    assert refused.value.code == "model_invalid"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config.json": {"vocab_size": 10}}, "vocab_size 10"),
        ({"sentence_bert_config.json": {"max_seq_length": 2}}, "leave no room"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(OperationError, match=expected) as refused:
        tokens(tmp_path, changes)
    assert refused.value.code == "model_invalid"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokenizer_config.json": {"pad_token": "[UNK]"}}, 1),
        ({"tokenizer_config.json": {"pad_token": {"content": "[SEP]"}}}, 3),
        ({"tokenizer_config.json": None, "config.json": {"pad_token_id": 2}}, 2),
        ({"tokenizer_config.json": None, "config.json": {"pad_token_id": 10**6}}, 0),
        ({"tokenizer_config.json": None}, 0),
    ],
)
def test_short_rows_are_filled_up_with_the_models_own_padding(
    tmp_path: Path, changes: dict[str, Any], expected: int
) -> None:
    assert tokens(tmp_path, changes).pad_id == expected


def test_minilm_has_the_tokens_that_transformers_makes(minilm: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["", "Hello, World!", "naïve café — 日本語 🙂", "[MASK] and [SEP]", "unbelievably " * 300, "a" * 500]
    theirs = AutoTokenizer.from_pretrained(str(minilm))(texts, truncation=True, max_length=256)
    ours = Tokens(read_layout(minilm)).encode(texts)
    assert [made.ids.tolist() for made in ours] == theirs["input_ids"]
    assert all(np.all(made.types == 0) for made in ours)
    assert [made.truncated for made in ours] == [False, False, False, False, True, False]
