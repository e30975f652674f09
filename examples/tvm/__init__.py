"""Models compiled by TVM, against ONNX Runtime."""
