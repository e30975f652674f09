"""N:M products become nodes of ours, or dense products where there is no kernel for them.

`NmMatMul(x, values, places, scale)` with attributes `n` and `kept`; see `onnxcomp.targets.tvm.kernels.nm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, become
from onnxcomp.ops import NM_OPS
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.target import Array
from onnxcomp.targets.ort.dense_forms import drop_unused
from onnxcomp.targets.ort.lowering import fixed_rows
from onnxcomp.targets.ort.nm_calls import NmCall, is_nm_call, nm_call
from onnxcomp.targets.ort.nm_lowering import nm_blocks
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels import nm
from onnxcomp.targets.tvm.lower.sparse import drop_functions, known
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed, replace

_MOST_ROWS = {1: 256, 2: 48}
"""Rows up to which the kernel for so many weights of four is faster than a dense one, whose weight is larger."""

_MOST_ROWS_OF_GPU = {1: 48, 2: 16}
"""The same for a GPU, reckoned: dense tiles share what they read among more threads."""


@dataclass(frozen=True, kw_only=True)
class Nm(Pass):
    """`NMMatMul` of the main graph with 1:4, 2:4 or what keeps to these; all others become dense products.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_nm"
    summary: ClassVar[str] = "N:M products to kernels."
    machine: Machine

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits = []
        lowered: dict[tuple[object, ...], list[ir.Value]] = {}
        editor = Editor(model)
        for node in list(model.graph):
            if not is_nm_call(node):
                continue
            call = _call(node)
            if isinstance(call, str):
                edits.append(refused(node, call))
                continue
            reason = self._why_dense(call)
            key = (*call.parts, bool(reason))
            if key not in lowered:
                lowered[key] = [_dense(editor, call)] if reason else self._blocks(editor, call)
            if reason:
                become(node, "MatMul", [node.inputs[0], *lowered[key]])
                edits.append(applied(node, f"runs as a dense product: {reason}"))
            else:
                replace(node, "NmMatMul", [node.inputs[0], *lowered[key]], {"n": call.n, "kept": call.kept})
                edits.append(applied(node, f"reads {call.kept} of 4 weights"))
        drop_unused(model)
        drop_functions(model, NM_OPS)
        return edits

    def _why_dense(self, call: NmCall) -> str:
        if call.kept is None:
            return f"there are kernels for 1:4, 2:4 and what keeps to these, not for {call.pattern}"
        if not nm.selects(self.machine):
            return "the machine has no instruction that selects among four floats"
        if attribute(call.node, "exact", 0) and nm.rounds(self.machine, "int8"):
            return "it is exact, and the kernel rounds activations to 8 bits"
        rows = fixed_rows(call.node)
        most = (_MOST_ROWS_OF_GPU if isinstance(self.machine, Gpu) else _MOST_ROWS)[call.kept]
        if rows > most and not nm.rounds(self.machine, _dtype(call)):
            return f"it has {rows} rows, and the kernel is taken to be faster up to {most}"
        return ""

    def _blocks(self, editor: Editor, call: NmCall) -> list[ir.Value]:
        """Values, places and scales, the first two computed when they are written."""
        assert call.kept is not None
        kept, name, dtype = call.kept, call.parts[0].name or "weight", _dtype(call)
        by_slot = dtype == "int8" and not nm.rounds(self.machine, dtype)

        def stored(index: int) -> Callable[[], Array]:
            def read() -> Array:
                array = nm_blocks(call.weight(), kept)[index]
                if index == 0 and by_slot:  # `nm_blocks` puts integers by column
                    return array.reshape(*array.shape[:2], nm.COLUMNS, nm.QUAD).swapaxes(2, 3).reshape(array.shape)
                return array

            return read

        shape = (-(-call.n // nm.COLUMNS), nm.quads(call.k, kept))
        scale = np.ones(call.n, np.float32) if not call.int8 else known(call.parts[2]).astype(np.float32)
        return [
            packed(editor, f"{name}_blocked", (*shape, nm.QUAD * nm.COLUMNS), np.dtype(dtype), stored(0)),
            packed(editor, f"{name}_places", (*shape, nm.COLUMNS), np.dtype(np.uint8), stored(1)),
            editor.weight(f"{name}_scale", np.pad(scale, (0, -call.n % nm.COLUMNS))),
        ]


def _dtype(call: NmCall) -> str:
    dtype = call.parts[0].dtype
    assert dtype is not None
    return dtype.numpy().name


def _call(node: ir.Node) -> NmCall | str:
    """What a kernel could compute, or why a node has to run by the body of its function."""
    x = node.inputs[0]
    if x is None or x.dtype not in (ir.DataType.FLOAT, None):
        return "the kernels take float activations; it runs by its function body"
    if x.dtype is None or x.shape is None or not isinstance(x.shape[-1], int):
        return "type or shape of its activations is not known; it runs by its function body"
    return nm_call(node)


def _dense(editor: Editor, call: NmCall) -> ir.Value:
    """The weight as a matrix of floats, computed when it is written."""

    def read() -> Array:
        weight = call.weight().astype(np.float32)
        return weight * known(call.parts[2]).astype(np.float32) if call.int8 else weight

    return packed(editor, f"{call.parts[0].name}_dense", (call.k, call.n), np.dtype(np.float32), read)
