"""One op many times over: models whose every node has weights of its own, so that those come from memory.

Input `x` has one row a node, or any number if asked, and `gates`, for a gated MLP, likewise; `threshold` is a scalar. A
model of dense ops takes the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.break_even import Weights
from onnxcomp.ops import GROUP
from onnxcomp.target import Array

MICROSOFT = "com.microsoft"
DENSE_BLOCK = 64
"""Columns of an 8-bit weight that share a scale in `MatMulNBits`, where that takes the place of a sparse op."""


class Builder:
    """Makes a model of `copies` nodes, each with a row of its own of every input, or as many as are given."""

    def __init__(self, copies: int, widths: Mapping[str, int], seed: int, *, any_rows: bool = False) -> None:
        self.copies, self.rng = copies, np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.inputs = [self._value(name, ("rows" if any_rows else copies, width)) for name, width in widths.items()]
        self.threshold = self._value("threshold", ())
        self.rows = {v.name: self.node("Split", [v], copies, {"axis": 0, "num_outputs": copies}) for v in self.inputs}

    def node(
        self, op: str, inputs: Sequence[ir.Value | None], outputs: int = 1, attributes: Mapping[str, int] | None = None,
        domain: str = "",
    ) -> Sequence[ir.Value]:  # fmt: skip
        """Adds a node; returns its outputs."""
        node = ir.node(op, inputs, num_outputs=outputs, attributes=attributes, domain=domain)
        for index, output in enumerate(node.outputs):
            output.name = f"v{len(self.nodes)}_{index}"
        self.nodes.append(node)
        return node.outputs

    def weight(self, array: Array) -> ir.Value:
        """Adds an initializer."""
        value = self._value(f"w{len(self.weights)}", array.shape, ir.DataType.from_numpy(array.dtype))
        value.const_value = ir.tensor(array, name=value.name)
        self.weights.append(value)
        return value

    def integers(self, shape: tuple[int, ...], dtype: type = np.uint8) -> Array:
        """Random integers, all that the type has."""
        return np.frombuffer(self.rng.bytes(int(np.prod(shape))), dtype).reshape(shape)

    def scales(self, shape: tuple[int, ...], dtype: type = np.float32) -> Array:
        """Random scales."""
        return np.asarray(self.rng.uniform(0.005, 0.02, shape), dtype)

    def model(self, results: Sequence[ir.Value]) -> bytes:
        """The model, serialised."""
        # One output: to hand over many takes longer than a small product.
        outputs = self.node("Concat", results, attributes={"axis": 0})
        outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        domains = {"": 20, MICROSOFT: 1, native.DOMAIN: 1}
        graph = ir.Graph(
            [*self.inputs, self.threshold], outputs, nodes=self.nodes, initializers=self.weights, opset_imports=domains,
            name="copies",
        )  # fmt: skip
        return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())

    @staticmethod
    def _value(name: str, shape: tuple[int | str, ...], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


Dense: TypeAlias = Callable[[Builder, ir.Value, int, int], ir.Value]
"""Adds a dense product of an input of so many columns and a weight of so many."""


@dataclass(frozen=True)
class Kind:
    """A type of weights.

    Attributes:
        name: Its name.
        size: Bytes of one weight with its share of scales.
        sparse: Adds the inputs that hold a weight of so many rows and columns to a sparse op.
        dense: The runtime's fastest product of such weights.
        equal: Type of weights to the runtime's fastest product whose activations are as exact as the sparse one's, not
            rounded to one grid a row.
    """

    name: Weights
    size: float
    sparse: Callable[[Builder, int, int], list[ir.Value]]
    dense: Dense
    equal: Mapping[Weights, Dense]


def _fp32_weight(b: Builder, k: int, n: int) -> list[ir.Value]:
    return [b.weight(b.rng.standard_normal((k, n), np.float32))]


def _fp32_dense(b: Builder, x: ir.Value, k: int, n: int) -> ir.Value:
    return b.node("MatMul", [x, *_fp32_weight(b, k, n)])[0]


def _int8_weight(b: Builder, k: int, n: int) -> list[ir.Value]:
    return [b.weight(b.integers((k, n), np.int8)), b.weight(b.scales((n,)))]


def _int8_dense(b: Builder, x: ir.Value, k: int, n: int) -> ir.Value:
    zero = b.weight(np.zeros(n, np.int8))
    return b.node("DynamicQuantizeMatMul", [x, *_int8_weight(b, k, n), zero], domain=MICROSOFT)[0]


def _int4_weight(b: Builder, k: int, n: int) -> list[ir.Value]:
    scale = b.weight(b.scales((k, n // GROUP), np.float16))
    return [b.weight(b.integers((k, n // 2))), scale, b.weight(np.array(8, np.uint8))]


def _blocks(b: Builder, x: ir.Value, k: int, n: int, bits: int, size: int) -> ir.Value:
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 4}
    count = -(-k // size)
    weights = [b.weight(b.integers((n, count, size * bits // 8))), b.weight(b.scales((n, count)))]
    return b.node("MatMulNBits", [x, *weights], attributes=attributes, domain=MICROSOFT)[0]


def _int4_dense(b: Builder, x: ir.Value, k: int, n: int) -> ir.Value:
    return _blocks(b, x, k, n, 4, GROUP)


def _eight_bit_blocks(b: Builder, x: ir.Value, k: int, n: int) -> ir.Value:
    return _blocks(b, x, k, n, 8, DENSE_BLOCK)


KINDS = {
    "fp32": Kind("fp32", 4, _fp32_weight, _fp32_dense, {"fp32": _fp32_dense}),
    "int8": Kind("int8", 1, _int8_weight, _int8_dense, {"int8": _eight_bit_blocks}),
    "int4": Kind("int4", 0.5 + 2 / GROUP, _int4_weight, _int4_dense, {"int8": _eight_bit_blocks, "int4": _int4_dense}),
}
SUFFIX = {"fp32": "", "int8": "Int8", "int4": "Int4"}


def dense_matmul(
    kind: Kind, k: int, n: int, copies: int, *, equal: Weights | None = None, any_rows: bool = False
) -> bytes:
    """The runtime's own product; one of `Kind.equal` if asked."""
    b = Builder(copies, {"x": k}, 1, any_rows=any_rows)
    product = kind.equal[equal] if equal else kind.dense
    return b.model([product(b, x, k, n) for x in b.rows["x"]])


def threshold_matmul(kind: Kind, k: int, n: int, copies: int, *, any_rows: bool = False) -> bytes:
    """Ours, skipping inputs below the threshold."""
    b = Builder(copies, {"x": k}, 2, any_rows=any_rows)
    op = f"ThresholdMatMul{SUFFIX[kind.name]}"
    return b.model([b.node(op, [x, *kind.sparse(b, k, n), b.threshold], domain=native.DOMAIN)[0] for x in b.rows["x"]])


def topk_matmul(kind: Kind, k: int, n: int, copies: int, count: int) -> bytes:
    """Ours, of the `count` largest inputs."""
    b = Builder(copies, {"x": k}, 3)
    op = f"TopKMatMul{SUFFIX[kind.name]}"
    return b.model(
        [b.node(op, [x, *kind.sparse(b, k, n)], attributes={"k": count}, domain=native.DOMAIN)[0] for x in b.rows["x"]]
    )


NM_COLUMNS, NM_QUAD = 16, 4
"""Columns of a block of an N:M weight as the kernels take it, and stored weights of a column taken at a time."""


NmWeights: TypeAlias = Literal["fp32", "fp16", "int8"]
"""Types of N:M weights that there are kernels for."""


def nm_matmul(weights: NmWeights, kept: int, k: int, n: int, copies: int, *, any_rows: bool = False) -> bytes:
    """Ours, with `kept` of every four weights stored."""
    b = Builder(copies, {"x": k}, 6, any_rows=any_rows)
    blocks, quads = -(-n // NM_COLUMNS), -(-k * kept // (4 * NM_QUAD))
    results: list[ir.Value] = []
    for x in b.rows["x"]:
        shape = (blocks, quads, NM_COLUMNS * NM_QUAD)
        values = b.integers(shape, np.int8) if weights == "int8" else b.rng.standard_normal(shape, np.float32)
        values = values.astype(np.float16) if weights == "fp16" else values
        inputs = [b.weight(values), b.weight(b.integers((blocks, quads, NM_COLUMNS))), b.weight(b.scales((n,)))]
        inputs += [b.weight(b.scales((n,)))] if weights == "int8" else []
        op = "NMMatMulInt8" if weights == "int8" else "NMMatMul"
        results += b.node(op, [x, *inputs], attributes={"kept": kept}, domain=native.DOMAIN)
    return b.model(results)


def dense_mlp(
    kind: Kind, k: int, f: int, copies: int, *, equal: Weights | None = None, any_rows: bool = False
) -> bytes:
    """Up projection, product with the gates, down projection."""
    b = Builder(copies, {"x": k, "gates": f}, 4, any_rows=any_rows)
    product = kind.equal[equal] if equal else kind.dense
    results = []
    for x, gate in zip(b.rows["x"], b.rows["gates"], strict=True):
        hidden = b.node("Mul", [gate, product(b, x, k, f)])[0]
        results.append(product(b, hidden, f, k))
    return b.model(results)


def gated_mlp(kind: Kind, k: int, f: int, copies: int, *, any_rows: bool = False) -> bytes:
    """Ours, of the neurons whose gate is beyond the threshold; the up projection turned as the kernel takes it."""
    b = Builder(copies, {"x": k, "gates": f}, 5, any_rows=any_rows)
    results = []
    for x, gate in zip(b.rows["x"], b.rows["gates"], strict=True):
        up = kind.sparse(b, f, k)
        if kind.name == "int8":
            up[1] = b.weight(b.scales((f,)))
        inputs = [gate, x, *up, *kind.sparse(b, f, k), b.threshold]
        results.append(b.node(f"GatedMLP{SUFFIX[kind.name]}", inputs, domain=native.DOMAIN)[0])
    return b.model(results)
