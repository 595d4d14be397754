"""The module that is trained: its definition, layers, inputs and parameters."""
