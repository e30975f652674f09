"""Targets that rewrite a model themselves before they compile it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import api
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.registry import load_target
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.verbs import resolve


@dataclass(frozen=True, kw_only=True)
class Negate(Pass):
    """Negates what the classifier returns, so that a test sees where the lowering took effect."""

    name: ClassVar[str] = "negate"
    summary: ClassVar[str] = "For tests."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        (output,) = model.graph.outputs
        node = ir.node("Neg", [output], outputs=[ir.Value(name="lowered", shape=output.shape, type=output.type)])
        model.graph.append(node)
        model.graph.outputs[0] = node.outputs[0]
        node.outputs[0].name, output.name = output.name, "raised"
        return [applied(node, "negated")]


class Lowering(OrtCpu):
    name: ClassVar[str] = "lowering"

    def lowering(self) -> Sequence[Pass]:
        return (Negate(),)


@pytest.fixture
def lowering(monkeypatch):
    monkeypatch.setattr(resolve, "load_target", lambda name: Lowering if name == "lowering" else load_target(name))


def test_lowering_is_on_the_way_to_the_artifact(lowering, compress, tmp_path, run, x, model_path):
    report = compress(target="lowering", recipe=[Cleanup()])
    assert report.fidelity.worst_sqnr > 100, "the baseline takes the same way"
    portable = run(tmp_path / "out" / "model.onnx", {"x": x})[0]
    np.testing.assert_allclose(portable, run(model_path, {"x": x})[0], rtol=1e-5, atol=1e-5)
    session = Lowering().load(Lowering().open(tmp_path / "out" / "artifact"))
    np.testing.assert_allclose(session.run({"x": x})["y"], -portable, rtol=1e-5, atol=1e-5)


def test_lowering_leaves_a_model_in_memory(lowering, tmp_path, model_path):
    model = load(model_path)
    api.compile(model, tmp_path / "artifact", target="lowering")
    assert [n.op_type for n in model.graph] == ["Gemm", "Relu", "Gemm"]
