"""Times the sparse kernels against ONNX Runtime's dense ops: `python -m examples.sparse_gemv`."""
