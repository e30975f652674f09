"""Input specs and feeds for tests of sample data."""

import numpy as np

from onnxcomp.target import TensorSpec


def spec(name="x", shape=("batch", 8), dtype=np.float32):
    return TensorSpec(name=name, dtype=np.dtype(dtype), shape=shape)


X = (spec(),)


def feeds(count=6):
    return [{"x": np.full((1, 8), i, np.float32)} for i in range(count)]


def firsts(data):
    return [float(np.ravel(feed["x"])[0]) for feed in data]
