"""Passes that turn nodes of a model into nodes of ours; see `onnxcomp.targets.tvm.nodes`."""
