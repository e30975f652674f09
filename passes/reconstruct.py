"""Refits weights to the quantized inputs that they meet, and rounds them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Gt
from typing_extensions import override

from onnxcomp.passes._integers import Problem, Search, choose_integers, round_rows
from onnxcomp.rewrite import Context, Edit, Pass
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Pass):
    """Refits the weights of quantized layers to what rounding made of their inputs, right after `quantize`.

    The weight that best turns the quantized input x' into what the float weight W makes of the exact input x is, by
    ridge regression, `W + W E[(x - x') x'^T] (E[x' x'^T] + ridge)^-1` (the first step of ERQ, Zhong et al., arXiv
    2407.06794). It is then rounded to the grid that the weight has. x is the layer's input before its quantizer, in the
    quantized model. Otherwise this is as `gptq`, which it includes.

    Attributes:
        ridge: Holds the weight where it was; relative to the mean second moment of x'. With less, layers
            come closer to their outputs on data like that of the calibration, and the model as a whole may do worse.
        rounding: `gptq` lets columns make up for each other's errors; `nearest` does not.
        damp: As for `gptq`.
        act_order: As for `gptq`.
        positions: As for `gptq`.
        memory_mb: As for `gptq`; four times as much is needed for a layer.
        sequential: As for `gptq`.
    """

    name: ClassVar[str] = "reconstruct"
    summary: ClassVar[str] = "refits weights to quantized inputs by ridge regression, then rounds them by GPTQ"

    ridge: Annotated[float, Gt(0.0)] = 0.1
    rounding: Literal["nearest", "gptq"] = "gptq"
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
            errors=True,
            positions=self.positions,
            memory=self.memory_mb << 20,
            sequential=self.sequential,
        )
        return choose_integers(model, context, self.where, search)

    def _solve(self, problem: Problem) -> Array:
        columns = problem.weight.shape[-1]
        gram, cross = problem.gram[:, :columns, :columns], problem.gram[:, columns:, :columns]
        refitted = problem.weight + refit(problem.weight, gram, cross, self.ridge)
        if self.rounding == "nearest":
            return problem.nearest(refitted)
        return round_rows(problem, refitted, gram, damp=self.damp, act_order=self.act_order)


def refit(weight: Array, gram: Array, cross: Array, ridge: float) -> Array:
    """What to add to a weight so that `E|W (x' + d) - (W + change) x'|^2 + ridge |change|^2` is least.

    Args:
        weight: (groups, N, K).
        gram: `E[x' x'^T]`, (groups, K, K).
        cross: `E[d x'^T]`, (groups, K, K).
        ridge: Relative to the mean of the diagonal of `gram`.
    """
    mean = np.diagonal(gram, axis1=1, axis2=2).mean(axis=1)
    mean = np.where(mean > 0.0, mean, 1.0)[:, None, None]
    held = gram + ridge * mean * np.eye(gram.shape[-1])
    return np.linalg.solve(held, (weight @ cross).swapaxes(1, 2)).swapaxes(1, 2)
