"""Recurrent cells of streaming models as native ops, and back as the GRU or LSTM that they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.edit import Editor, constant, hand_over
from onnxcomp.ops import SPARSITY
from onnxcomp.target import Array
from onnxcomp.targets.ort.delta_states import StreamStates
from onnxcomp.targets.ort.dense_forms import later

CELLS = {"DeltaGRU": "GRU", "DeltaLSTM": "LSTM"}
_GATES = {"DeltaGRU": 3, "DeltaLSTM": 4}
_FEWEST_WEIGHTS = 1 << 15  # below that the runtime's own cell takes no longer than the call of an op
_MOST_CHANGED = 0.8


def why_no_cell(model: ir.Model, node: ir.Node) -> str:
    """Why a portable cell is left to the runtime; empty if the kernel takes it."""
    w, r, b = node.inputs[-3:]
    if node.graph is not model.graph:
        return "it stands in a branch, where state cannot be updated in place"
    if any(constant(v) is None for v in (w, r, b)):
        return "its weights are computed; the pass cleanup may make them constants"
    x = node.inputs[0]
    if x is None or x.dtype != ir.DataType.FLOAT or x.shape is None or not all(isinstance(d, int) for d in x.shape):
        return "the kernel takes floats of a known shape"
    assert w is not None
    assert r is not None
    if w.shape is not None and r.shape is not None and _count(w) + _count(r) < _FEWEST_WEIGHTS:
        return f"it has only {_count(w) + _count(r)} weights"
    changed = 1 - float(node.metadata_props.get(SPARSITY, 1.0))
    if changed > _MOST_CHANGED:
        return f"{changed:.0%} of its inputs change, and the kernel is faster up to {_MOST_CHANGED:.0%}"
    return ""


def lower_cell(model: ir.Model, editor: Editor, states: StreamStates, node: ir.Node) -> None:
    """Makes a portable cell a native one; its sums become state, and its weights lie by inputs."""
    gates = _GATES[node.op_type]
    w, r, b = (v for v in node.inputs[-3:] if v is not None)
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    hidden = _count(r) // _shape(r)[1]
    batch = int(x.shape[1]) if isinstance(x.shape[1], int) else 1
    columns = gates * hidden
    weights = [
        later(editor, f"{v.name}_inputs", _turned(v), ir.DataType.FLOAT, (_shape(v)[2], columns)) for v in (w, r)
    ]
    name = node.name or node.op_type
    cells = node.inputs[: 3 if gates == 4 else 2]
    lasts = node.inputs[len(cells) : len(cells) + 2]
    thresholds = [editor.weight(f"{name}_level", np.ravel(_known(v)).astype(np.float32)) for v in node.inputs[-5:-3]]
    both = np.split(_known(b)[0].astype(np.float32), 2)
    biases = both if gates == 3 else [both[0] + both[1]]
    sums = [states.new(f"{name}_sum", (1, batch, columns)) for _ in range(5 - gates)]  # of x and h, or of both
    inputs = [*cells, *lasts, *sums, *thresholds, *weights, *(editor.weight(f"{name}_bias", v) for v in biases)]
    outputs = [ir.Value(name=editor.free(f"{v.name}_native")) for v in node.outputs]
    for new, old in zip(outputs, node.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    sent = [ir.Value(name=editor.free(f"{name}_sums"), type=ir.TensorType(ir.DataType.FLOAT)) for _ in sums]
    made = ir.node(
        node.op_type, inputs, domain=native.DOMAIN, outputs=[*outputs, *sent], name=editor.free_node(f"{name}_native")
    )
    made.metadata_props.update(node.metadata_props)
    model.graph.insert_after(node, made)
    for old, new in zip(node.outputs[:-2], outputs[:-2], strict=True):
        hand_over(old, new)
    for last, old, new in zip(lasts, node.outputs[-2:], outputs[-2:], strict=True):
        assert last is not None
        assert last.shape is not None
        states.take_over(last, old, new, tuple(int(d) for d in last.shape if isinstance(d, int)))
    for read, value in zip(sums, sent, strict=True):
        states.put(read, value)
    model.graph.remove(node, safe=True)


def restore_cell(model: ir.Model, node: ir.Node) -> None:
    """Makes a portable cell, whose state is not carried any more, a GRU or LSTM."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    lstm = CELLS[node.op_type] == "LSTM"
    x, h = node.inputs[:2]
    w, r, b = node.inputs[-3:]
    assert r is not None
    size = node.outputs[0].shape
    hidden = int(size[2]) if size is not None and isinstance(size[2], int) else _shape(r)[2]
    attributes: dict[str, int] = {"hidden_size": hidden}
    if not lstm:
        attributes["linear_before_reset"] = 1
    editor = Editor(model, graph)
    outputs = [ir.Value(name=editor.free(f"{node.name}_{what}")) for what in ("all", "h", "c")[: 2 + lstm]]
    inputs = [x, w, r, b, None, h, *([node.inputs[2]] if lstm else [])]
    cell = ir.node(CELLS[node.op_type], inputs, attributes, outputs=outputs, name=editor.free_node(f"{node.name}_cell"))
    cell.metadata_props.update({k: v for k, v in node.metadata_props.items() if k != SPARSITY})
    graph.insert_after(node, cell)
    for old, new in zip(node.outputs[:-2], outputs[1:], strict=True):
        new.type, new.shape = old.type, old.shape
        hand_over(old, new)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    graph.remove(node)


def _turned(value: ir.Value) -> Callable[[], Array]:
    return lambda: np.ascontiguousarray(_known(value)[0].T)


def _known(value: ir.Value | None) -> Array:
    array = constant(value)
    assert array is not None
    return array


def _shape(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(d) for d in value.shape if isinstance(d, int)]


def _count(value: ir.Value) -> int:
    return int(np.prod(_shape(value)))
