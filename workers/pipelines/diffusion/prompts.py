"""Prompts as a text encoder takes them: CLIP's tokenizer, from `tokenizer.json` or from its vocabulary and merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from device_operations.errors import OperationError, failure
from workers.pipelines.files import MAX_TOKENIZER_BYTES, inside, read_config, read_json

T = TypeVar("T")

#: How CLIP cuts text into words before it looks at the merges.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

_UNKNOWN = "<|endoftext|>"

#: Tokens of a prompt, begin and end included, unless the configuration says otherwise.
LENGTH = 77
MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt's ids, padded to the tokenizer's length; how many tokens the text had, and how many were kept."""

    ids: list[int]
    count: int
    kept: int


class PromptTokenizer:
    """A tokenizer in one folder of a pipeline."""

    def __init__(self, folder: Path, root: Path) -> None:
        """Raises `model_invalid`, which names the folder, where there is no tokenizer, or none that can be read."""
        self.name = folder.name
        config = read_config(root, f"{folder.name}/tokenizer_config.json")
        special = {**config, **read_config(root, f"{folder.name}/special_tokens_map.json")}
        self._tokenizer = _read(folder, root)
        length = config.get("model_max_length", LENGTH)
        # Some write "no limit" as a very large number.
        whole = isinstance(length, int | float) and not isinstance(length, bool) and length >= 4
        if not whole:
            raise failure("model_invalid", f"{self.name}: model_max_length is {str(length)[:50]!r}")
        self.length = int(length) if length <= MAX_LENGTH else LENGTH
        begin, end = (
            self._text(special, "bos_token", "<|startoftext|>"),
            self._text(special, "eos_token", "<|endoftext|>"),
        )
        pad = self._text(special, "pad_token", end)
        self._begin, self._end, self._pad = self._id(begin), self._id(end), self._id(pad)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys((begin, end, pad))]
        )

    @property
    def vocabulary(self) -> int:
        """The ids are below this."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokens(self, prompt: str) -> PromptTokens:
        """The ids of a prompt; what is beyond the length is cut off."""
        ids = _guarded(self.name, lambda: self._tokenizer.encode(prompt, add_special_tokens=False)).ids
        kept = ids[: self.length - 2]
        filled = [self._begin, *kept, self._end]
        return PromptTokens(filled + [self._pad] * (self.length - len(filled)), len(ids), len(kept))

    def _text(self, special: Mapping[str, Any], name: str, default: str) -> str:
        value = special.get(name) or default
        if isinstance(value, Mapping):
            value = value.get("content")
        if not isinstance(value, str):
            raise failure("model_invalid", f"{self.name}: {name} is no text")
        return value

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise failure("model_invalid", f"{self.name}: the vocabulary has no {token[:50]!r}")
        return int(found)


def _read(folder: Path, root: Path) -> Tokenizer:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        read_json(whole, root, MAX_TOKENIZER_BYTES)
        return _guarded(folder.name, lambda: Tokenizer.from_file(str(inside(root, whole))))
    if not (vocabulary.is_file() and merges.is_file()):
        raise failure("model_invalid", f"{folder.name}/ has neither tokenizer.json nor vocab.json and merges.txt")
    known = read_json(vocabulary, root, MAX_TOKENIZER_BYTES)
    if inside(root, merges).stat().st_size > MAX_TOKENIZER_BYTES:
        raise failure("model_invalid", f"{folder.name}/merges.txt is too large")

    def made() -> Tokenizer:
        lines = inside(root, merges).read_text("utf-8").splitlines()
        pairs = [_pair(line) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(
            models.BPE(
                vocab=known, merges=pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
                unk_token=_UNKNOWN,
            )
        )  # fmt: skip
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        return tokenizer

    return _guarded(folder.name, made)


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second


def _guarded(name: str, step: Callable[[], T]) -> T:
    """What `step` gives. All that the library raises at a file, its own panics included, is `model_invalid`."""
    try:
        return step()
    except (KeyboardInterrupt, SystemExit, MemoryError, OperationError):
        raise
    except BaseException as error:
        raise failure("model_invalid", f"{name} is no tokenizer that can be used: {str(error)[:200]}") from error
