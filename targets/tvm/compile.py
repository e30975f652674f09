"""Compiles a model into an artifact folder: code, weights, manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from onnxcomp.artifacts import new_artifact
from onnxcomp.errors import CompileError, GraphError
from onnxcomp.manifest import DType, tensor_entry, write_manifest
from onnxcomp.rewrite import Context, Pass
from onnxcomp.specs import input_specs, output_specs
from onnxcomp.state import model_state
from onnxcomp.target import Artifact, Audit, AuditRow, Capabilities
from onnxcomp.targets.tvm import weights
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.gpu.nvcc import nvcc
from onnxcomp.targets.tvm.gpu.packing import compiling_for, pack_imports
from onnxcomp.targets.tvm.importing import to_relax
from onnxcomp.targets.tvm.linking import export_library
from onnxcomp.targets.tvm.lower.prepare import MACS
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.manifest import CODE, FILES, PACKAGES, WEIGHTS, Manifest
from onnxcomp.targets.tvm.nodes import DOMAIN, INSTEAD, WAS
from onnxcomp.targets.tvm.pipeline import build
from onnxcomp.targets.tvm.tuning import Tuning
from onnxcomp.targets.tvm.tuning.tuner import Tuner

_UNTUNED = "no kernel of ours fits; it runs by a loop that TVM makes, which is slow"
_TUNED = "no kernel of ours fits; it runs by a loop that TVM makes: see what was tuned"


def compile_model(
    model: ir.Model,
    out: Path,
    machine: Machine,
    capabilities: Capabilities,
    lowering: Sequence[Pass],
    tuning: Tuning | None = None,
) -> Artifact:
    """Compiles `model`, which stays as it is, into the folder `out`.

    Args:
        model: The model, lowered or not.
        out: The folder.
        machine: What to compile for.
        capabilities: Of the target.
        lowering: Passes of the target; on a model that they were applied to they change nothing.
        tuning: Whether to tune loops of TVM's own, and for how long; by default they stay as they are.

    Raises:
        CompileError: If TVM rejects the model, or `out` cannot be written or holds something else.
        UnsupportedError: If an op cannot be compiled; the message names the node.
    """
    out = out.resolve()
    working = model.clone()
    context = Context(capabilities=capabilities)
    for step in lowering:
        step.apply(working, context)
    try:
        states = model_state(working)
        inputs, outputs = input_specs(working), output_specs(working)
    except GraphError as error:
        raise CompileError(str(error)) from error
    for spec in (*inputs, *outputs):
        if str(spec.dtype) not in get_args(DType):
            raise CompileError(f"{spec.name!r} is {spec.dtype}, for which there are no arrays in files: insert a Cast")
    parameters, returns = ([str(v.name) for v in values] for values in (working.graph.inputs, working.graph.outputs))
    audit = _audit(working)
    if isinstance(machine, Gpu):
        nvcc()  # the rest would take its time before it is missed
    with new_artifact(out, FILES) as (folder, _):
        imported = to_relax(working, machine)
        tuner = Tuner(machine, tuning) if tuning else None
        gpu = machine.arch if isinstance(machine, Gpu) else ""
        with compiling_for(gpu) if gpu else nullcontext():
            executable = build(imported.module, machine, tuner)
        export_library(executable, folder / CODE, machine.triple, pack_imports(gpu) if gpu else None)
        if tuner:
            tuner.write(folder)
            told = (replace(row, reason=_TUNED) if row.reason == _UNTUNED else row for row in audit.rows)
            audit = replace(audit, rows=tuple(told))
        manifest = write_manifest(
            Manifest,
            folder,
            audit,
            weights=weights.write(folder / WEIGHTS, imported.weights),
            files=FILES,
            packages=PACKAGES,
            target=capabilities.target,
            features=list(capabilities.features),
            board=machine.name,
            triple=machine.triple,
            cpu=machine.cpu,
            gpu=gpu,
            parameters=parameters,
            returns=returns,
            inputs=[tensor_entry(s) for s in inputs],
            outputs=[tensor_entry(s) for s in outputs],
            state=[s.model_dump() for s in states],
            tuning=[entry.model_dump() for entry in tuner.entries] if tuner else [],
        )
    return Artifact(path=out, manifest=manifest.model_dump(), audit=manifest.to_audit())


def _audit(model: ir.Model) -> Audit:
    """What each node with multiply-accumulates became: a kernel of ours, or a loop that TVM makes."""
    rows = []
    executed: Counter[str] = Counter()
    for node in model.graph:
        ours = node.domain == DOMAIN
        executed[node.op_type if ours else f"{node.op_type} (TVM's own)"] += 1
        if not (macs := int(node.metadata_props.get(MACS, 0))):
            continue
        integer = ours and node.op_type.startswith("Q")
        quantized = integer or any(
            value is not None and (producer := value.producer()) is not None and producer.op_type == "DequantizeLinear"
            for value in node.inputs
        )
        rows.append(
            AuditRow(
                node=node.name or "",
                op_type=node.metadata_props.get(WAS, node.op_type),
                executed_as=node.op_type if ours else "",
                executed_name=node.name or "",
                macs=macs,
                quantized=quantized,
                integer=integer,
                reason=node.metadata_props.get(INSTEAD, "") if ours else _UNTUNED,
            )
        )
    return Audit(rows=tuple(rows), executed_ops=dict(executed.most_common()))
