"""Devices' ONNX Runtime side: sessions, bound inputs and outputs, and graphs made faster before they load."""
