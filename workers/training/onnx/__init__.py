"""An ONNX graph that is trained: read, its weights found, run by torch, and written again."""
