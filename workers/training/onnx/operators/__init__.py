"""The ONNX operators that training knows, in one table by name; anything else is refused by that name.

An operator is built once for each node, from its attributes and the constants among its inputs, and is then called with
tensors. Integers that describe shapes live on the host (the CPU), not on the device: a shape costs no transfer.
"""

from workers.training.onnx.operators import elementwise, neural, recurrent, reductions, shapes
from workers.training.onnx.operators.node import OnnxNode, Operator

OPERATORS = elementwise.OPERATORS | neural.OPERATORS | recurrent.OPERATORS | reductions.OPERATORS | shapes.OPERATORS

__all__ = ["OPERATORS", "OnnxNode", "Operator"]
