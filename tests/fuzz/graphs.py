"""Random valid graphs with everything that exporters and people do to them.

Values are known with their real shape; what the file says about them is drawn apart: dimensions may be symbolic, types
missing, names empty or taken twice. Every choice is an integer below a bound, so that hypothesis can shrink a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

T = TypeVar("T")
Shape = tuple[int, ...]
OPSETS = (9, 11, 13, 17, 21)


class Graph:
    """A graph in the making.

    Args:
        draw: Gives an integer from 0 up to its argument, the argument left out.
        outer: The graph around this one, whose values it may read.
    """

    def __init__(self, draw: Callable[[int], int], opset: int, outer: Graph | None = None) -> None:
        self.draw = draw
        self.opset = opset
        self.outer = outer
        self.root: Graph = self if outer is None else outer.root
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: dict[str, Shape] = {} if outer is None else dict(outer.values)
        self.made: dict[str, Shape] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0

    def pick(self, options: Sequence[T]) -> T:
        return options[self.draw(len(options))]

    def chance(self, percent: int) -> bool:
        """Low numbers are the plain case, which shrinking ends at."""
        return self.draw(100) >= 100 - percent

    def name(self, prefix: str) -> str:
        self.root.count += 1
        return f"{prefix}{self.root.count}"

    def array(self, shape: Shape) -> np.ndarray:
        seed = self.draw(1 << 16)
        plain = self.draw(4)
        if plain == 3:
            return np.full(shape, self.pick([0.0, 1.0]), np.float32)
        return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)

    def const(self, array: Any, prefix: str = "w") -> str:
        """A constant: an initializer, or the output of a Constant node."""
        array = np.asarray(array)
        name = self.name(prefix)
        tensor = numpy_helper.from_array(array, name)
        if self.chance(25):
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.weights.append(tensor)
        return name

    def value(self, rank: int | None = None) -> str | None:
        """Any value of the rank; recent ones first, so that graphs are deep."""
        fitting = [v for v, shape in self.values.items() if rank is None or len(shape) == rank]
        if not fitting:
            return None
        return fitting[-1] if self.draw(10) < 6 else self.pick(fitting)

    def op(
        self, op_type: str, inputs: Sequence[str], shape: Shape | None, *, outputs: int = 1, **attributes: Any
    ) -> Any:
        names = [self.name("v") for _ in range(outputs)]
        label = self.pick(["", "", self.name("n"), self.name(f"/a/{op_type}")])
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=label, domain=domain, **attributes))
        if shape is not None:
            self.add(names[0], shape)
        return names if outputs > 1 else names[0]

    def add(self, name: str, shape: Shape) -> str:
        self.values[name] = self.made[name] = shape
        return name

    def axes(self, op_type: str, x: str, axes: Sequence[int], shape: Shape | None, since: int = 13, **more: Any) -> str:
        """An op whose axes became an input in opset `since`."""
        if self.opset >= since:
            return str(self.op(op_type, [x, self.const(np.array(axes, np.int64))], shape, **more))
        return str(self.op(op_type, [x], shape, axes=list(axes), **more))


def random_model(draw: Callable[[int], int], steps: int) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A model and two feeds; onnxruntime runs it unless the draws were unlucky.

    Args:
        draw: Gives an integer from 0 up to its argument, the argument left out.
        steps: Most ops to add.
    """
    from tests.fuzz.blocks import MAKERS

    graph = Graph(draw, OPSETS[draw(len(OPSETS))])
    shapes = [graph.pick([(2, 4), (3, 4, 4), (1, 4, 6, 6), (2, 3, 5, 5)]) for _ in range(1 + draw(2))]
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)]
    for spec, shape in zip(inputs, shapes, strict=True):
        graph.values[spec.name] = shape
    for _ in range(1 + draw(steps)):
        MAKERS[draw(len(MAKERS))](graph)
    if not graph.made:
        graph.op("Abs", ["x0"], shapes[0])
    return _finish(graph, inputs, shapes)


def _finish(
    graph: Graph, inputs: list[onnx.ValueInfoProto], shapes: list[Shape]
) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    made = list(graph.made)
    wanted = dict.fromkeys([made[-1], *(graph.pick(made) for _ in range(graph.draw(3)))])
    outputs = [_info(graph, name, graph.made[name]) for name in wanted]
    random = np.random.default_rng(graph.draw(1 << 16))
    feeds = [
        {s.name: random.normal(size=d).astype(np.float32) for s, d in zip(inputs, shapes, strict=True)} for _ in "ab"
    ]
    for spec in inputs:
        if graph.chance(40):  # the first dimension is open
            spec.type.tensor_type.shape.dim[0].dim_param = graph.pick(["n", "n", f"{spec.name}_n", ""])
    defaults = [w for w in graph.weights if w.data_type == TensorProto.FLOAT]
    if defaults and graph.chance(30):  # a weight that the caller may override
        weight = graph.pick(defaults)
        inputs.append(helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
        feeds[1][weight.name] = random.uniform(0.5, 1.5, list(weight.dims)).astype(np.float32)
    if graph.chance(20):
        graph.weights.append(numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    proto = helper.make_graph(graph.nodes, graph.pick(["g", ""]) or "g", inputs, outputs, graph.weights)
    for name in made:
        if graph.chance(30):
            proto.value_info.append(_info(graph, name, graph.made[name]))
    if graph.chance(20):
        order = np.random.default_rng(graph.draw(1 << 16)).permutation(len(proto.node))
        nodes = [proto.node[i] for i in order]
        del proto.node[:]
        proto.node.extend(nodes)
    imports = [helper.make_opsetid("", graph.opset)]
    if graph.functions:
        imports.append(helper.make_opsetid("local", 1))
    model = helper.make_model(
        proto, opset_imports=imports, ir_version=graph.pick([8, 9, 10]), functions=graph.functions
    )
    return model, feeds


def _info(graph: Graph, name: str, shape: Shape) -> onnx.ValueInfoProto:
    """What the file says of a value: no more than is true for every feed."""
    kind = graph.draw(3)
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None if kind == 0 else [None] * len(shape))
