"""Graphs written anew before ONNX Runtime reads them: onnxscript's rules join what its own levels leave apart.

    Conv ─ Mul ─ Add, by single numbers    ▶ Conv
    Mul ─ Add ─ Conv that pads nothing     ▶ Conv
    x · Clip(x + 3, 0, 6) / 6              ▶ HardSwish

What a graph computes stays; a result may differ in its last digits, as it does between ONNX Runtime's levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_operations.errors import failure
from workers.devices.libraries import installed, tidy

if TYPE_CHECKING:
    import onnx_ir

#: The session setting that names the folder of external data, for a model that comes as bytes.
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"

#: The first operator set that has HardSwish.
_HARD_SWISH_OPSET = 14


def rewritten(source: Path | bytes, name: str) -> bytes:
    """The model with every rule applied wherever it fits; external data that no rule touches stays where it is.

    Raises `model_invalid` where onnxscript cannot read or write the model, `device_unavailable` where it is missing.
    """
    if not installed("onnxscript"):
        raise failure("device_unavailable", "graph_optimization 'rewrite' needs onnxscript: pip install onnxscript.")
    import onnx
    import onnx_ir

    try:
        model = onnx_ir.from_proto(onnx.load_from_string(source)) if isinstance(source, bytes) else onnx_ir.load(source)
        _apply_rules(model)
        return bytes(onnx_ir.to_proto(model).SerializeToString())
    except Exception as error:
        remedy = "Load it with graph_optimization 'all' instead."
        raise failure("model_invalid", f"{name} cannot be written anew: {tidy(error)}. {remedy}") from error


def _apply_rules(model: onnx_ir.Model) -> None:
    from onnx_ir.passes import common as passes
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules import common as rules

    # Of the constants, rules see those among the initializers.
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    rules.fuse_hardswish_rules().apply_to_model(model)
    # One after the other: the second would take what the first needs.
    for rule in (rules.conv_affine_fusion_rule, rules.affine_conv_fusion_rule):
        RewriteRuleSet([rule], commute=True).apply_to_model(model)
    _flatten_biases(model)
    if model.opset_imports.get("", _HARD_SWISH_OPSET) < _HARD_SWISH_OPSET:
        _spell_hard_swish(model)
    passes.RemoveUnusedNodesPass()(model)


def _flatten_biases(model: onnx_ir.Model) -> None:
    """Gives biases their one axis again: joined with a number of shape [1, 1, 1, 1], the rules leave them four."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None and len(bias.const_value.shape) > 1:
            flat = bias.const_value.numpy().reshape(-1)
            bias.const_value, bias.shape = onnx_ir.tensor(flat, name=bias.name), onnx_ir.Shape(flat.shape)


def _spell_hard_swish(model: onnx_ir.Model) -> None:
    """Says HardSwish by operators that the model's own operator set has; ONNX Runtime joins them again."""
    from onnxscript.rewriter import RewriteRuleSet, pattern

    class Spelled(pattern.RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.HardSwish(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Mul(x, op.HardSigmoid(x, alpha=1 / 6, beta=0.5))

    RewriteRuleSet([Spelled().rule()]).apply_to_model(model)
