"""The rules of the pass `legalize`, and how they read a quantized graph."""
