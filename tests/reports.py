"""Makes reports for tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.compare import Fidelity, LayerFidelity, TensorFidelity
from onnxcomp.model import ModelSize
from onnxcomp.profile import Latency, Ratio
from onnxcomp.report import ModelReport, Report
from onnxcomp.rewrite import Context, Edit, Pass, PassReport
from onnxcomp.target import Audit, AuditRow, NodeTime

EVIL = "</style><script>alert(1)</script>|`[x](y)\x1b[31m$\\alpha$"


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "Halves."

    bits: int = 8
    clip: float = math.inf
    folder: Path = Path("weights")
    scale: np.float32 = np.float32(0.5)  # noqa: RUF009, immutable
    dtype: ir.DataType = ir.DataType.INT8

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        return []


def latency(ms: float) -> Latency:
    return Latency.of([round(ms * 1e6 * f) for f in (0.9, 0.96, 1.0, 1.1, 1.2)], [round(ms * 1e6)] * 5)


def timed(median: float, low: float, high: float, confidence: float = 0.95) -> Ratio:
    return Ratio(median=median, low=low, high=high, confidence=confidence, rounds=50)


def size(nodes: int) -> ModelSize:
    return ModelSize(nodes=nodes, ops={"Conv": nodes}, weight_bytes=4 * nodes, parameters=nodes, macs=1000 * nodes)


def report(layers: int = 40, *, name: str = "conv", ratio: Ratio | None = None) -> Report:
    names = [f"{name}{i}" for i in range(layers)]
    rows = tuple(
        AuditRow(
            node=n,
            op_type="Conv",
            executed_as="Conv" if i % 10 == 3 else "QLinearConv",
            macs=1000 * (i + 1),
            quantized=True,
            integer=i % 10 != 3,
            reason=f"no kernel for {name}" if i % 10 == 3 else "",
        )
        for i, n in enumerate(names)
    )
    times = tuple(NodeTime(node=n, op_type="Conv", microseconds=10.0 + i) for i, n in enumerate(names))
    edits = tuple(
        Edit(
            action="refused" if i % 10 == 5 else "applied",
            node=n,
            op_type="Conv",
            detail=f"weight of {name} is not constant" if i % 10 == 5 else "halved",
        )
        for i, n in enumerate(names)
    )
    return Report(
        recipe="int8",
        target="ort-cpu",
        threads=1,
        environment={"onnxruntime": "1.32", name: name},
        before=ModelReport(
            path="in/net.onnx",
            file_bytes=18_600_000,
            size=size(2 * layers),
            audit=Audit(rows=tuple(replace(r, quantized=False, integer=False, reason="") for r in rows)),
            latency=latency(10.0),
            peak_memory=90_000_000,
            node_times=times,
        ),
        after=ModelReport(
            path="out/net.onnx",
            file_bytes=4_800_000,
            size=size(layers),
            audit=Audit(rows=rows),
            latency=latency(5.0),
            peak_memory=60_000_000,
            node_times=tuple(replace(t, op_type="QLinearConv", microseconds=t.microseconds / 2) for t in times),
        ),
        passes=(PassReport(name="halve", config=Halve(), edits=edits, size=size(layers), seconds=1.5),),
        fidelity=Fidelity(
            data="val.npz",
            samples=64,
            seen_by_calibration=False,
            outputs=(
                TensorFidelity(name=name, sqnr=19.25, cosine=0.99, max_error=1.5, top1=0.9375, kl=0.03),
                TensorFidelity(name="box", sqnr=30.0, cosine=1.0, max_error=0.5),
            ),
            layers=tuple(
                LayerFidelity(node=n, op_type="Conv", value=n, sqnr=40.0 - 0.1 * i) for i, n in enumerate(names)
            ),
            reference_metric={"accuracy": 0.75},
            metric={"accuracy": 0.72},
        ),
        ratio=ratio or timed(0.48, 0.47, 0.5),
        calibration="train.npz",
        calibration_samples=32,
        warnings=("the CPU was busy",),
        recipe_source='version = 1\n[[passes]]\npass = "halve"\n',
    )
