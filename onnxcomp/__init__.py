"""ONNX compression toolkit."""
