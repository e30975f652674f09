"""Verbs that only look: at a model, at what is registered, at this machine."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.doctor import Diagnosis, diagnose
from onnxcomp.kind import classify
from onnxcomp.model import all_nodes, model_size
from onnxcomp.opset import opset
from onnxcomp.recipe import builtin_recipes, load_recipe
from onnxcomp.registry import PASSES, TARGETS, load_pass, load_target, names
from onnxcomp.select import Select, module_paths
from onnxcomp.specs import input_specs
from onnxcomp.verbs.patterns import find_patterns
from onnxcomp.verbs.resolve import ModelLike, Shapes, file_bytes, load_model
from onnxcomp.verbs.results import Inspection


def inspect(model: ModelLike, *, select: Select | None = None, shapes: Shapes | None = None) -> Inspection:
    """Looks at a model.

    Args:
        model: Path or model.
        select: Lists the nodes that this selector takes.
        shapes: Fixes dynamic input shapes, for the count of multiply-accumulates.
    """
    loaded = load_model(model, shapes)
    selected = None
    if select is not None:
        selected = tuple(
            (n.name or "", n.op_type, (module_paths(n) or ("",))[-1]) for n in all_nodes(loaded) if select(n)
        )
    return Inspection(
        path="" if isinstance(model, ir.Model) else str(model),
        file_bytes=file_bytes(model, loaded),
        opset=opset(loaded),
        producer=f"{loaded.producer_name or 'unknown'} {loaded.producer_version or ''}".strip(),
        inputs={v.name or "": f"{v.dtype} {v.shape}" for v in loaded.graph.inputs if not v.is_initializer()},
        outputs={v.name or "": f"{v.dtype} {v.shape}" for v in loaded.graph.outputs},
        dynamic=_dynamic(loaded),
        size=model_size(loaded),
        kind=classify(loaded),
        patterns=find_patterns(loaded),
        selected=selected,
    )


def list_passes() -> dict[str, str]:
    """Pass name to its summary."""
    return {name: load_pass(name).summary for name in names(PASSES)}


def list_targets() -> dict[str, str]:
    """Target name to its summary, and the boards that it compiles for where there is a choice."""
    targets = {name: load_target(name) for name in names(TARGETS)}
    return {
        name: target.summary + (f"; boards: {', '.join(boards)}" if (boards := target.boards()) else "")
        for name, target in targets.items()
    }


def list_recipes() -> dict[str, str]:
    """Built-in recipe name to its summary."""
    return {name: load_recipe(name).summary for name in builtin_recipes()}


def list_ops() -> dict[str, str]:
    """Portable op to its summary."""
    from onnxcomp.ops import DELTA_OPS, NM_OPS, OPS

    return {f"onnxcomp::{name}": op.summary for name, op in {**OPS, **NM_OPS, **DELTA_OPS}.items()}


def doctor() -> list[Diagnosis]:
    """Looks at what is installed and what this machine offers."""
    return diagnose()


def _dynamic(model: ir.Model) -> dict[str, tuple[int, ...]]:
    axes = {
        spec.name: tuple(i for i, size in enumerate(spec.shape or ()) if not isinstance(size, int))
        for spec in input_specs(model)
    }
    return {name: open_axes for name, open_axes in axes.items() if open_axes}
