"""What each ONNX operator does to the rows of a batch, one module for each family.

Each module enters its rules into `workers.rows.node.RULES` when it is imported, and all are imported here.
"""

from workers.rows.operators import (
    elementwise,
    filling,
    gathering,
    images,
    learners,
    microsoft,
    products,
    quantised,
    reductions,
    selecting,
    sequences,
    shapes,
)

__all__ = [
    "elementwise", "filling", "gathering", "images", "learners", "microsoft", "products", "quantised", "reductions",
    "selecting", "sequences", "shapes",
]  # fmt: skip
