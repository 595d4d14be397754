"""Whether rows of a batch leave each other alone: read off an ONNX graph, operator by operator, before it runs.

`proof.prove` gives the verdict; the other modules are the table that it stands on. Nothing here runs a model, reads a
weight, or knows of devices, jobs or callers.
"""
