"""What the verbs return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnxcomp.compare import Fidelity
from onnxcomp.kind import Kind
from onnxcomp.model import ModelSize
from onnxcomp.profile import Latency, Ratio
from onnxcomp.rewrite import PassReport
from onnxcomp.target import Audit, NodeTime

_SAME_DB = 0.5
"""What is further away by no more than this is as close."""
_CLOSE_DB = 10.0
"""A runtime that takes an output further from what the file tells does more than round it."""
_NEAR_DB = 3.0
"""An original that is further from its reference has too little in common with it to be judged by it."""


@dataclass(frozen=True, kw_only=True)
class PatternUse:
    """Weights that keep to an N:M pattern along the axis that is summed over.

    Attributes:
        pattern: "N:M", in which they take the fewest bytes.
        kind: `matrix` for weights of MatMul and Gemm; `convolution`, whose channels are grouped, and which no pass
            packs.
        weights: How many there are.
        stored_bytes: As they are stored.
        packed_bytes: Packed, with values of the type that they have.
        int8_bytes: Packed, with values of 8 bits and a float32 scale for every output.
    """

    pattern: str
    kind: str
    weights: int
    stored_bytes: int
    packed_bytes: int
    int8_bytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a model is made of.

    Attributes:
        path: The file, empty for a model in memory.
        file_bytes: Its size with external data.
        opset: Version of the default domain.
        producer: Exporter that wrote it.
        inputs: Input name to a text of type and shape.
        outputs: Output name to a text of type and shape.
        dynamic: Input name to the axes whose size is open; they are fixed with `shapes`.
        size: Nodes, weights, multiply-accumulates.
        kind: What kind of model it is; `auto` chooses the recipe by it.
        patterns: N:M patterns of zeros, largest weights first.
        selected: Name, op type and module path of every node that the selector takes; None without a selector.
    """

    path: str
    file_bytes: int
    opset: int
    producer: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    dynamic: Mapping[str, tuple[int, ...]]
    size: ModelSize
    kind: Kind
    patterns: tuple[PatternUse, ...] = ()
    selected: tuple[tuple[str, str, str], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RewriteResult:
    """What a rewrite did.

    Attributes:
        path: Where the model was written, None for a dry run.
        model: The rewritten model, as read back from the file if there is one.
        before: Size of the original.
        passes: What each pass did and refused.
        recipe: Name of the recipe.
        kind: Kind of the original.
        reason: Why this recipe; empty if the caller named it.
        warnings: What the recipe is known to cost on this kind of model.
    """

    path: Path | None
    model: ir.Model
    before: ModelSize
    passes: tuple[PassReport, ...]
    recipe: str
    kind: Kind
    reason: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Legalization:
    """What was done to a quantized model, and what the target makes of it.

    Attributes:
        path: Where the model was written; None for a dry run, and when it is not accepted.
        model: The rewritten model, as read back from the file if there is one.
        target: Name of the target.
        threads: Threads a run.
        passes: What each pass did and refused.
        before: What the compute nodes of the original became on the target.
        after: Likewise, of the rewritten model.
        fidelity: Of the rewritten model as executed, against the original as its file tells it; without layers.
        runtime: Of the original as executed, against the same: what the runtime's optimizer changes.
        min_sqnr: SQNR in dB from which on an output is taken for that of the original.
        reference: What the original stands for, in words: the reference given, or the original without rounding; empty
            if there was no need of it, or it cannot be told.
        to_reference: Against that, the original as its file tells it, `before`, and the rewritten model, `after`.
        exact: Whether every integer of the original was kept.
        refused_sqnr: Of the rewrite that keeps less, to the original, in dB, where it was tried and not accepted.
        latency: `before` and `after`, measured interleaved; empty if not measured.
        ratio: Time of the rewritten model over that of the original; None if not measured.
    """

    path: Path | None
    model: ir.Model
    target: str
    threads: int
    passes: tuple[PassReport, ...]
    before: Audit
    after: Audit
    fidelity: Fidelity
    runtime: Fidelity
    min_sqnr: float
    reference: str = ""
    to_reference: Mapping[str, Fidelity] = field(default_factory=dict)
    exact: bool = False
    refused_sqnr: float | None = None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    ratio: Ratio | None = None

    @property
    def accepted(self) -> bool:
        """Whether the rewritten model may take the place of the original.

        Every output has to be that of the original up to rounding, or as close to it as the original is when executed,
        or as close to the reference as the original.
        """
        compared = [(self.runtime, self.fidelity, _CLOSE_DB)]
        if self.to_reference:
            compared.append((self.to_reference["before"], self.to_reference["after"], _NEAR_DB))
        kept = {o.name for o in self.fidelity.outputs if o.sqnr >= self.min_sqnr}
        for before, after, least in compared:
            limits = {o.name: o.sqnr - _SAME_DB for o in before.outputs if o.sqnr >= least}
            kept.update(o.name for o in after.outputs if o.sqnr >= limits.get(o.name, math.inf))
        return all(o.name in kept for o in self.fidelity.outputs)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured.

    Attributes:
        target: Name of the target.
        threads: Threads a run.
        latency: Model name to latency; all were measured interleaved.
        ratio: Of the first model to the second, if there are two.
        node_times: Time by executed node of the first model.
        peak_memory: Peak resident bytes of the first model.
        carries_state: The first model is one for streams, of which one feed over and over tells little.
    """

    target: str
    threads: int
    latency: Mapping[str, Latency]
    ratio: Ratio | None
    node_times: tuple[NodeTime, ...]
    peak_memory: int
    carries_state: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What one linear op costs and saves when it alone is quantized.

    Attributes:
        node: Its name.
        op_type: Its op type.
        sqnr: SQNR of the worst output of the model, in dB.
        flips: Share of samples for which an output's largest element is another one.
        float_microseconds: Its time in the float model; None if not measured or not found.
        integer_microseconds: Its time in the model that is quantized as a whole.
    """

    node: str
    op_type: str
    sqnr: float
    flips: float
    float_microseconds: float | None
    integer_microseconds: float | None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What quantizing each linear op alone does to the outputs of a model.

    Attributes:
        target: Name of the target.
        samples: Feeds that outputs were compared on.
        sqnr: SQNR of the worst output when everything is quantized, in dB.
        flips: Share of samples whose largest element moves then.
        layers: One row a linear op, the costliest first.
    """

    target: str
    samples: int
    sqnr: float
    flips: float
    layers: tuple[LayerSensitivity, ...]


@dataclass(frozen=True, kw_only=True)
class LayerImpact(LayerSensitivity):
    """What one linear op costs, measured and to first order.

    Attributes:
        weighted_sqnr: SQNR in dB that the op's own error would give the worst output if it were weighed by the model's
            Jacobian: far above `sqnr`, the error is one that all elements share, which a bias can take back; far below,
            errors of neighbouring elements cancel, or what follows cuts them off.
    """

    weighted_sqnr: float


@dataclass(frozen=True, kw_only=True)
class GroupImpact:
    """What the ops of one block cost and save when they alone are quantized.

    Attributes:
        name: Scope that their names share.
        layers: Number of ops.
        sqnr: As of a layer.
        flips: As of a layer.
        weighted_sqnr: Of the sum of their weighted errors, as if these were independent.
        float_microseconds: Sum over those that were measured in both models; None if none was.
        integer_microseconds: Likewise.
    """

    name: str
    layers: int
    sqnr: float
    flips: float
    weighted_sqnr: float
    float_microseconds: float | None
    integer_microseconds: float | None


@dataclass(frozen=True, kw_only=True)
class Impact(Sensitivity):
    """What quantizing each linear op, or each block, alone does to the outputs of a model.

    Attributes:
        layers: One row a linear op, the costliest first.
        groups: One row a block, the costliest first.
    """

    layers: tuple[LayerImpact, ...]
    groups: tuple[GroupImpact, ...]
