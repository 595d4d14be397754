"""Texts as token ids, by the tokenizer in a model's folder; and ids that a caller gives, checked and completed.

The library's own padding and truncation are turned off: files carry settings of the program that saved them. Texts are
cut at the model's limit, which is reported; padding is the batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from device_operations.errors import failure
from workers.pipelines.text.layout import Layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: A tokenizer file of more bytes is none; the largest in use have some tens of MiB.
MOST_TOKENIZER_BYTES = 256 << 20

#: Of a text, so many characters are tokenised first: whole texts of megabytes cost seconds, and their end is cut off.
LEAST_BEGINNING, CHARACTERS_A_TOKEN = 65_536, 64

#: A text, or the ids of its tokens.
Text = str | list[int]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One text's tokens: `ids` and `types` are int32 of one length; `truncated` where the text had more."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    types: np.ndarray[Any, np.dtype[np.int32]]
    truncated: bool


class Tokens:
    """A model's tokenizer."""

    def __init__(self, layout: Layout) -> None:
        """Reads the tokenizer's file; `model_invalid` where it is none or does not fit the model."""
        self._tokenizer = _read(layout)
        self._layout = layout
        largest = max(self._tokenizer.get_vocab().values(), default=-1)
        if largest < 0:
            raise failure("model_invalid", "tokenizer.json has no tokens")
        if layout.vocabulary is not None and largest >= layout.vocabulary:
            raise failure(
                "model_invalid",
                f"tokenizer.json has the token {largest}, and config.json says vocab_size {layout.vocabulary}",
            )
        #: Ids below this are tokens.
        self.vocabulary = layout.vocabulary or largest + 1
        self._before, self._after = self._special_ids()
        room = layout.max_tokens - len(self._before) - len(self._after)
        if room < 1:
            raise failure("model_invalid", f"{layout.max_tokens} tokens leave no room for any but the special ones")
        self._room = room
        self._tokenizer.enable_truncation(layout.max_tokens)
        #: The id that fills short rows of a batch up; attention masks leave it out.
        self.pad_id = self._pad_id()

    def encode(self, texts: Sequence[Text], first: int = 0) -> list[Tokenized]:
        """The tokens of each text, special ones included. `first` is the place of the first one in its request.

        Raises `input_mismatch` for a text that gives no tokens, and for ids that are none.
        """
        found: list[Tokenized | None] = [None if isinstance(text, str) else self._given(text) for text in texts]
        layout = self._layout
        places = [at for at, one in enumerate(found) if one is None]
        whole = [layout.prompt + str(texts[at]) for at in places]
        if layout.lower_case:
            whole = [text.lower() for text in whole]
        for at, one in zip(places, self._of_texts(whole), strict=True):
            found[at] = one
        for at, made in enumerate(found, first):
            if made is None or not len(made.ids):
                raise failure("input_mismatch", f"text {at} gives no tokens")
            if made.ids.min() < 0 or made.ids.max() >= self.vocabulary:
                raise failure(
                    "input_mismatch", f"text {at} has tokens that the model has not: ids are below {self.vocabulary}"
                )
        return [made for made in found if made is not None]

    def _of_texts(self, texts: list[str]) -> list[Tokenized]:
        """The tokens of texts. Of a long one the beginning is enough, where that alone has too many tokens."""
        longest = max(LEAST_BEGINNING, self._layout.max_tokens * CHARACTERS_A_TOKEN)
        found = self._encoded([text[:longest] for text in texts])
        short = [at for at, text in enumerate(texts) if len(text) > longest and not found[at].truncated]
        for at, one in zip(short, self._encoded([texts[at] for at in short]), strict=True):
            found[at] = one
        return found

    def _encoded(self, texts: list[str]) -> list[Tokenized]:
        return [
            Tokenized(np.array(one.ids, np.int32), np.array(one.type_ids, np.int32), bool(one.overflowing))
            for one in self._tokenizer.encode_batch(texts)
        ]

    def _given(self, ids: list[int]) -> Tokenized:
        """Ids from a caller, with the special tokens around them unless they are there."""
        before, after = self._before, self._after
        complete = len(ids) >= len(before) + len(after) > 0 and ids[: len(before)] == before
        if complete and ids[len(ids) - len(after) :] == after:
            ids = ids[len(before) : len(ids) - len(after)]
        kept = [min(max(one, -1), self.vocabulary) for one in ids[: self._room]]  # so that all are 32-bit numbers
        whole = np.array([*before, *kept, *after], np.int32)
        return Tokenized(whole, np.zeros_like(whole), len(ids) > self._room)

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """The special tokens that go before and behind a text."""
        probe = self._tokenizer.encode("a")
        special = list(probe.special_tokens_mask)
        first = special.index(0) if 0 in special else len(special)
        last = len(special) - special[::-1].index(0) if 0 in special else len(special)
        return list(probe.ids[:first]), list(probe.ids[last:])

    def _pad_id(self) -> int:
        """As the model's own files name it: some models find positions by which tokens are padding."""
        layout = self._layout
        named = self._tokenizer.token_to_id(layout.pad_token) if layout.pad_token is not None else None
        found = layout.pad_id if named is None else named
        return found if found is not None and found < self.vocabulary else 0


def _read(layout: Layout) -> Tokenizer:
    path = layout.tokenizer
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise failure(
            "model_invalid", "text embedding needs the library tokenizers: install device-operations-server[pipelines]"
        ) from error
    try:
        size = path.stat().st_size
        if size > MOST_TOKENIZER_BYTES:
            raise failure("model_invalid", f"tokenizer.json has {size} bytes; at most {MOST_TOKENIZER_BYTES} are read")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise failure("model_invalid", f"tokenizer.json cannot be read: {error}") from error
    try:
        tokenizer = Tokenizer.from_str(text)
    # The library raises plain exceptions, and panics in Rust that derive from BaseException alone.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise failure("model_invalid", f"tokenizer.json is no tokenizer: {str(error)[:300]}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
