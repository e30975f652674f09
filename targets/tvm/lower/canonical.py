"""Brings what exporters spell with many ops into one form: activations, norms, softmax, scaled products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.edit import Editor, attribute, bypass, constant, sole_reader
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.tvm.lower import _canonical_activations as activations
from onnxcomp.targets.tvm.lower import _canonical_norms as norms
from onnxcomp.targets.tvm.lower import _canonical_scales as scales
from onnxcomp.targets.tvm.nodes import replace


@dataclass(frozen=True, kw_only=True)
class Canonical(Pass):
    """Makes `Activate`, `LayerNorm`, `RmsNorm` and `Softmax` of single ops and of their usual decompositions."""

    name: ClassVar[str] = "tvm_canonical"
    summary: ClassVar[str] = "Activations, norms and softmax as one node each."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits: list[Edit] = []
        editor = Editor(model)
        for node in list(model.graph):
            for step in (_norm, _softmax, _scaled):
                if (edit := step(editor, node)) is not None:
                    edits.append(edit)
                    break
        # From the end, so that a whole activation is found before a part of it.
        for node in reversed(list(model.graph)):
            if node.domain == "" and _is_read(node) and (found := activations.find(node)) is not None:
                edits.append(applied(node, f"{found.kind} as one node"))
                given = {"activation": found.kind, "alpha": found.alpha, "beta": found.beta}
                replace(node, "Activate", [found.source], given)
        common_passes.RemoveUnusedNodesPass()(model)
        return edits


def _is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)


def _norm(editor: Editor, node: ir.Node) -> Edit | None:
    found = norms.find(node)
    if found is None:
        return None
    scale = found.scale or editor.weight(f"{found.last.name}_ones", np.ones(found.n, np.float32))
    edit = applied(found.last, "a norm as one node")
    inputs = [found.source, scale, found.bias]
    replace(found.last, "LayerNorm" if found.centred else "RmsNorm", inputs, {"epsilon": found.epsilon})
    return edit


def _softmax(editor: Editor, node: ir.Node) -> Edit | None:
    if node.domain or node.op_type != "Softmax" or node.inputs[0] is None:
        return None
    source, axis = node.inputs[0], attribute(node, "axis", -1)
    rank = None if source.shape is None else source.shape.rank()
    if source.dtype != ir.DataType.FLOAT or not rank or axis not in (-1, rank - 1):
        return None
    mask, scale = None, 1.0
    if (split := _masked(source)) is not None:
        source, mask = split
    if (scaled := scaled_by(source)) is not None and scaled[1] > 0:
        source, scale = scaled
    edit = applied(node, "a softmax as one node")
    replace(node, "Softmax", [source, mask], {"scale": scale})
    return edit


def _masked(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Scores and mask that `value` is the sum of."""
    node = value.producer()
    if node is None or node.op_type != "Add" or node.domain or sole_reader(value) is None:
        return None
    for index in (0, 1):
        scores, mask = node.inputs[index], node.inputs[1 - index]
        if scores is None or mask is None or scores.producer() is None or mask.dtype != ir.DataType.FLOAT:
            continue
        if _equal(scores.shape, value.shape) and _spreads(mask.shape, value.shape):
            return scores, mask
    return None


def scaled_by(value: ir.Value) -> tuple[ir.Value, float] | None:
    """What `value` is a constant multiple of, and the factor, if nothing else reads `value`."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Mul", "Div") or sole_reader(value) is None:
        return None
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        source, factor = node.inputs[index], constant(node.inputs[1 - index])
        if source is None or factor is None or factor.size != 1 or factor.ndim > 1 or source.dtype != value.dtype:
            continue
        number = float(factor.reshape(-1)[0])
        return source, number if node.op_type == "Mul" else 1 / number
    return None


def _equal(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    return a is not None and b is not None and known(a) and list(a) == list(b)


def _spreads(mask: ir.Shape | None, shape: ir.Shape | None) -> bool:
    """Whether a mask is spread over `shape` along whole axes, and not along the last one."""
    if mask is None or shape is None or not known(mask) or not 0 < mask.rank() <= shape.rank():
        return False
    pairs = zip(reversed(list(mask)), reversed(list(shape)), strict=False)
    return mask[-1] == shape[-1] and all(m == s or m == 1 for m, s in pairs)


def known(shape: ir.Shape) -> bool:
    """Whether every dimension has a size or a name."""
    return not any(isinstance(d, ir.SymbolicDim) and d.value is None for d in shape)


def _scaled(editor: Editor, node: ir.Node) -> Edit | None:
    if scales.fold(editor, node) is None:
        return None
    edit = applied(node, "a constant factor went into the weight")
    source = next(v for v in node.inputs if v is not None and constant(v) is None)
    bypass(node, source, rename=True)
    return edit
