"""Chooses better integers for weights that `quantize` has put into the graph; scales and graph stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.edit import Editor
from onnxcomp.errors import CalibrationError
from onnxcomp.passes._bias import shift_bias
from onnxcomp.passes._gptq import gptq_round
from onnxcomp.passes._gram import Gram
from onnxcomp.passes._quantized_linears import QuantizedLinear, find_quantized
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, applied, refused
from onnxcomp.select import Select
from onnxcomp.stats import Group, Observer
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What integers are to be chosen for: weight rows by group of channels.

    Attributes:
        weight: Float weight, float64 (groups, outputs of a group, K).
        scale: Step size of each output, float64 (groups, outputs of a group, 1).
        top: Integers go from `-top` to `top`.
        gram: Second moments of the input about what the bias takes off, float64 (groups, K, K); with errors
            (groups, 2 K, 2 K), of the quantized input and of what quantizing it took.
        judge: The same of data that is held out.
    """

    weight: Array
    scale: Array
    top: int
    gram: Array
    judge: Array

    def held_out_errors(self, values: Array) -> Array:
        """Mean squared error of each output with another weight, shape (groups, outputs of a group)."""
        change = self.weight - values
        if self.judge.shape[-1] > change.shape[-1]:
            change = np.concatenate([change, self.weight], axis=-1)
        return np.asarray(np.einsum("gnk,gnk->gn", change @ self.judge, change))

    def nearest(self, weight: Array) -> Array:
        """Integers nearest to a weight, as floats."""
        return np.asarray(np.clip(np.rint(weight / self.scale), -self.top, self.top))


Solver: TypeAlias = Callable[[Problem], Array]
"""Returns integers as floats in the shape of the weight."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to go about it.

    Attributes:
        name: Name of the pass.
        solve: Finds the integers.
        errors: The problem is stated with the errors of the input.
        positions: Output positions of a sample that are drawn at most.
        memory: Bytes of second moments that are held at a time.
        sequential: Layers behind others see the integers that were chosen for those.
    """

    name: str
    solve: Solver
    errors: bool
    positions: int
    memory: int
    sequential: bool


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Integers that were chosen for a layer, and what to add to its bias."""

    layer: QuantizedLinear
    integers: Array
    shift: Array
    detail: str


def round_rows(problem: Problem, weight: Array, gram: Array, *, damp: float, act_order: bool) -> Array:
    """Integers for `weight` on the grid of a problem, by GPTQ."""
    scale, top = problem.scale[..., 0], problem.top

    def quantize(number: Array, column: Array) -> tuple[Array, Array]:
        integers = np.clip(np.rint(column / scale), -top, top)
        return integers, integers * scale

    return gptq_round(weight, gram, quantize, damp=damp, act_order=act_order)[0]


def choose_integers(model: ir.Model, context: Context, where: Select, search: Search) -> list[Edit]:
    """Replaces integers of weights by ones that lower the held-out error of the layer's output.

    Every output channel is judged apart. The bias takes the change of the mean.

    Raises:
        CalibrationError: If there is something to do and no data.
    """
    layers, edits = find_quantized(model, where, search.name)
    fitting = [layer for layer in layers if _bytes(layer, search) <= search.memory]
    edits += [refused(n.node, _too_large(n, search)) for n in layers if _bytes(n, search) > search.memory]
    if fitting and context.sweep is None:
        raise CalibrationError("it needs calibration data; give some with --data")
    editor = Editor(model)
    waiting: list[_Choice] = []
    changed = False
    for chunk in _chunks(fitting, search):
        for layer, choice in zip(chunk, _choose_all(model, context, chunk, search), strict=True):
            if isinstance(choice, str):
                edits.append(refused(layer.node, choice))
            else:
                edits.append(applied(layer.node, choice.detail))
                waiting.append(choice)
        if search.sequential:
            changed |= _write(editor, waiting)
    changed |= _write(editor, waiting)
    if changed:
        IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
    return edits


def _bytes(layer: QuantizedLinear, search: Search) -> int:
    """Of the second moments, those that are held out included."""
    return 2 * 8 * layer.groups * (layer.columns * (2 if search.errors else 1)) ** 2


def _too_large(layer: QuantizedLinear, search: Search) -> str:
    return f"its second moments take {_bytes(layer, search) / 2**20:.1f} MiB; raise memory_mb"


def _chunks(layers: Sequence[QuantizedLinear], search: Search) -> Iterator[list[QuantizedLinear]]:
    """Layers in graph order, as many at a time as memory allows; those of the same input stay together."""
    together: dict[object, list[QuantizedLinear]] = {}
    for layer in layers:
        together.setdefault(layer.key, []).append(layer)
    chunk: list[QuantizedLinear] = []
    used = 0
    for same in together.values():
        needed = _bytes(same[0], search)
        if chunk and (search.sequential or used + needed > search.memory):
            yield chunk
            chunk, used = [], 0
        chunk += same
        used += needed
    if chunk:
        yield chunk


def _choose_all(
    model: ir.Model, context: Context, chunk: Sequence[QuantizedLinear], search: Search
) -> list[_Choice | str]:
    """What to do with the layers of a chunk; their second moments are given up on return."""
    assert context.sweep is not None
    grams: dict[object, Gram] = {}
    by_value: dict[str, list[Gram]] = {}
    for layer in chunk:
        if layer.key not in grams:
            gram = Gram(layer.cut, layer.grid, errors=search.errors, positions=search.positions, seed=context.seed)
            grams[layer.key] = gram
            by_value.setdefault(layer.observed, []).append(gram)
    observers: dict[str, Observer] = {name: Group(*found) for name, found in by_value.items()}
    context.sweep(model, observers)
    return [_choose(layer, grams[layer.key], search) for layer in chunk]


def _choose(layer: QuantizedLinear, gram: Gram, search: Search) -> _Choice | str:
    if not gram.held_out.count:
        return "the calibration data is one sample; it takes two, since some are held out to judge the result"
    weight, old, scale = layer.stored()
    center = gram.fit.mean if layer.has_bias else np.zeros_like(gram.fit.mean)
    problem = Problem(
        weight=weight,
        scale=scale,
        top=int(np.abs(old).max(initial=0.0)),  # in some channel the largest weight is the largest integer
        gram=gram.fit.about(center),
        judge=gram.held_out.about(center),
    )
    if not problem.top:
        return "all its integers are zero"
    layer.mark(search.name)
    new = search.solve(problem)
    before, after = (problem.held_out_errors(integers * scale) for integers in (old, new))
    better = after < before
    if not better.any():
        return "no other integers lower the held-out output error; the old ones stay"
    chosen = np.where(better[..., None], new, old)
    ratio = np.where(better, after, before).sum() / before.sum()
    share = f"{int(better.sum())} of {better.size} channels" if not better.all() else "all channels"
    return _Choice(
        layer=layer,
        integers=layer.array(chosen),
        # `quantize` made the bias right for the mean of the quantized input and the old integers.
        shift=((old - chosen) * scale @ center[:, : layer.columns, None]).reshape(-1),
        detail=f"{np.mean(chosen != old):.0%} of its integers changed, in {share}; held-out output error x {ratio:.3f}",
    )


def _write(editor: Editor, waiting: list[_Choice]) -> bool:
    """Puts the integers that wait into the graph, and empties the list."""
    for choice in waiting:
        layer, dequantize = choice.layer, choice.layer.weight.producer()
        assert dequantize is not None
        assert dequantize.inputs[0] is not None
        dequantize.replace_input_with(0, editor.weight(dequantize.inputs[0].name or "weight", choice.integers))
        if layer.has_bias and choice.shift.any():
            input_scale = np.ones((), np.float32) if layer.grid is None else layer.grid.scale
            shift_bias(editor, layer.node, choice.shift, input_scale)
    written = bool(waiting)
    waiting.clear()
    return written
