"""Contract tests that every pass has to hold, built in or not.

from onnxcomp.testing import check_pass

def test_contract():
check_pass(MyPass(), model, runner=reference_runner, capabilities=OrtCpu().capabilities(), data=feeds)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import onnx_ir as ir
from pydantic import TypeAdapter

from onnxcomp.calibrate import Runner
from onnxcomp.errors import PassError
from onnxcomp.model import check_graph, initializers
from onnxcomp.opset import raise_opset
from onnxcomp.rewrite import Edit, Pass, Pipeline
from onnxcomp.select import Select
from onnxcomp.state import model_state
from onnxcomp.target import Capabilities, Feed


def check_pass(
    subject: Pass,
    model: ir.Model,
    *,
    capabilities: Capabilities,
    runner: Runner | None = None,
    data: Sequence[Feed] | None = None,
) -> Sequence[Edit]:
    """Runs a pass on a model and checks everything that holds for all passes.

    * It is a frozen dataclass with a name, a summary, and a configuration that survives a recipe.
    * Afterwards the graph is valid, and inputs and outputs have the names and types that they had.
    * Every edit names what was done, every refusal has a reason.
    * A second application changes nothing any more.
    * A selector that takes no node leaves the graph as it was, up to the opset that the pass needs.

    Args:
        subject: The pass.
        model: A model on which it works; left unchanged.
        capabilities: Of the target.
        runner: Runs probes, if the pass observes.
        data: Calibration feeds, if the pass observes.

    Returns:
        What the pass reported.

    Raises:
        PassError: If the contract is broken, saying which part.
    """
    _check_class(subject)

    def run(step: Pass, on: ir.Model) -> Sequence[Edit]:
        pipeline = Pipeline(passes=[step], capabilities=capabilities, runner=runner, check="none")
        return pipeline.run(on, data)[0].edits

    untouched = model.clone()
    raise_opset(untouched, type(subject).min_opset)
    before = _text(untouched)
    run(dataclasses.replace(subject, where=Select(name=("no node has this name",))), untouched)
    if type(subject).selective:
        _demand(subject, _text(untouched) == before, "a selector that takes nothing changes the graph")

    changed = model.clone()
    edits = run(subject, changed)
    check_graph(changed)
    _demand(subject, _same_interface(model, changed), "inputs or outputs have another name or type")
    for edit in edits:
        _demand(subject, bool(edit.detail.strip()), f"the edit at {edit.node!r} does not say what or why")
    once = _text(changed)
    again = [e for e in run(subject, changed) if e.action == "applied"]
    _demand(subject, not again and _text(changed) == once, f"a second application changes the graph: {again[:3]}")
    return edits


def _check_class(subject: Pass) -> None:
    kind = type(subject)
    parameters = getattr(kind, "__dataclass_params__", None)
    _demand(subject, parameters is not None and parameters.frozen, "it is no frozen dataclass")
    _demand(subject, bool(kind.name and kind.summary), "it has no name or no summary")
    adapter = TypeAdapter(kind)
    config = json.loads(adapter.dump_json(subject))
    _demand(
        subject, adapter.validate_json(json.dumps(config)) == subject, "its configuration does not survive a recipe"
    )


def _same_interface(before: ir.Model, after: ir.Model) -> bool:
    """Whether names are the same, and types where there were any; a pass may add state, and list it."""
    added = {n for s in model_state(after) for n in (s.input, s.output)}
    added -= {n for s in model_state(before) for n in (s.input, s.output)}
    old = (*before.graph.inputs, *before.graph.outputs)
    added -= {v.name for v in old}  # an input or output that was there is one still
    new = [v for v in (*after.graph.inputs, *after.graph.outputs) if v.name not in added]
    return [v.name for v in old] == [v.name for v in new] and all(
        v.dtype in (None, w.dtype) for v, w in zip(old, new, strict=True)
    )


def _text(model: ir.Model) -> str:
    """The graph as text, with a hash of every weight."""
    weights = "".join(
        f"{v.name} {hashlib.sha256(v.const_value.tobytes()).hexdigest()}\n"
        for v in initializers(model)
        if v.const_value is not None
    )
    return ir.to_onnx_text(model, exclude_initializers=True) + weights


def _demand(subject: Pass, holds: bool, complaint: str) -> None:
    if not holds:
        raise PassError(f"pass {type(subject).name!r} breaks the contract: {complaint}")
