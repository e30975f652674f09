"""Counts the codes of quantized activations in which TVM and ONNX Runtime differ.

    python -m examples.tvm.codes [--models efficientnet vit] [--feeds 24]

Every code behind a QuantizeLinear becomes an output of the model; both runtimes compute it for inputs that calibration
did not see. As a measure of how much last bits of floats move, so does ONNX Runtime without its graph optimisation. The
largest output is that of ONNX Runtime's model without the further outputs.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from examples.tvm import subjects
from onnxcomp.targets.ort import reference_runner
from onnxcomp.verbs.resolve import compiled, make_target


def main() -> None:
    """Prints a line a model."""
    parser = argparse.ArgumentParser(prog="python -m examples.tvm.codes", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["efficientnet", "vit"], choices=("efficientnet", "vit"))
    parser.add_argument("--feeds", type=int, default=subjects.STEPS)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            print(counted(name, Path(folder), options.feeds), flush=True)


def counted(name: str, folder: Path, count: int) -> str:
    """What is said of a model."""
    subject = getattr(subjects, name)(folder)
    model = subject.form("int8")
    own = [str(value.name) for value in model.graph.outputs]
    ours, theirs = make_target("tvm-cpu"), make_target("ort-cpu")
    plain = theirs.load(compiled(model, theirs, folder / "plain"))
    codes = expose(model)
    mine = ours.load(compiled(model, ours, folder / "tvm"))
    reference = theirs.load(compiled(model, theirs, folder / "ort"))
    plainest = reference_runner(model, codes, optimize=False)
    total = differ = far = moved = argmax = feeds = 0
    hidden = True
    for feed in islice(subject.evaluation(), count):
        found, wanted, alone, other = mine.run(feed), reference.run(feed), plain.run(feed), plainest(feed)
        for code in codes:
            moved += int((other[code] != wanted[code]).sum())
            apart = np.abs(found[code].astype(np.int32) - wanted[code])
            total, differ, far = total + apart.size, differ + int((apart > 0).sum()), max(far, int(apart.max()))
        argmax += int(all((found[n].argmax(-1) == alone[n].argmax(-1)).all() for n in own))
        hidden &= all(np.array_equal(wanted[n], alone[n]) for n in own)
        feeds += 1
    note = "" if hidden else "; ONNX Runtime's outputs change when codes are outputs too"
    return (
        f"{name}: {total / 1e6:.1f} M codes at {len(codes)} quantizers, {differ} differ ({differ / total:.1%}), "
        f"by {far} at most; without graph optimisation {moved / total:.1%} of ONNX Runtime's own do. "
        f"The largest output is the same for {argmax} of {feeds} inputs{note}"
    )


def expose(model: ir.Model) -> list[str]:
    """Makes outputs of all codes, and returns their names."""
    graph = model.graph
    values = [node.outputs[0] for node in graph if node.op_type == "QuantizeLinear"]
    graph.outputs.extend(value for value in values if not value.is_graph_output())
    return [str(value.name) for value in values]


if __name__ == "__main__":
    main()
