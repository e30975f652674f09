"""Streaming models: products and recurrent cells become nodes of ours that read the weights of changed inputs only.

What a kernel adds changes to is state, as inputs and outputs of the graph. The graph is edited as for the native
library; its ops then become ours.
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
from onnxcomp.rewrite import Context, Edit, Pass, refused
from onnxcomp.state import model_state, write_state
from onnxcomp.targets.ort.delta_lowering import lower_vectors
from onnxcomp.targets.ort.delta_states import StreamStates
from onnxcomp.targets.ort.delta_strip import strip
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

    There are kernels for products and recurrent cells. Convolutions run densely.
    """

    name: ClassVar[str] = "tvm_delta"
    summary: ClassVar[str] = "Streaming ops to kernels."

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        holds = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type in DELTA_OPS]
        if not holds:
            return []
        edits: list[Edit] = []
        infer_shapes(model)
        editor = Editor(model)
        states = StreamStates(model, editor)
        edits += lower_vectors(model, editor, states, holds, "reads the weights of changed inputs only")
        states.write()
        edits += [refused(n, "no kernel skips what it holds, so it is left out, with its state") for n in strip(model)]
        for node in list(model.graph):
            if node.domain == native.DOMAIN and node.op_type in _OURS:
                _replace(editor, node)
        # Ours put out new state beside the old.
        write_state(model, [s.model_copy(update={"in_place": False}) for s in model_state(model)])
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
