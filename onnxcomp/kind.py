"""Tells what kind of model a graph is, since what compresses one kind well ruins another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.errors import PassError
from onnxcomp.rewrite import IrPassAdapter
from onnxcomp.structure import Layers, Structure

KindName = Literal["cnn", "transformer-encoder", "decoder-lm", "recurrent", "recurrent-streaming", "mixed", "other"]

_SOME, _HALF = 0.25, 0.5
"""Shares of the weights from which a sort of layer counts, and rules."""
_FEW, _MOSTLY = 0.05, 0.95
"""Shares of the weights below which convolutions do not count, and from which a little attention does not."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What kind of model it is, and what was seen.

    Attributes:
        name: `recurrent-streaming` has its state as inputs and outputs, `recurrent` has not; `mixed` has convolutions
            beside attention or recurrent layers, neither of which may be left out of account.
        evidence: What was counted and found, for people.
    """

    name: KindName
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        """Name and evidence in one line."""
        return f"{self.name} ({'; '.join(self.evidence)})"


def classify(model: ir.Model) -> Kind:
    """Says what kind of model it is; the model stays as it is, and of the weights hardly more than shapes is read."""
    graph = Structure(_without_functions(model))
    attention, convs, linears, recurrent = graph.attention(), graph.convs, graph.linears, graph.recurrent
    seen = [
        *_counted(attention, "attention block"),
        *_sized(convs, "convolution"),
        *_sized(linears, "matrix product"),
        *_sized(recurrent, "recurrent layer"),
    ]
    if decoder := _decoder_evidence(graph, attention):
        return Kind(name="decoder-lm", evidence=(*decoder, *seen))
    total = max(convs.weights + linears.weights + recurrent.weights, 1)
    conv_share, recurrent_share = convs.weights / total, recurrent.weights / total
    if recurrent.nodes and (states := graph.states()):
        return Kind(name="recurrent-streaming", evidence=(*_counted(states, "state", " in and out"), *seen))
    if recurrent_share >= _HALF and conv_share < _FEW:
        return Kind(name="recurrent", evidence=tuple(seen))
    if attention and conv_share < _SOME and recurrent_share < _SOME:
        return Kind(name="transformer-encoder", evidence=(*seen, "predicts no tokens one after the other"))
    if (attention and conv_share < _MOSTLY) or recurrent_share >= _SOME:
        return Kind(name="mixed", evidence=tuple(seen))
    if convs.nodes and (convs.nodes >= linears.nodes or conv_share >= _HALF):
        return Kind(name="cnn", evidence=tuple(seen))
    return Kind(name="other", evidence=tuple(seen) or ("no layer with weights",))


def _without_functions(model: ir.Model) -> ir.Model:
    """A copy whose function calls are inlined; the model itself if it calls none, or if they cannot be inlined."""
    if not model.functions:
        return model
    copy = model.clone()
    try:
        IrPassAdapter(common_passes.InlinePass())(copy)
    except PassError:  # a function that calls itself, has another opset, or is called with too many inputs
        return model
    return copy


def _decoder_evidence(graph: Structure, attention: int) -> list[str]:
    """What shows that the model predicts tokens one after the other; empty if nothing does."""
    caches, causal, tables = graph.caches(), graph.causal(), graph.token_tables()
    logits = ""
    for rows in tables.values() or ((None,) if caches and attention else ()):
        logits = logits or graph.logits_over(rows)
    if not logits and not (tables and attention and (causal or caches)):
        return []
    return [
        *(f"{name} looks up {rows} tokens" for name, rows in tables.items()),
        *([logits] if logits else []),
        *_counted(caches, "cache tensor", " in and out"),
        causal or "no causal mask",
    ]


def _counted(count: int, what: str, more: str = "") -> list[str]:
    return [f"{count} {what}{'s' * (count != 1)}{more}"] if count else []


def _sized(layers: Layers, what: str) -> list[str]:
    return _counted(layers.nodes, what, f" with {layers.weights:,} weights")
