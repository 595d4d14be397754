"""The layers that a model may be made of: one table of types and arguments, and the check of a list against it.

A layer is `{"type", "name"?, …}`: the type is torch.nn's class in snake_case (`conv2d`, `batch_norm2d`, `lstm`), the
arguments are torch's own. `sequential`, `residual` and `parallel` nest `layers`. Nothing here needs torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from device_operations.wire.json_types import FreeJson

#: Says what is wrong with a value, or nothing.
Check = Callable[[object], "str | None"]

#: Bounds that keep a description of a model from costing more than the model.
MAX_LAYERS = 10_000
MAX_DEPTH = 16
MAX_SIDE = 2**40
MAX_NUMBER = 1e30


@dataclass(frozen=True, slots=True)
class LayerType:
    """The arguments of one type: which it must have, which it may have, and whether it nests `layers`."""

    required: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    nests: bool = False


def canonical(layers: object) -> list[FreeJson]:
    """`layers` checked, every type by its one spelling; `ValueError` names the layer and what is wrong with it."""
    if not isinstance(layers, list) or not layers:
        raise ValueError("layers must be a list of at least one layer")
    checked = _check_list(layers, "layers", 1)
    total = _count(checked)
    if total > MAX_LAYERS:
        raise ValueError(f"{total} layers; at most {MAX_LAYERS} are taken")
    return checked


def _check_list(layers: list[object], where: str, depth: int) -> list[FreeJson]:
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: layers nest deeper than {MAX_DEPTH}")
    checked = [_check_layer(layer, f"{where}[{index}]", depth) for index, layer in enumerate(layers)]
    names = [layer.get("name", str(index)) for index, layer in enumerate(checked)]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} is given twice; give each layer its own")
    return checked


def _check_layer(layer: object, where: str, depth: int) -> FreeJson:
    if not isinstance(layer, dict) or not isinstance(layer.get("type"), str):
        raise ValueError(f'{where}: a layer is an object with a "type", as in {{"type": "relu"}}')
    spelled = layer["type"]
    name = _SPELLINGS.get(spelled.replace("_", "").lower())
    if name is None:
        raise ValueError(
            f"{where}: unknown layer {spelled[:100]!r}{_near(spelled[:100], LAYERS)}; known are {', '.join(LAYERS)}"
        )
    kind = LAYERS[name]
    checked: FreeJson = {"type": name}
    if layer.get("name") is not None:
        checked["name"] = _layer_name(layer["name"], where)
    given = {key: value for key, value in layer.items() if key not in ("type", "name", "layers")}
    known = {**kind.required, **kind.optional}
    for argument, value in given.items():
        if argument not in known:
            allowed = ", ".join(known) or "none"
            hint = _near(argument[:100], known)
            raise ValueError(f"{where} ({name}): unknown argument {argument[:100]!r}{hint}; it takes {allowed}")
        if value is None and argument in kind.optional:
            continue
        problem = known[argument](value)
        if problem:
            raise ValueError(f"{where} ({name}): {argument} must be {problem}, not {repr(value)[:200]}")
        checked[argument] = value
    missing = [argument for argument in kind.required if argument not in checked]
    if missing:
        raise ValueError(f"{where} ({name}): {missing[0]} is missing")
    if kind.nests:
        if not isinstance(layer.get("layers"), list) or not layer["layers"]:
            raise ValueError(f'{where} ({name}): "layers" must be a list of at least one layer')
        checked["layers"] = _check_list(layer["layers"], f"{where}.layers", depth + 1)
    elif "layers" in layer:
        raise ValueError(f'{where} ({name}): takes no "layers"; only sequential, residual and parallel nest')
    _check_together(checked, where)
    return checked


def _check_together(layer: FreeJson, where: str) -> None:
    """What torch refuses about arguments that are right one by one."""
    kind = layer["type"]
    pairs = {"multihead_attention": ("embed_dim", "num_heads"), "group_norm": ("num_channels", "num_groups")}
    if kind in pairs:
        whole, part = pairs[kind]
        if layer[whole] % layer[part]:
            raise ValueError(f"{where} ({kind}): {whole} {layer[whole]} is not a multiple of {part} {layer[part]}")
    if kind.startswith("conv"):
        groups = layer.get("groups", 1)
        for channels in ("in_channels", "out_channels"):
            if layer[channels] % groups:
                raise ValueError(f"{where} ({kind}): {channels} {layer[channels]} is not a multiple of groups {groups}")
        if layer.get("padding") == "same" and any(side != 1 for side in _sides(layer.get("stride", 1))):
            raise ValueError(f'{where} ({kind}): padding "same" needs stride 1')
    if kind == "embedding" and layer.get("padding_idx") is not None:
        rows = layer["num_embeddings"]
        if not -rows <= layer["padding_idx"] < rows:
            raise ValueError(f"{where} ({kind}): padding_idx {layer['padding_idx']} is not one of the {rows} rows")
    if kind.startswith(("max_pool", "avg_pool")):
        kernel, padding = _sides(layer["kernel_size"]), _sides(layer.get("padding", 0))
        if any(pad * 2 > side for pad in padding for side in kernel):
            raise ValueError(f"{where} ({kind}): padding may be at most half of kernel_size")


def _layer_name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value or len(value) > 200 or "." in value or not value.isprintable():
        raise ValueError(f"{where}: a name is 1 to 200 printable characters without '.', not {repr(value)[:200]}")
    return value


def _count(layers: list[FreeJson]) -> int:
    return sum(1 + _count(layer.get("layers", [])) for layer in layers)


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _sides(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def _integer(low: int, high: int = MAX_SIDE) -> Check:
    def check(value: object) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"an integer from {low} to {high}"

    return check


def _integers(low: int, length: int | None, *words: str) -> Check:
    """An integer, or a list of `length` of them (any length up to 8 where None), or one of `words`."""
    single = _integer(low)

    def check(value: object) -> str | None:
        if isinstance(value, str) and value in words:
            return None
        if isinstance(value, list):
            length_fits = 1 <= len(value) <= 8 if length is None else len(value) == length
            if length_fits and all(single(side) is None for side in value):
                return None
        elif single(value) is None:
            return None
        lists = "a list of them" if length is None else f"a list of {length}"
        return f"an integer of at least {low}, or {lists}" + "".join(f", or {word!r}" for word in words)

    return check


def _number(low: float | None = None, high: float | None = None) -> Check:
    least, most = -MAX_NUMBER if low is None else low, MAX_NUMBER if high is None else high

    def check(value: object) -> str | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
            return None
        from_low = "" if low is None else f" of at least {low:g}"
        return "a number" + from_low + ("" if high is None else f", up to {high:g}")

    return check


def _choice(*words: str) -> Check:
    return lambda value: None if isinstance(value, str) and value in words else " or ".join(map(repr, words))


def _flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _true(value: object) -> str | None:
    return None if value is True else "true: the first axis of every input is the batch"


_size, _count_, _axis, _share, _any = _integer(1), _integer(0), _integer(-8, 8), _number(0, 1), _number()


def _convolution(sides: int) -> LayerType:
    return LayerType(
        {"in_channels": _size, "out_channels": _size, "kernel_size": _integers(1, sides)},
        {
            "stride": _integers(1, sides), "padding": _integers(0, sides, "same", "valid"),
            "dilation": _integers(1, sides), "groups": _size, "bias": _flag,
            "padding_mode": _choice("zeros", "reflect", "replicate", "circular"),
        },
    )  # fmt: skip


def _pooling(sides: int, **more: Check) -> LayerType:
    optional = {"stride": _integers(1, sides), "padding": _integers(0, sides), "ceil_mode": _flag, **more}
    return LayerType({"kernel_size": _integers(1, sides)}, optional)


_normalization = LayerType(
    {"num_features": _size},
    {"eps": _number(0), "momentum": _share, "affine": _flag, "track_running_stats": _flag},
)
_recurrent = LayerType(
    {"input_size": _size, "hidden_size": _size},
    {
        "num_layers": _integer(1, 64), "bias": _flag, "batch_first": _true, "dropout": _share, "bidirectional": _flag,
        "output": _choice("sequence", "last"),
    },
)  # fmt: skip
_dropout = LayerType({}, {"p": _share})
_plain = LayerType()

#: Every layer type. `output` of lstm and gru (all steps or the last) and `merge` of parallel are this project's own.
LAYERS: dict[str, LayerType] = {
    "linear": LayerType({"in_features": _size, "out_features": _size}, {"bias": _flag}),
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "batch_norm1d": _normalization,
    "batch_norm2d": _normalization,
    "layer_norm": LayerType(
        {"normalized_shape": _integers(1, None)}, {"eps": _number(0), "elementwise_affine": _flag, "bias": _flag}
    ),
    "group_norm": LayerType({"num_groups": _size, "num_channels": _size}, {"eps": _number(0), "affine": _flag}),
    "embedding": LayerType({"num_embeddings": _size, "embedding_dim": _size}, {"padding_idx": _integer(-MAX_SIDE)}),
    "lstm": _recurrent,
    "gru": _recurrent,
    "multihead_attention": LayerType(
        {"embed_dim": _size, "num_heads": _size}, {"dropout": _share, "bias": _flag, "batch_first": _true}
    ),
    "relu": _plain,
    "relu6": _plain,
    "leaky_relu": LayerType({}, {"negative_slope": _any}),
    "elu": LayerType({}, {"alpha": _any}),
    "selu": _plain,
    "gelu": LayerType({}, {"approximate": _choice("none", "tanh")}),
    "silu": _plain,
    "mish": _plain,
    "sigmoid": _plain,
    "tanh": _plain,
    "softplus": LayerType({}, {"beta": _any, "threshold": _any}),
    "softsign": _plain,
    "hardswish": _plain,
    "hardsigmoid": _plain,
    "hardtanh": LayerType({}, {"min_val": _any, "max_val": _any}),
    "prelu": LayerType({}, {"num_parameters": _size, "init": _any}),
    "log_sigmoid": _plain,
    "softmax": LayerType({"dim": _axis}),
    "log_softmax": LayerType({"dim": _axis}),
    "dropout": _dropout,
    "dropout1d": _dropout,
    "dropout2d": _dropout,
    "alpha_dropout": _dropout,
    "max_pool1d": _pooling(1, dilation=_integers(1, 1)),
    "max_pool2d": _pooling(2, dilation=_integers(1, 2)),
    "avg_pool1d": _pooling(1, count_include_pad=_flag),
    "avg_pool2d": _pooling(2, count_include_pad=_flag),
    "adaptive_avg_pool1d": LayerType({"output_size": _integers(1, 1)}),
    "adaptive_avg_pool2d": LayerType({"output_size": _integers(1, 2)}),
    "adaptive_max_pool1d": LayerType({"output_size": _integers(1, 1)}),
    "adaptive_max_pool2d": LayerType({"output_size": _integers(1, 2)}),
    "flatten": LayerType({}, {"start_dim": _axis, "end_dim": _axis}),
    "unflatten": LayerType({"dim": _axis, "unflattened_size": _integers(1, None)}),
    "identity": _plain,
    "sequential": LayerType(nests=True),
    "residual": LayerType(nests=True),
    "parallel": LayerType({}, {"merge": _choice("concat", "add"), "dim": _axis}, nests=True),
}

#: `BatchNorm2d`, `batchnorm2d` and `batch_norm2d` are one type.
_SPELLINGS = {name.replace("_", ""): name for name in LAYERS}
