"""A model as it lies on the device, ready to be trained: its module, its tensors by name, which of them are trained.

Also what it will take of memory, counted beforehand without taking any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from device_operations.errors import failure
from device_operations.requests.training import Initialize
from workers.training.memory import count_bytes
from workers.training.model.definition import Definition, Sources, check_hash
from workers.training.model.lora import add_adapters, is_adapter
from workers.training.model.selection import PATTERN, matching
from workers.training.optimization.optimizers import slots_of


@dataclass(frozen=True)
class DeviceModel:
    """`parameters` are all of the module's, `trained` those with gradients, `buffers` what else a checkpoint holds."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    trained: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]

    def fingerprint(self, definition: Definition, spec: Initialize) -> dict[str, str]:
        """What a checkpoint must have in common with the session it is loaded into, part by part."""
        shapes = {name: [list(p.shape), str(p.dtype)] for name, p in {**self.parameters, **self.buffers}.items()}
        return {
            "layers or graph": definition.structure,
            "parameters": _hash(shapes),
            "trained parameters": _hash(list(self.trained)),
            "adapters": _hash(spec.lora.model_dump() if spec.lora else None),
            "optimizer": json.dumps([spec.optimizer.type, *slots_of(spec.optimizer)]),
        }


def estimate_bytes(definition: Definition, spec: Initialize) -> int:
    """Device memory of the session's parameters, buffers, gradients and optimizer state, activations not included.

    Takes no memory for it, however large the model. Raises as `make_resident` does for what does not fit together.
    """
    module = definition.build_meta() or definition.build(spec.seed)
    return _count(_arrange(module, spec), spec)


def make_resident(definition: Definition, spec: Initialize, sources: Sources, device: torch.device) -> DeviceModel:
    """The model on `device` with its initial weights, given ones where the request brings them, and its adapters.

    Weights start on the host, so that a seed gives the same ones on every backend. Raises `model_invalid` for weights
    that do not fit, `validation_failed` for patterns that fit nothing.
    """
    module = definition.build(spec.seed)
    if spec.weights is not None:
        if sources.weights is None:
            raise failure("model_invalid", "the file of the weights was not found")
        if spec.weights.sha256 is not None:
            check_hash(sources.weights, spec.weights.sha256, "the weights file")
        _load_weights(module, sources.weights)
    return _arrange(module, spec, device)


def _arrange(module: nn.Module, spec: Initialize, device: torch.device | None = None) -> DeviceModel:
    """Adds adapters, moves the module and says which parameters are trained."""
    if spec.lora is not None:
        add_adapters(module, spec.lora, spec.seed)
    if device is not None:
        module.to(device)
    parameters = dict(module.named_parameters())
    floating = [name for name, parameter in parameters.items() if parameter.is_floating_point()]
    adapters = {name for name in floating if is_adapter(name)} if spec.lora is not None else set()
    base = [name for name in floating if name not in adapters]
    named = None if spec.trainable is None else matching(spec.trainable, base, PATTERN)
    chosen = (adapters or set(base)) if named is None else adapters | named
    if not chosen:
        raise failure("validation_failed", "the model has no parameters: there is nothing to train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    persistent = set(module.state_dict(keep_vars=True)) - set(parameters)
    return DeviceModel(
        module,
        parameters,
        {name: parameters[name] for name in floating if name in chosen},
        {name: buffer for name, buffer in module.named_buffers() if name in persistent},
    )


def _count(model: DeviceModel, spec: Initialize) -> int:
    held = count_bytes(model.parameters.values()) + count_bytes(model.module.buffers())
    held += count_bytes(model.buffers.values())  # kept twice: a failed step puts them back
    return held + count_bytes(model.trained.values()) * (1 + len(slots_of(spec.optimizer)))


def _load_weights(module: nn.Module, path: Path) -> None:
    """Copies a safetensors file's tensors into the module: every parameter, and the buffers it has, by name."""
    wanted = module.state_dict(keep_vars=True)
    parameters = {name for name, _ in module.named_parameters()}
    try:
        with safe_open(path, framework="pt") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise failure("model_invalid", f"the weights are no safetensors file: {error}") from error
    missing, unknown = sorted(parameters - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        raise failure(
            "model_invalid",
            f"the weights do not fit the model: missing {missing[:10]}, unknown {unknown[:10]}; "
            f"its parameters are {sorted(parameters)[:50]}",
            detail={"missing": missing[:100], "unknown": unknown[:100]},
        )
    for name, tensor in given.items():
        here = wanted[name]
        if tensor.shape != here.shape or tensor.is_floating_point() != here.is_floating_point():
            raise failure(
                "model_invalid",
                f"the weights do not fit the model: {name} is {list(here.shape)} there and {list(tensor.shape)} here",
            )
    with torch.no_grad():
        for name, tensor in given.items():
            wanted[name].copy_(tensor)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
