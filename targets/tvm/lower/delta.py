"""Streaming models become nodes of ours, which compute changed pixels only, or read the weights of changed inputs only.

What a kernel adds changes to, or sent last, is state: inputs and outputs of the graph. The graph is edited as for the
native library; its ops then become ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp import native
from onnxcomp.edit import Editor
from onnxcomp.model import infer_shapes
from onnxcomp.ops import DELTA_OPS, DOMAIN
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.state import model_state, write_state
from onnxcomp.targets.ort.delta_lowering import dense_steps, lower_maps, lower_vectors, map_holds
from onnxcomp.targets.ort.delta_states import StreamStates
from onnxcomp.targets.ort.delta_strip import strip
from onnxcomp.targets.ort.dense_forms import drop_unused
from onnxcomp.targets.tvm.lower.delta_maps import MAP_OPS, replace_map_op
from onnxcomp.targets.tvm.lower.sparse import known
from onnxcomp.targets.tvm.nodes import replace

_OURS = {
    "DeltaMatMul": "DeltaMatMul",
    "DeltaMatMulInt8": "DeltaMatMul",
    "DeltaGRU": "DeltaGru",
    "DeltaLSTM": "DeltaLstm",
}


@dataclass(frozen=True, kw_only=True)
class Delta(Pass):
    """Lowers what the pass `delta` writes; holds that no kernel makes use of are taken away, with their state.

    There are kernels for convolutional layers, products and recurrent cells. Convolutional layers run densely where a
    calibration sequence told that most pixels change. No single step runs the dense model instead: an edit says from
    which share of changed pixels on that would be faster.

    Attributes:
        maps: The machine has kernels for maps; else convolutional layers run densely.
    """

    name: ClassVar[str] = "tvm_delta"
    summary: ClassVar[str] = "Streaming ops to kernels."
    maps: bool = True

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        holds = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type in DELTA_OPS]
        if not holds:
            return []
        edits: list[Edit] = []
        infer_shapes(model)
        editor = Editor(model)
        states = StreamStates(model, editor)
        maps = map_holds(model, holds) if self.maps else []
        if maps:
            when = dense_steps(maps)
            edits += lower_maps(model, editor, states, maps)
            if when is not None:
                note = (
                    f"a step that changes more than {when.share:.0%} of an input's pixels may take longer than "
                    "densely, by what was measured of native kernels"
                )
                edits.append(applied(maps[0], note))
        edits += lower_vectors(model, editor, states, holds, "reads the weights of changed inputs only")
        states.write()
        edits += [refused(n, "no kernel skips what it holds, so it is left out, with its state") for n in strip(model)]
        updated = set[str]()
        for node in [n for n in model.graph if n.domain == native.DOMAIN]:
            if node.op_type in _OURS:
                _replace(editor, node)
            elif node.op_type in MAP_OPS:
                replace_map_op(editor, node)
                updated.add(str(node.outputs[0].name))
        drop_unused(model)
        # The others put out new state beside the old.
        write_state(model, [s.model_copy(update={"in_place": s.output in updated}) for s in model_state(model)])
        return edits


def _replace(editor: Editor, node: ir.Node) -> None:
    inputs, attributes = list(node.inputs), dict[str, Any]()
    if node.op_type.startswith("DeltaMatMul"):
        step = inputs[4]
        assert step is not None
        attributes["steps"] = int(step.shape.numpy()[0]) if step.shape is not None and known(step).any() else 0
    if node.op_type != "DeltaMatMulInt8":
        columns = inputs[5 if node.op_type == "DeltaMatMul" else 8]
        assert columns is not None
        assert columns.shape is not None
        inputs.append(editor.weight(f"{node.name}_ones", np.ones(int(columns.shape.numpy()[1]), np.float32)))
    replace(node, _OURS[node.op_type], inputs, attributes)
