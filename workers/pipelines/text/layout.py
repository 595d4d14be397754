"""What the folder of a text embedding model says, in the layout that sentence-transformers writes and Optimum exports.

    tokenizer.json               needed: the tokenizer, in the form of the library `tokenizers`
    model.onnx, onnx/model.onnx  needed: the graph; or the only .onnx file
    modules.json                 the steps: Transformer, Pooling, Normalize; no others are known here
    N_Pooling/config.json        mean or CLS pooling, and the width of what is pooled
    sentence_bert_config.json    max_seq_length, do_lower_case
    tokenizer_config.json        model_max_length, pad_token
    config.json                  hidden_size, vocab_size, max_position_embeddings, matryoshka_dimensions
    config_sentence_transformers.json   the prompt that goes before each text

Where only the first two are there: mean pooling, no normalisation, and at most `DEFAULT_TOKENS` tokens a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from device_operations.errors import OperationError, failure
from device_operations.wire.bounds import load_json

#: Tokens of one text at most, where the folder names no limit.
DEFAULT_TOKENS = 512

#: Limits above this are no limits: files say 10**30 where there is none.
MOST_TOKENS = 1 << 20

#: A configuration file of more bytes is none.
MOST_CONFIG_BYTES = 4 << 20

#: Characters of a path that a configuration file names.
MOST_PATH = 250

#: Model types whose positions begin behind the padding token's id, so that so many fewer tokens fit.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")

#: sentence-transformers' names of the pooling modes known here, in both forms of its files.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Pooling(StrEnum):
    """How the vectors of a text's tokens become one: their mean, or the first token's."""

    MEAN = "mean"
    CLS = "cls"


@dataclass(frozen=True, slots=True)
class Layout:
    """A text embedding model, as its folder describes it.

    `hidden_size` and `vocabulary` are None where no file names them. `dimensions` are the shorter lengths to which the
    model's vectors may be cut (Matryoshka): empty where it was not trained for that, None where any length will do.
    """

    graph: Path
    tokenizer: Path
    max_tokens: int
    pooling: Pooling = Pooling.MEAN
    normalize: bool = False
    lower_case: bool = False
    prompt: str = ""
    hidden_size: int | None = None
    vocabulary: int | None = None
    pad_token: str | None = None
    pad_id: int | None = None
    dimensions: tuple[int, ...] | None = ()


def read_layout(folder: Path) -> Layout:
    """Reads the folder, without opening the graph or the tokenizer.

    Raises `model_invalid` for what is missing, cannot be read or does not fit together, and for steps and poolings that
    are not known here.
    """
    transformer, pooling_folder, normalize = _modules(folder)
    at = f"{transformer}/" if transformer else ""
    config = _Config.read(folder, f"{at}config.json")
    bert = _Config.read(folder, f"{at}sentence_bert_config.json")
    tokens = _Config.read(folder, f"{at}tokenizer_config.json")
    pool = _Config.read(folder, f"{pooling_folder}/config.json") if pooling_folder else None
    pooling, pooled = (Pooling.MEAN, None) if pool is None else _pooling(pool)
    hidden = config.number("hidden_size") or config.number("dim")  # `dim` in DistilBERT's
    if pooled is not None and hidden is not None and pooled != hidden:
        raise failure(
            "model_invalid",
            f"{pooling_folder}/config.json pools {pooled} numbers a token, and {config.name} says hidden_size {hidden}",
        )
    return Layout(
        graph=_graph(folder, at),
        tokenizer=_needed(folder, f"{at}tokenizer.json"),
        max_tokens=_max_tokens(config, bert, tokens),
        pooling=pooling,
        normalize=normalize,
        lower_case=bert.flag("do_lower_case"),
        prompt=_prompt(_Config.read(folder, "config_sentence_transformers.json"), pool),
        hidden_size=hidden or pooled,
        vocabulary=config.number("vocab_size"),
        pad_token=_pad_token(tokens),
        pad_id=config.number("pad_token_id", least=0),
        dimensions=_dimensions(config),
    )


def inside(folder: Path, relative: str, named_in: str) -> Path:
    """The path that a configuration file names, which must stay in the model's folder, links included."""
    if "\x00" not in relative and len(relative) <= MOST_PATH:
        try:
            found = (folder / relative).resolve()
            if found.is_relative_to(folder.resolve()):
                return found
        except (OSError, RuntimeError):  # a name that no file system takes, a loop of links
            pass
    raise failure("model_invalid", f"{named_in} names {relative[:200]!r}, which does not lie in the model's folder")


@dataclass(frozen=True, slots=True)
class _Config:
    """A JSON file's object; empty where the file is not there."""

    name: str
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str) -> _Config:
        value = _json(folder, name)
        if value is None:
            return cls(name, {})
        if not isinstance(value, dict):
            raise failure("model_invalid", f"{name} is not a JSON object")
        return cls(name, value)

    def number(self, field: str, *, least: int = 1) -> int | None:
        """A whole number from `least` on; None where the file has none."""
        value = self.fields.get(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise failure("model_invalid", f"{self.name}: {field} is {str(value)[:60]!r}, not a number from {least} on")
        return value

    def flag(self, field: str) -> bool:
        value = self.fields.get(field, False)
        if not isinstance(value, bool):
            raise failure("model_invalid", f"{self.name}: {field} is {str(value)[:60]!r}, neither true nor false")
        return value


def _json(folder: Path, name: str) -> Any:
    path = inside(folder, name, name)
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise failure("model_invalid", f"{name} has more than {MOST_CONFIG_BYTES} bytes")
        return load_json(path.read_bytes(), name)
    except OSError as error:
        raise failure("model_invalid", f"{name} cannot be read: {error.strerror}") from error
    except OperationError as error:
        raise failure("model_invalid", error.message) from error


def _modules(folder: Path) -> tuple[str, str, bool]:
    """The folders of the transformer and of the pooling ("" where modules.json is not there), and whether to normalise.

    sentence-transformers itself, given no modules.json, takes the mean of the tokens and does not normalise.
    """
    listed = _json(folder, "modules.json")
    if listed is None:
        return "", "1_Pooling" if (folder / "1_Pooling" / "config.json").is_file() else "", False
    steps = []
    for entry in listed if isinstance(listed, list) else [None]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("type", "path")):
            raise failure("model_invalid", "modules.json is not a list of objects with type and path")
        inside(folder, entry["path"], "modules.json")
        steps.append((entry["type"].rpartition(".")[2], entry["path"]))
    names = [name for name, _ in steps]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise failure(
            "model_invalid",
            f"modules.json has the steps {', '.join(names)[:200]}; known are Transformer, Pooling, and then Normalize",
        )
    return steps[0][1].strip("/"), steps[1][1].strip("/"), names[-1] == "Normalize"


def _pooling(config: _Config) -> tuple[Pooling, int | None]:
    """How tokens are pooled, and how many numbers each one's vector has; None where the file does not say it."""
    if not config.fields:
        raise failure("model_invalid", f"there is no {config.name}, which modules.json calls for")
    given = config.fields.get("pooling_mode")
    modes = given if isinstance(given, list) else [given] if given is not None else []
    if given is None:
        modes = [mode for field, mode in _FLAGS.items() if config.flag(field)] or ["mean"]
    if len(modes) != 1 or modes[0] not in list(Pooling):
        asked = " and ".join(str(mode)[:60] for mode in modes)
        raise failure("model_invalid", f"{config.name} asks for the pooling {asked!r}; known are mean and cls")
    return Pooling(modes[0]), config.number("embedding_dimension") or config.number("word_embedding_dimension")


def _max_tokens(config: _Config, bert: _Config, tokens: _Config) -> int:
    """Tokens of one text at most, special ones included, as sentence-transformers finds it."""
    positions = config.number("max_position_embeddings")
    if positions is not None and config.fields.get("model_type") in _OFFSET_POSITIONS:
        positions -= (config.number("pad_token_id", least=0) or 0) + 1
    asked = bert.number("max_seq_length")
    limits = [limit for limit in (asked or tokens.number("model_max_length"), positions) if limit is not None]
    limit = min(limits, default=DEFAULT_TOKENS)
    if limit < 1:
        raise failure("model_invalid", f"config.json leaves no room for tokens: max_position_embeddings gives {limit}")
    return limit if limit <= MOST_TOKENS else DEFAULT_TOKENS


def _prompt(config: _Config, pooling: _Config | None) -> str:
    """The text that goes before each text by default."""
    name = config.fields.get("default_prompt_name")
    if name is None:
        return ""
    prompts = config.fields.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise failure("model_invalid", f"{config.name}: there is no prompt {str(name)[:60]!r} (default_prompt_name)")
    if prompt and pooling is not None and pooling.fields.get("include_prompt") is False:
        raise failure(
            "model_invalid", f"{pooling.name} leaves the prompt out (include_prompt), which is not known here"
        )
    return prompt


def _pad_token(tokens: _Config) -> str | None:
    token = tokens.fields.get("pad_token")
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _dimensions(config: _Config) -> tuple[int, ...] | None:
    """By the fields that other servers read too: the lengths that the model was trained for, or that any will do."""
    listed = config.fields.get("matryoshka_dimensions")
    if listed is None:
        return None if config.flag("is_matryoshka") else ()
    if not isinstance(listed, list) or not all(isinstance(one, int) and one > 0 for one in listed):
        raise failure("model_invalid", "config.json: matryoshka_dimensions is not a list of numbers")
    return tuple(listed)


def _graph(folder: Path, at: str) -> Path:
    for relative in dict.fromkeys((f"{at}model.onnx", f"{at}onnx/model.onnx", "model.onnx", "onnx/model.onnx")):
        found = inside(folder, relative, "the folder")
        if found.is_file():
            return found
    every = sorted(path for path in folder.rglob("*.onnx") if path.is_file())
    if len(every) != 1:
        raise failure(
            "model_invalid",
            f"a text embedding model has model.onnx, onnx/model.onnx or one .onnx file; there are {len(every)}",
        )
    return inside(folder, str(every[0].relative_to(folder)), "the folder")


def _needed(folder: Path, name: str) -> Path:
    path = inside(folder, name, "the folder")
    if not path.is_file():
        raise failure("model_invalid", f"there is no {name}, which a text embedding model needs")
    return path
