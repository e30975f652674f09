"""GPTQ: integers of weights that make up for each other's rounding errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
from annotated_types import Ge, Gt
from typing_extensions import override

from onnxcomp.passes._integers import Problem, Search, choose_integers, round_rows
from onnxcomp.rewrite import Context, Edit, Pass
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class Gptq(Pass):
    """Chooses the integers of quantized weights so that layers put out what they should, right after `quantize`.

    GPTQ (Frantar et al., arXiv 2210.17323) on the inputs as they arrive, quantized. Where there is a bias, it takes the
    mean of the error, and the integers have to care for the rest only. Scales stay what they are, and nothing is added
    to the graph. One sample in four judges the result: an output channel whose error does not fall there keeps its
    integers.

    Attributes:
        damp: Added to the diagonal of the inputs' second moments, relative to its mean.
        act_order: Inputs of largest second moment are rounded first.
        positions: Of each sample, at most so many rows or patches, drawn at random.
        memory_mb: MiB of second moments held at a time; fewer take more runs over the data.
        sequential: One input after the other, each with the integers chosen before it; takes a run for each.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "GPTQ: better integers for quantized weights, after quantize; free at run time"

    damp: Annotated[float, Gt(0.0)] = 0.01
    act_order: bool = True
    positions: Annotated[int, Ge(1)] = 256
    memory_mb: Annotated[int, Ge(1)] = 1024
    sequential: bool = False

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        search = Search(
            name=self.name,
            solve=self._solve,
            errors=False,
            positions=self.positions,
            memory=self.memory_mb << 20,
            sequential=self.sequential,
        )
        return choose_integers(model, context, self.where, search)

    def _solve(self, problem: Problem) -> Array:
        return round_rows(problem, problem.weight, problem.gram, damp=self.damp, act_order=self.act_order)
