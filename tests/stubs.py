"""Passes that stand in for built-in ones, so that a test of what runs them does not depend on what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import onnx_ir as ir
import pytest

from onnxcomp import registry
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused


def register(monkeypatch: pytest.MonkeyPatch, kind: type[Pass]) -> None:
    """Puts a pass of this module into the registry, in place of the one that has its name."""
    stub = EntryPoint(kind.name, f"{kind.__module__}:{kind.__name__}", registry.PASSES)

    def found(group: str) -> list[EntryPoint]:
        others = [e for e in entry_points(group=group) if e.name != kind.name]
        return [*others, stub] if group == registry.PASSES else others

    monkeypatch.setattr(registry, "entry_points", found)


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies every weight named `w*` by `factor`, and refuses every Relu."""

    name: ClassVar[str] = "legalize"
    summary: ClassVar[str] = "For tests."
    factor: ClassVar[float] = 1.0

    exact: bool = False

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits: list[Edit] = []
        for node in model.graph:
            if node.op_type == "Relu":
                edits.append(refused(node, "a stub does not take it"))
            for value in node.inputs:
                if value is not None and value.const_value is not None and str(value.name).startswith("w"):
                    array: Any = value.const_value.numpy() * value.const_value.numpy().dtype.type(self.factor)
                    value.const_value = ir.tensor(array, name=value.name)
                    edits.append(applied(node, f"scaled by {self.factor}, exact is {self.exact}"))
        return edits


@dataclass(frozen=True, kw_only=True)
class ScaleLittle(Scale):
    """Changes the outputs of the small model by 1 part in 1,000: 60 dB for each weight."""

    factor: ClassVar[float] = 1.001


@dataclass(frozen=True, kw_only=True)
class ScaleMuch(Scale):
    """Changes the outputs by a fifth and more: at most 14 dB."""

    factor: ClassVar[float] = 1.2
