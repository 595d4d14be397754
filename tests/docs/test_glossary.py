"""docs/glossary.md explains words that the code uses, each once, in alphabetical order."""

from __future__ import annotations

import re

import pytest

from tests.support.stack import REPOSITORY

TEXT = (REPOSITORY / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w ]+)` \| (.+?) \| `([\w/.]+)` \|$", TEXT, re.MULTILINE)
PACKAGES = ("api_gateway", "device_operations", "tasks", "workers")
CODE = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8").lower()
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
}


def test_each_word_stands_once_in_order() -> None:
    words = [word for word, _, _ in ROWS]
    assert len(words) == len([line for line in TEXT.splitlines() if line.startswith("| `")])
    assert words == sorted(set(words))
    assert len(words) > 30


@pytest.mark.parametrize(("word", "where"), [(word, where) for word, _, where in ROWS])
def test_a_word_of_the_glossary_is_in_the_file_that_it_names(word: str, where: str) -> None:
    assert where in CODE, f"{where} is not there"
    assert re.search(rf"(?<![a-z]){word}", CODE[where]), f"{where} does not say {word!r} any more"


@pytest.mark.parametrize(("word", "sentence"), [(word, sentence) for word, sentence, _ in ROWS])
def test_a_word_is_explained_in_one_sentence_that_does_not_use_it(word: str, sentence: str) -> None:
    assert ". " not in sentence
    assert not sentence.endswith(".")
    assert word not in re.findall(r"\w+", sentence)
