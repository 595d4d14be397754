"""Training and evaluation mode of a module, with batch normalization kept at its running statistics where asked for."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from workers.training.onnx.module import OnnxModule


def set_mode(module: nn.Module, *, training: bool, frozen_statistics: bool) -> None:
    """Puts the module in training or evaluation mode.

    With `frozen_statistics` batch normalization stays in evaluation mode: it uses its running statistics and leaves
    them as they are.
    """
    module.train(training)
    if not training or not frozen_statistics:
        return
    if isinstance(module, OnnxModule):
        module.freeze_statistics()
    for child in module.modules():
        if _is_batch_normalization(child):
            child.eval()


def _is_batch_normalization(module: nn.Module) -> bool:
    # The submodules of a program are no instances of torch's classes; they keep the name of theirs.
    name = getattr(module, "original_name", "")
    return isinstance(module, _BatchNorm) or (isinstance(name, str) and name.startswith(("BatchNorm", "SyncBatchNorm")))
