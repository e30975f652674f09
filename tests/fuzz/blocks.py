"""Graphs inside graphs: If, Loop and local functions, around the ops of `tests.fuzz.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.fuzz.graphs import Graph, Shape
from tests.fuzz.ops import BODY, binary, conv, layer_norm, matmul, pool, quantized, reduce, unary


def _body(g: Graph, shape: Shape, inputs: list[Any], result: str) -> Any:
    """A subgraph that ends in a value of the given shape and reads values around it."""
    inner = Graph(g.draw, g.opset, g)
    start = g.pick([v for v, s in g.values.items() if s == shape])
    for _ in range(g.draw(3)):
        BODY[g.draw(len(BODY))](inner)
    last = [v for v, s in inner.made.items() if s == shape]
    weight = inner.const(inner.array(shape))
    inner.nodes.append(helper.make_node("Add", [last[-1] if last else start, weight], [result]))
    return inner, helper.make_graph(
        inner.nodes, "body", inputs, [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)], inner.weights
    )


def branch(g: Graph) -> None:
    """An If; its condition is a constant, or computed from a value."""
    x = g.value()
    if x is None or g.outer is not None:
        return
    shape = g.values[x]
    condition = g.const(np.array(bool(g.draw(2))))
    if g.chance(50):
        total = g.op("ReduceMax", [x], None, keepdims=0)
        condition = g.op("Greater", [total, g.const(np.float32(0.3))], None)
    _, one = _body(g, shape, [], "r")
    _, two = _body(g, shape, [], g.pick(["r", "s"]))
    g.op("If", [condition], shape, then_branch=one, else_branch=two)


def loop(g: Graph) -> None:
    """A Loop of two rounds that carries one value."""
    x = g.value()
    if x is None or g.outer is not None:
        return
    shape = g.values[x]
    i, c, v, keep = g.name("i"), g.name("c"), g.name("carried"), g.name("keep")
    specs = [
        helper.make_tensor_value_info(i, TensorProto.INT64, []),
        helper.make_tensor_value_info(c, TensorProto.BOOL, []),
        helper.make_tensor_value_info(v, TensorProto.FLOAT, None),
    ]
    result = g.name("r")
    _, body = _body(g, shape, specs, result)
    body.node.append(helper.make_node("Identity", [c], [keep]))
    body.node.append(helper.make_node("Add", [result, v], [f"{result}_sum"]))
    body.output[0].name = f"{result}_sum"
    body.output.insert(0, helper.make_tensor_value_info(keep, TensorProto.BOOL, []))
    g.op("Loop", [g.const(np.array(2, np.int64)), "", x], shape, body=body)


def call(g: Graph) -> None:
    """A local function, called once or twice."""
    x = g.value()
    if x is None or g.outer is not None:
        return
    if not g.functions or g.chance(50):
        name = g.name("F")
        op = g.pick(["Relu", "Neg", "Tanh"])
        nodes = [helper.make_node(op, ["a"], ["t"]), helper.make_node("Add", ["t", "a"], ["b"])]
        g.functions.append(helper.make_function("local", name, ["a"], ["b"], nodes, [helper.make_opsetid("", g.opset)]))
    g.op(g.pick(g.functions).name, [x], g.values[x], domain="local")


MAKERS: list[Callable[[Graph], None]] = [
    *BODY, matmul, conv, conv, binary, unary, pool, reduce, layer_norm, quantized, branch, loop, call,
]  # fmt: skip
