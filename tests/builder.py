"""Builds small models for tests, value by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

X_SCALE = 0.05


class Builder:
    """Collects nodes; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.metadata: dict[str, str] = {}
        self.rng = np.random.default_rng(0)
        self.scales = np.ones(1, np.float32)

    def input(self, name: str, shape: list[Any], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, dtype: int = TensorProto.FLOAT) -> Builder:
        self.outputs.append(helper.make_tensor_value_info(value, dtype, None))
        return self

    def const(self, array: npt.ArrayLike, name: str = "") -> str:
        name = name or f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def qdq(self, x: str, scale: float = X_SCALE, zero: int = 128, dtype: Any = np.uint8, bits: int = 8) -> str:
        parameters = self.const(np.float32(scale)), self.const(dtype(zero))
        q = self.op("QuantizeLinear", x, *parameters)
        if bits < 8:
            q = self.op("Clip", q, self.const(dtype(0)), self.const(dtype(2**bits - 1)))
        return self.op("DequantizeLinear", q, *parameters)

    def weight(self, shape: tuple[int, ...], axis: int, name: str = "") -> str:
        self.scales = self.rng.uniform(0.005, 0.01, shape[axis]).astype(np.float32)
        q = self.const(self.rng.integers(-127, 128, shape).astype(np.int8), name)
        zero = self.const(np.zeros(shape[axis], np.int8))
        return self.op("DequantizeLinear", q, self.const(self.scales), zero, axis=axis)

    def bias(self, error: float = 1.0) -> str:
        scale = self.scales * np.float32(X_SCALE) * np.float32(error)
        q = self.const(self.rng.integers(-500, 500, len(scale)).astype(np.int32))
        return self.op("DequantizeLinear", q, self.const(scale), self.const(np.zeros(len(scale), np.int32)), axis=0)

    def floats(self, *shape: int) -> str:
        return self.const(self.rng.normal(size=shape).astype(np.float32))

    def conv(self, x: str, name: str = "conv", **attributes: Any) -> str:
        return self.op("Conv", x, self.weight((8, 8, 3, 3), 0), self.bias(), name=name, pads=[1, 1, 1, 1], **attributes)

    def matmul(self, x: str, name: str = "matmul") -> str:
        return self.op("MatMul", x, self.weight((16, 32), 1), name=name)

    def image(self) -> str:
        return self.qdq(self.input("x", [1, 8, 16, 16]))

    def model(self, opset: int = 17) -> ir.Model:
        graph = helper.make_graph(self.nodes, "test", self.inputs, self.outputs, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        helper.set_model_props(proto, self.metadata)
        return ir.from_proto(proto)
