"""Calls of the sparse portable ops: inputs of every format, models, and how far a result may be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.ops import DOMAIN, GROUP, OPS

Array = np.ndarray[Any, np.dtype[Any]]

FORMATS = ("", "Int8", "Int4")
OP_TYPES = [op + suffix for op in ("ThresholdMatMul", "TopKMatMul", "GatedMLP") for suffix in FORMATS]

# Rounding activations to 8 bits moves an output by up to 1 % of the root of the sum of squares of its products, and by
# 2 % where two products follow one another. Without rounding it is single precision.
ROUNDED, ROUNDED_TWICE, EXACT = 0.01, 0.02, 2e-5


@dataclass(frozen=True)
class Call:
    """A call of a portable op: inputs in order, of which `activations` are fed and the others stored."""

    op_type: str
    inputs: Mapping[str, Array]
    attributes: Mapping[str, int]

    @property
    def activations(self) -> dict[str, Array]:
        return {name: array for name, array in self.inputs.items() if name in ("A", "X", "threshold")}

    def with_inputs(self, **changes: Array) -> Call:
        return Call(self.op_type, {**self.inputs, **changes}, self.attributes)

    def reference(self, dtype: type = np.float64) -> Array:
        """The numpy reference; activations in `dtype`, so that the sums are."""
        inputs = [a.astype(dtype) if name in self.activations else a for name, a in self.inputs.items()]
        return OPS[self.op_type].reference(*inputs, **self.attributes)

    def spread(self) -> Array:
        """Root of the sum of squares of the products that an output is the sum of: what rounding is measured by."""
        inputs = [a.astype(np.float64) for a in self._float_weights().inputs.values()]
        if self.op_type.startswith("GatedMLP"):
            a, x, u, d, threshold = inputs
            kept = OPS["ThresholdMatMul"].reference(a, np.eye(a.shape[-1]), threshold, **self._selection())
            return np.sqrt((kept**2 * (x**2 @ u**2)) @ d**2)
        x, w, *rest = inputs
        kept = OPS[_base(self.op_type)].reference(x, np.eye(x.shape[-1]), *rest, **self._selection())
        return np.sqrt(kept**2 @ w**2)

    def _selection(self) -> dict[str, int]:
        return {name: value for name, value in self.attributes.items() if name != "exact"}

    def _float_weights(self) -> Call:
        """The same with fp32 weights."""
        inputs: dict[str, Array] = {}
        for name, array in self.inputs.items():
            if name.endswith(("_scale", "_zero_point")):
                continue
            scale, zero = self.inputs.get(f"{name}_scale"), self.inputs.get(f"{name}_zero_point")
            if zero is not None and scale is not None:
                codes = np.stack([array & 15, array >> 4], -1).reshape(*scale.shape, GROUP).astype(np.float64)
                array = ((codes - zero[..., None]) * scale[..., None].astype(np.float64)).reshape(len(array), -1)
                array = array.T if name == "U" else array
            elif scale is not None:
                array = array.astype(np.float64) * scale
            inputs[name] = array
        return Call(_base(self.op_type), inputs, self.attributes)


def _base(op_type: str) -> str:
    return op_type.removesuffix("Int8").removesuffix("Int4")


def weight(
    rng: np.random.Generator, suffix: str, name: str, shape: tuple[int, int], variant: int = 0
) -> dict[str, Array]:
    """Inputs of a weight; `variant` 0 to 3 makes scales of 4-bit weights fp16 or fp32, zero points scalar or not."""
    if suffix == "":
        return {name: rng.standard_normal(shape).astype(np.float32)}
    if suffix == "Int8":
        scale = rng.uniform(0.005, 0.02, shape[1]).astype(np.float32)
        return {name: rng.integers(-128, 128, shape).astype(np.int8), f"{name}_scale": scale}
    groups = (shape[0], shape[1] // GROUP)
    zero = np.array(8) if variant < 2 else rng.integers(0, 16, groups)
    return {
        name: rng.integers(0, 256, (shape[0], shape[1] // 2)).astype(np.uint8),
        f"{name}_scale": rng.uniform(0.01, 0.1, groups).astype(np.float32 if variant % 2 else np.float16),
        f"{name}_zero_point": zero.astype(np.uint8),
    }


def make_call(
    op_type: str, k: int, n: int, *, batch: tuple[int, ...] = (1,), threshold: float = 0.5, count: int = 1,
    variant: int = 0, seed: int = 0, f: int = 0, **attributes: int,
) -> Call:  # fmt: skip
    """A call with normal inputs; `k` and `n` are rounded up to what 4-bit weights need, `f` is k unless given."""
    rng = np.random.default_rng(seed + 10007 * k + n)
    suffix = op_type.removeprefix(_base(op_type))
    n = n if suffix != "Int4" else -(-n // GROUP) * GROUP
    limit = {"threshold": np.array(threshold, np.float32)}
    if _base(op_type) == "GatedMLP":
        f = f or k
        k = k if suffix != "Int4" else -(-k // GROUP) * GROUP
        inputs = {
            "A": rng.standard_normal((*batch, f)).astype(np.float32),
            "X": rng.standard_normal((*batch, k)).astype(np.float32),
            **weight(rng, suffix, "U", (f, k) if suffix == "Int4" else (k, f), variant),
            **weight(rng, suffix, "D", (f, n), variant),
            **limit,
        }
        return Call(op_type, inputs, attributes)
    inputs = {"X": rng.standard_normal((*batch, k)).astype(np.float32), **weight(rng, suffix, "W", (k, n), variant)}
    if _base(op_type) == "TopKMatMul":
        return Call(op_type, inputs, {"k": count, **attributes})
    return Call(op_type, {**inputs, **limit}, attributes)


def portable(call: Call, *, opset: int = 18, output: int | None = None) -> ir.Model:
    """A model of the portable op; weights are initializers."""
    values = []
    for name, array in call.inputs.items():
        dtype = ir.DataType.from_numpy(array.dtype)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))
        if name not in call.activations:
            value.const_value = ir.tensor(array, name=name)
        values.append(value)
    node = ir.node(call.op_type, values, attributes=dict(call.attributes), domain=DOMAIN, name="sparse")
    node.outputs[0].name, node.outputs[0].type = "Y", ir.TensorType(ir.DataType.FLOAT)
    if output is not None:
        node.outputs[0].shape = ir.Shape([*values[0].shape[:-1], output])
    graph = ir.Graph(
        [v for v in values if v.const_value is None], node.outputs, nodes=[node],
        initializers=[v for v in values if v.const_value is not None], opset_imports={"": opset}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=9)
    OPS[call.op_type].install(model)
    return model


def session(model: ir.Model, *, threads: int = 1) -> Any:
    """A session, with the native library where the model uses it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native.DOMAIN in model.opset_imports:
        options.register_custom_ops_library(str(native.library_path()))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def tolerance(call: Call) -> float:
    """How far a kernel may be off, as a share of `Call.spread`."""
    if call.op_type == _base(call.op_type) or call.attributes.get("exact"):
        return EXACT
    return ROUNDED_TWICE if call.op_type.startswith("GatedMLP") else ROUNDED


def assert_close(actual: Array, call: Call, share: float) -> None:
    """Holds the whole output, as a vector, against the reference in double precision."""
    expected = call.reference()
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= share * np.linalg.norm(call.spread())
