"""Times sparse products compiled by TVM against the native library in ONNX Runtime, with weights from memory.

    python -m examples.tvm.kernels [--shapes 4096x4096 2048x8192] [--repeat 15] [--only threshold nm dense]

A model is a row of products of one hidden vector with different weights, together larger than a cache, made sparse by
the passes; both runtimes get the same file and run in turns, one thread. Milliseconds a product, medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tvm

from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.passes.threshold import Threshold
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.targets.tvm.session import Loaded
from onnxcomp.verbs.resolve import compiled, make_target

BYTES = 300e6
SIZES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5, "keep": 4.0}


INPUTS = 16


def products(k: int, n: int, copies: int) -> ir.Model:
    """A small layer and an activation, whose `k` outputs go into `copies` products."""
    rng = np.random.default_rng(0)

    def value(name: str, size: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape((1, size)), type=ir.TensorType(ir.DataType.FLOAT))

    def weight(name: str, rows: int, columns: int) -> ir.Value:
        array = rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))
        found = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape((rows, columns)))
        found.type = ir.TensorType(ir.DataType.FLOAT)
        return found

    x, wide, gate, hidden = value("x", INPUTS), value("wide", k), value("gate", k), value("hidden", k)
    outputs = [value(f"y{i}", n) for i in range(copies)]
    weights = [weight("up", INPUTS, k), *(weight(f"w{i}", k, n) for i in range(copies))]
    nodes = [
        ir.node("MatMul", [x, weights[0]], outputs=[wide], name="up"),
        ir.node("Sigmoid", [wide], outputs=[gate], name="gate"),
        ir.node("Mul", [wide, gate], outputs=[hidden], name="silu"),
    ]
    for i, y in enumerate(outputs):
        nodes.append(ir.node("MatMul", [hidden, weights[i + 1]], outputs=[y], name=f"product{i}"))
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 21}, name="products")
    return ir.Model(graph, ir_version=10)


def feeds(count: int) -> Iterator[Feed]:
    """Activations of a normal distribution."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield {"x": rng.standard_normal((1, INPUTS), np.float32)}


def cases(only: list[str]) -> Iterator[tuple[str, str, list[Pass]]]:
    """Name, storage of the weights, and passes."""
    if "dense" in only:
        yield "dense float32", "float32", []
    if "threshold" in only:
        for weights in ("keep", "int8", "int4"):
            for share in (0.5, 0.9):
                step = Threshold(method="teal", sparsity=share, weights=weights, only_if_faster=False)
                yield f"threshold {weights} {share:.0%}", weights, [step]
    if "nm" in only:
        for pattern in ("2:4", "1:4"):
            for values in ("keep", "int8"):
                steps = [NmMask(pattern=pattern, method="magnitude", include_ends=True), NmPack(values=values)]
                yield f"{pattern} {values}", values, steps


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.tvm.kernels", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "2048x8192"])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=["dense", "threshold", "nm"])
    options = parser.parse_args()
    for shape in options.shapes:
        k, n = map(int, shape.split("x"))
        print(f"\n{shape:<28}{'TVM ms':>10}{'native ms':>11}{'ratio':>8}", flush=True)
        for name, storage, passes in cases(options.only):
            model = products(k, n, max(2, round(BYTES / (k * n * SIZES[storage]))))
            copies = len(model.graph.outputs)
            capabilities = OrtCpu().capabilities()
            Pipeline(passes=passes, capabilities=capabilities, runner=reference_runner).run(model, list(feeds(16)))
            mine, native = (seconds / copies for seconds in times(model, list(feeds(options.repeat + 16))[16:]))
            print(f"{name:<28}{mine * 1e3:10.3f}{native * 1e3:11.3f}{mine / native:8.2f}", flush=True)


def times(model: ir.Model, given: list[Feed]) -> tuple[float, float]:
    """Median seconds of a run of both."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = Loaded(compiled(model, make_target("tvm-cpu"), Path(folder, "tvm")), 1)
        target = make_target("ort-cpu")
        session = target.load(compiled(model, target, Path(folder, "ort")))
        measured = []
        for feed in given:
            tensors = {name: tvm.runtime.tensor(array) for name, array in feed.items()}
            start = time.perf_counter()
            loaded.run(tensors)
            middle = time.perf_counter()
            session.run(feed)
            measured.append((middle - start, time.perf_counter() - middle))
        mine, native = np.median(measured[1:], axis=0)
        return float(mine), float(native)


if __name__ == "__main__":
    main()
