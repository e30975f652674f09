"""Turns N:M products into products by plain weights, zeros included, in which a GPU finds the pattern by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, become, constant
from onnxcomp.model import infer_shapes
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.target import Array
from onnxcomp.targets.ort.dense_forms import later
from onnxcomp.targets.ort.nm_calls import NmCall, drop_uncalled, is_nm_call, nm_call


@dataclass(frozen=True, kw_only=True)
class PlainNm(Pass):
    """Makes N:M products MatMul by the weight with its zeros.

    A float weight gets the type of the inputs. Integers stay int8 behind a DequantizeLinear with a scale a column and
    zero point 0, so that what was zero is the integer 0. Only for a call that is to be exact they become floats, since
    onnxruntime may fuse that node into a product which rounds inputs to 8 bits.
    """

    name: ClassVar[str] = "plain_nm"
    summary: ClassVar[str] = "N:M products to products by plain weights with zeros."

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        nodes = [node for node in model.graph.all_nodes() if is_nm_call(node)]
        if any(_input_type(node) is None for node in nodes):
            infer_shapes(model)
        edits = []
        plain: dict[tuple[object, ...], ir.Value] = {}
        for node in nodes:
            call, dtype = nm_call(node), _input_type(node)
            if isinstance(call, str):
                edits.append(refused(node, call))
            elif dtype is None:
                edits.append(refused(node, "the type of its inputs is not known; it runs by its function body"))
            else:
                as_floats = not call.int8 or bool(attribute(node, "exact", 0))
                key = (*call.parts, call.m, call.k, dtype, as_floats)
                if key not in plain:
                    plain[key] = (_floats if as_floats else _integers)(model, call, dtype)
                become(node, "MatMul", [node.inputs[0], plain[key]])
                edits.append(applied(node, f"multiplies by the plain weight, whose {call.pattern} zeros are stored"))
        drop_uncalled(model)
        return edits


def _input_type(node: ir.Node) -> ir.DataType | None:
    return None if node.inputs[0] is None else node.inputs[0].dtype


def _floats(model: ir.Model, call: NmCall, dtype: ir.DataType) -> ir.Value:
    """The weight in the type of the inputs, unpacked when it is read."""

    def read() -> Array:
        weight = call.weight()
        if call.int8:
            weight = weight.astype(np.float32) * _scale(call)
        return weight.astype(dtype.numpy())

    return later(Editor(model), f"{call.parts[0].name}_plain", read, dtype, (call.k, call.n))


def _integers(model: ir.Model, call: NmCall, dtype: ir.DataType) -> ir.Value:
    """Integers, unpacked when they are read, and what makes them floats of the type of the inputs."""
    editor, name, scale = Editor(model), f"{call.parts[0].name}_plain", call.parts[2]
    stored = later(editor, name, call.weight, ir.DataType.INT8, (call.k, call.n))
    if scale.dtype != ir.DataType.FLOAT:
        scale = later(editor, f"{scale.name}_float", lambda: _scale(call), ir.DataType.FLOAT, (call.n,))
    found = editor.after(
        stored,
        "DequantizeLinear",
        [stored, scale],
        name=f"{name}_dequantized",
        attributes={"axis": 1},
        like=stored,
        dtype=ir.DataType.FLOAT,
    )
    if dtype == ir.DataType.FLOAT:
        return found
    # Multiplied in float32 and rounded once, as the op says: a scale may be too small for float16.
    return editor.after(
        found, "Cast", [found], name=f"{name}_cast", attributes={"to": int(dtype)}, like=found, dtype=dtype
    )


def _scale(call: NmCall) -> Array:
    array = constant(call.parts[2])
    assert array is not None
    return array.astype(np.float32)
