"""Streaming models, lowered and compiled by TVM, against the models that the pass `delta` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm")

from builder import Builder  # noqa: E402
from streams import Feeds, cnn, delta, frames, largest, recurrent, stream, walk  # noqa: E402
from tvm_harness import Compiled, lowered, machines  # noqa: E402

from onnxcomp import api  # noqa: E402
from onnxcomp.ops import SPARSITY  # noqa: E402
from onnxcomp.passes.carry import Carry  # noqa: E402
from onnxcomp.state import model_state  # noqa: E402
from onnxcomp.targets.tvm.lower.delta import Delta  # noqa: E402
from onnxcomp.targets.tvm.lower.products import Products  # noqa: E402

BEST = machines()[-1]


def ours(model: ir.Model) -> Counter[str]:
    """Nodes of ours, once lowered."""
    return Counter(n.op_type for n in lowered(model, [Delta()]).graph if n.domain == "onnxcomp.tvm")


class Streaming(Compiled):
    """Takes scalars as they are."""

    def bind(self, feed: Mapping[str, np.ndarray]) -> list[Any]:
        given = [tvm.runtime.tensor(np.asarray(feed[name])) for name in self.names if name in feed]
        return given + self._weights


def on_target(model: ir.Model, feeds: Feeds) -> list[Any]:
    """The first output of every step, state carried."""
    working = lowered(model, [Delta(), Products(machine=BEST)])
    states = model_state(working)
    names = [str(v.name) for v in working.graph.outputs]
    compiled = Streaming(working, [], BEST)
    carried = {s.input: s.zeros() for s in states}
    results = []
    for feed in feeds:
        found = dict(zip(names, compiled.run({**feed, **carried}), strict=True))
        carried = {s.input: found[s.output] for s in states}
        results.append(found[names[0]])
    return results


def mlp(rows: int = 1, **gemm: Any) -> ir.Model:
    """Two products that read one input, one of them a Gemm with a bias, and a sum that reads it as well."""
    b = Builder()
    x = b.op("Relu", b.input("x", [rows, 256]))
    weight = b.const((b.rng.normal(size=(256, 256)) / 16).astype(np.float32))
    one = b.op("MatMul", x, weight, name="one")
    two = b.op("Gemm", x, weight, b.floats(256), name="two", **gemm)
    return b.output(b.op("Sum", one, two, x)).output(two).model()


@pytest.mark.parametrize(("rows", "gemm"), [(1, {"transB": 1}), (3, {})])
def test_products_read_changed_inputs(rows: int, gemm: dict[str, int]) -> None:
    dense, feeds = mlp(rows, **gemm), walk(40, (rows, 256), share=0.1)
    for threshold in (0.0, 0.5):
        step, _ = delta(dense, feeds, threshold=threshold)
        assert ours(step) == {"DeltaMatMul": 2}
        assert largest(on_target(step, feeds), stream(step, feeds)) < 1e-5


def test_integer_weights() -> None:
    dense, feeds = mlp(), walk(40, (1, 256), share=0.1)
    step, _ = delta(dense, feeds, threshold=0.0, weights="int8")
    assert largest(on_target(step, feeds), stream(step, feeds)) < 1e-5


def test_rounded_inputs() -> None:
    dense, feeds = mlp(), walk(40, (1, 256), share=0.1)
    step, _ = delta(dense, feeds, threshold=0.02, semantics="quantized")
    assert largest(on_target(step, feeds), stream(step, feeds)) < 1e-5


def test_a_nan_leaves_the_sums_with_the_input_that_it_came_with() -> None:
    dense, feeds = mlp(), walk(6, (1, 256), share=0.1)
    step, _ = delta(dense, feeds, threshold=0.0)
    broken = [dict(feed) for feed in feeds]
    broken[2]["x"] = broken[2]["x"].copy()
    broken[2]["x"][0, :3] = np.nan, np.inf, -np.inf
    found = on_target(step, broken)
    assert not np.isfinite(found[2]).any()
    assert largest(found[3:], stream(step, feeds)[3:]) < 1e-5


@pytest.mark.parametrize("op_type", ["GRU", "LSTM"])
def test_cells(op_type: str) -> None:
    names = {"h": "h_next", "c": "c_next"} if op_type == "LSTM" else {"h": "h_next"}
    dense = api.rewrite(recurrent(op_type, 64, 96), None, recipe=[Carry(state=names)]).model
    feeds = walk(40, (1, 1, 64), share=0.1)
    for threshold in (0.0, 0.05):
        step, _ = delta(dense, feeds, threshold=threshold)
        for node in step.graph:
            node.metadata_props.pop(SPARSITY, None)
        assert ours(step)[f"Delta{op_type.capitalize()}"] == 1
        # An element that differs by the threshold, but for the last bit, is sent by one of both.
        assert largest(on_target(step, feeds), stream(step, feeds)) < (0.1 if threshold else 1e-4)


def test_without_kernels_for_maps_their_holds_are_taken_away_with_their_state() -> None:
    step, _ = delta(cnn(), frames(8), threshold=0.05)
    left = lowered(step, [Delta(maps=False)])
    assert model_state(step)
    assert not model_state(left)
    assert not [n for n in left.graph if n.domain.startswith("onnxcomp")]
