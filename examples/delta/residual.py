"""Why changes that were not sent are kept: EfficientNet-Lite0 on a video, against dropping them.

    python -m examples.delta.residual [--clip FILE] [--start 0] [--frames 100] [--errors 0.05 0.1]

The same thresholds, two rules. `kept` compares with what was sent last, as the pass `delta` writes it, so that what is
not sent yet is sent later; `dropped` compares with the frame before and adds up the changes that pass, so that small
ones are lost. Relative error of the scores, root mean square over all frames and in the last one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir

from examples.delta.clips import FIXED, clip, feeds
from onnxcomp import api
from onnxcomp.edit import Editor
from onnxcomp.ops import DOMAIN
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.delta import Delta
from onnxcomp.state import StateSpec, model_state, write_state
from onnxcomp.target import Feed
from onnxcomp.targets.ort import reference_runner

_DROPPING = """<domain: "example", opset_import: ["": 18]>
Dropping (X, last, before, started, threshold) => (Y) {
    change = Sub (X, before)
    square = Mul (change, change)
    axes = Constant <value_ints = [1]> ()
    mean = ReduceMean <keepdims = 1> (square, axes)
    size = Sqrt (mean)
    small = LessOrEqual (size, threshold)
    zero = Constant <value_float = 0.0> ()
    sent = Where (small, zero, change)
    sum = Add (last, sent)
    Y = Where (started, sum, X)
}"""


def dropping(model: ir.Model) -> ir.Model:
    """A step model with the other rule."""
    changed = model.clone()
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_DROPPING))
    changed.functions[function.identifier()] = function
    changed.opset_imports["example"] = 1
    editor, states = Editor(changed), list(model_state(changed))
    for node in [n for n in changed.graph if n.domain == DOMAIN and n.op_type == "DeltaHoldPixels"]:
        x, last, started, threshold = node.inputs
        assert x is not None
        name, shape = editor.free(f"{x.name}_before"), [int(d) for d in node.outputs[0].shape or ()]
        before = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        changed.graph.inputs.append(before)
        seen = editor.before(node, "Identity", [x], name=f"{name}_next", like=before)
        changed.graph.outputs.append(seen)
        states.append(StateSpec(input=name, output=str(seen.name), shape=shape, dtype="float32"))
        node.domain, node.op_type = "example", "Dropping"
        node.resize_inputs(5)
        for index, value in enumerate((x, last, before, started, threshold)):
            node.replace_input_with(index, value)
    write_state(changed, states)
    return changed


def scores(model: ir.Model, frames: list[Feed]) -> np.ndarray:
    name = model.graph.outputs[0].name or ""
    run = reference_runner(model, [name])
    return np.stack([run(f)[name][0].copy() for f in frames])


def main() -> None:
    """Prints the errors of both rules."""
    parser = argparse.ArgumentParser(prog="python -m examples.delta.residual", description=__doc__)
    parser.add_argument("--clip", type=Path, default=clip(FIXED[0]))
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.05, 0.1], help="budgets of the threshold search")
    options = parser.parse_args()
    frames = list(feeds(options.clip, options.start, options.start + options.frames))
    with tempfile.TemporaryDirectory() as name:
        api.export("examples.efficientnet.model:model", Path(name, "model.onnx"))
        model = api.rewrite(Path(name, "model.onnx"), None, recipe=[Cleanup()]).model
        dense = scores(model, frames)
        print(f"{options.clip.name}, {len(frames)} frames; error of all frames, of the last one")
        for budget in options.errors:
            step = Delta(max_error=budget, frames=32)
            found = api.rewrite(model, None, recipe=[step], data=frames[:32], samples=None).model
            for label, subject in (("kept", found), ("dropped", dropping(found))):
                off = np.square(scores(subject, frames) - dense)
                whole = np.sqrt(off.mean() / np.square(dense).mean())
                last = np.sqrt(off[-1].mean() / np.square(dense[-1]).mean())
                print(f"budget {budget:.2f} {label:8} {whole:.4f} {last:.4f}", flush=True)


if __name__ == "__main__":
    main()
