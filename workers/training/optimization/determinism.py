"""Where a step's randomness comes from: seeds derived from the session's own, and torch's deterministic kernels.

torch's random state is one for the process and others draw from it. So nothing here relies on what it was: every
step sets it first, from (session seed, step, batches accumulated).
"""

from __future__ import annotations

import hashlib
import os

import torch
import torch.utils.deterministic

# cuBLAS reads this when its first handle is made; without it products of matrices vary from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from the parts; the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_device(device: torch.device, seed: int) -> None:
    """Sets torch's random state on the host and on `device`, and nowhere else."""
    # Only these two: torch.manual_seed walks every backend it knows, which costs a tenth of a small step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def use_deterministic(wanted: bool) -> None:
    """Makes torch choose deterministic kernels, or raise where an operator has none; cheap to call before each step."""
    if torch.are_deterministic_algorithms_enabled() != wanted:
        # Not use_deterministic_algorithms, which does the same and first imports torch's compiler, for two seconds.
        torch.set_deterministic_debug_mode("error" if wanted else "default")
        # Filling memory that is about to be overwritten would cost a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = wanted
        torch.backends.cudnn.benchmark = False
