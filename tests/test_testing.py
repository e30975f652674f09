"""The contract checker finds every way in which a pass can break the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import GraphError, PassError
from onnxcomp.rewrite import Pass, applied, refused
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.testing import check_pass


@dataclass(frozen=True, kw_only=True)
class Good(Pass):
    """Writes every Relu as a Max with zero."""

    name: ClassVar[str] = "good"
    summary: ClassVar[str] = "Relu to Max"

    scale: float = 1.0

    def apply(self, model: ir.Model, context: Any) -> list[Any]:
        return [self.rewrite(model, n) for n in list(model.graph) if n.op_type == "Relu" and self.where(n)]

    def rewrite(self, model: ir.Model, node: ir.Node) -> Any:
        zero = ir.Value(name=f"{node.name}_zero", const_value=ir.tensor(np.float32(0), name=f"{node.name}_zero"))
        model.graph.register_initializer(zero)
        node.op_type = "Max"
        node.resize_inputs(2)
        node.replace_input_with(1, zero)
        return applied(node, "Relu written as Max")


@dataclass(frozen=True, kw_only=True)
class Nameless(Good):
    summary: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class Lossy(Good):
    """Its configuration is another one after a recipe."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scale + 1.0)


@dataclass(frozen=True, kw_only=True)
class Silent(Good):
    def rewrite(self, model: ir.Model, node: ir.Node) -> Any:
        return refused(node, " ")


@dataclass(frozen=True, kw_only=True)
class Greedy(Good):
    """Does not ask its selector."""

    def apply(self, model: ir.Model, context: Any) -> list[Any]:
        return [self.rewrite(model, n) for n in list(model.graph) if n.op_type == "Relu"]


@dataclass(frozen=True, kw_only=True)
class Restless(Good):
    """Scales weights again and again, and keeps quiet about it."""

    def apply(self, model: ir.Model, context: Any) -> list[Any]:
        for node in model.graph:
            if self.where(node) and node.op_type == "Gemm" and (value := node.inputs[1]) is not None:
                assert value.const_value is not None
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(0.5), name=value.name)
        return []


@dataclass(frozen=True, kw_only=True)
class Repeating(Good):
    def apply(self, model: ir.Model, context: Any) -> list[Any]:
        return [applied(n, "nothing, really") for n in model.graph if self.where(n)]


@dataclass(frozen=True, kw_only=True)
class Renaming(Good):
    def apply(self, model: ir.Model, context: Any) -> list[Any]:
        for node in model.graph:
            if self.where(node) and node.outputs[0].is_graph_output():
                node.outputs[0].name = "renamed"
        return []


@dataclass(frozen=True, kw_only=True)
class Breaking(Good):
    def apply(self, model: ir.Model, context: Any) -> list[Any]:
        for node in model.graph:
            if node.op_type == "Relu" and self.where(node):
                node.op_type = "NoSuchOp"
        return []


@pytest.fixture
def model(mlp) -> ir.Model:
    return ir.from_proto(mlp())


@pytest.fixture
def capabilities():
    return OrtCpu().capabilities()


def test_a_good_pass_and_what_it_reported(model, capabilities):
    before = ir.to_onnx_text(model)
    edits = check_pass(Good(), model, capabilities=capabilities)
    assert [e.detail for e in edits] == ["Relu written as Max"]
    assert ir.to_onnx_text(model) == before, "the model is left unchanged"


@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        (Nameless(), "no name or no summary"),
        (Lossy(), "does not survive a recipe"),
        (Silent(), "does not say what or why"),
        (Greedy(), "a selector that takes nothing changes the graph"),
        (Restless(), "a second application changes the graph"),
        (Repeating(), "a second application changes the graph"),
        (Renaming(), "another name or type"),
    ],
)
def test_every_broken_promise_is_found(subject, complaint, model, capabilities):
    with pytest.raises(PassError, match=f"breaks the contract: .*{complaint}"):
        check_pass(subject, model, capabilities=capabilities)


def test_an_invalid_graph_is_found(model, capabilities):
    with pytest.raises(GraphError, match="NoSuchOp"):
        check_pass(Breaking(), model, capabilities=capabilities)


def test_a_class_that_is_not_frozen(model, capabilities):
    @dataclass(kw_only=True, unsafe_hash=True)
    class Loose:
        name: ClassVar[str] = "loose"
        summary: ClassVar[str] = "not frozen"

    with pytest.raises(PassError, match="no frozen dataclass"):
        check_pass(Loose(), model, capabilities=capabilities)  # type: ignore[arg-type]
