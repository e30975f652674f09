"""A vision transformer of ViT-Ti/16 shape with random weights and outlier channels in its norms.

    python -m examples.vit.outlier [--images 64]
    python -m examples.vit.outlier --latency

Trained transformers have a few channels that are tens of times larger than the rest. Here they are made: in every
LayerNorm, four entries of gamma are multiplied by 20 to 60. The table compares static int8 with and without `smooth`.
With `--latency`: time over that of fp32, on one thread, both measured in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import api
from onnxcomp.compare import compare
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.smooth import Smooth
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner

SIZE, PATCH, WIDTH, HEADS, DEPTH, CLASSES = 224, 16, 192, 3, 12, 1000
TOKENS = (SIZE // PATCH) ** 2


class _Writer:
    """Appends nodes and weights to a graph."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.image = ir.Value(name="image", shape=ir.Shape([1, 3, SIZE, SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def weight(self, array: np.ndarray) -> ir.Value:
        name = f"w{len(self.weights)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self.weights.append(value)
        return value

    def normal(self, *shape: int, scale: float) -> ir.Value:
        return self.weight((self.random.normal(size=shape) * scale).astype(np.float32))

    def shape(self, *dims: int) -> ir.Value:
        return self.weight(np.array(dims, np.int64))

    def op(self, op_type: str, *inputs: ir.Value, name: str = "", **attributes: Any) -> ir.Value:
        name = name or f"{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes, outputs=[ir.Value(name=f"{name}_out")], name=name)
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, inputs: int, outputs: int, name: str) -> ir.Value:
        y = self.op("MatMul", x, self.normal(inputs, outputs, scale=0.03), name=name)
        return self.op("Add", y, self.normal(outputs, scale=0.02))

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        gamma = self.random.uniform(0.5, 1.5, WIDTH)
        gamma[self.random.choice(WIDTH, 4, replace=False)] *= self.random.uniform(20, 60, 4)
        beta = self.normal(WIDTH, scale=0.1)
        return self.op("LayerNormalization", x, self.weight(gamma.astype(np.float32)), beta, name=name)

    def attention(self, x: ir.Value, name: str) -> ir.Value:
        width = WIDTH // HEADS
        x = self.op("Reshape", self.linear(x, WIDTH, 3 * WIDTH, f"{name}/qkv"), self.shape(1, -1, 3, HEADS, width))
        x = self.op("Transpose", x, perm=[2, 0, 3, 1, 4])
        q, k, v = (self.op("Gather", x, self.weight(np.array(i, np.int64)), axis=0) for i in range(3))
        q = self.op("Mul", q, self.weight(np.array(width**-0.5, np.float32)))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        x = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self.linear(self.op("Reshape", x, self.shape(1, -1, WIDTH)), WIDTH, WIDTH, f"{name}/proj")

    def mlp(self, x: ir.Value, name: str) -> ir.Value:
        x = self.op("Gelu", self.linear(x, WIDTH, 4 * WIDTH, f"{name}/fc1"))
        return self.linear(x, 4 * WIDTH, WIDTH, f"{name}/fc2")


def outlier_vit(seed: int = 0) -> ir.Model:
    """The network; input `image` `(1, 3, 224, 224)`, output `logits` `(1, 1000)`, float32."""
    w = _Writer(seed)
    x = w.op(
        "Conv", w.image, w.normal(WIDTH, 3, PATCH, PATCH, scale=(3 * PATCH**2) ** -0.5),
        w.normal(WIDTH, scale=0.02), name="patches", strides=[PATCH, PATCH],
    )  # fmt: skip
    x = w.op("Transpose", w.op("Reshape", x, w.shape(1, WIDTH, TOKENS)), perm=[0, 2, 1])
    x = w.op("Concat", w.normal(1, 1, WIDTH, scale=1.0), x, axis=1)
    x = w.op("Add", x, w.normal(1, TOKENS + 1, WIDTH, scale=0.5))
    for i in range(DEPTH):
        x = w.op("Add", x, w.attention(w.norm(x, f"{i}/norm1"), f"{i}/attn"))
        x = w.op("Add", x, w.mlp(w.norm(x, f"{i}/norm2"), f"{i}/mlp"))
    x = w.op("Gather", w.norm(x, "norm"), w.weight(np.array(0, np.int64)), axis=1)
    logits = w.linear(x, WIDTH, CLASSES, "head")
    logits.name = "logits"
    logits.shape, logits.dtype = ir.Shape([1, CLASSES]), ir.DataType.FLOAT
    graph = ir.Graph([w.image], [logits], nodes=w.nodes, initializers=w.weights, name="vit", opset_imports={"": 20})
    return ir.Model(graph, ir_version=9)


def pictures(count: int, seed: int) -> Iterator[Feed]:
    """Smooth random pictures, roughly of mean 0 and variance 1."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        coarse = random.normal(size=(1, 3, 14, 14)).repeat(16, axis=2).repeat(16, axis=3)
        yield {"image": (0.8 * coarse + 0.6 * random.normal(size=(1, 3, SIZE, SIZE))).astype(np.float32)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    original = outlier_vit()
    rows: dict[str, tuple[Pass, ...]] = {
        "static int8": (Cleanup(), Quantize()),
        "smooth, static int8": (Cleanup(), Smooth(), Quantize()),
        "smooth with explicit Mul, static int8": (Cleanup(), Smooth(explicit=True), Quantize()),
    }
    for label, passes in rows.items():
        model = outlier_vit()
        pipeline = Pipeline(passes=passes, capabilities=OrtCpu().capabilities(), runner=reference_runner)
        pipeline.run(model, list(pictures(32, seed=1)))
        if options.latency:
            ratio = api.profile(model, original, threads=1, repeat=50).ratio
            assert ratio is not None
            print(f"{label:40} {ratio.median:.3f} of the time of fp32 ({ratio.low:.3f}-{ratio.high:.3f})", flush=True)
            continue
        runs = [reference_runner(m, ["logits"]) for m in (original, model)]
        found = compare(runs[0], runs[1], pictures(options.images, seed=2), data_name="random pictures").outputs[0]
        print(f"{label:40} SQNR {found.sqnr:6.2f} dB, agreement {found.top1:.3f}", flush=True)


if __name__ == "__main__":
    main()
