"""Where a method of activation sparsity drops values, and by what score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxcomp.passes._activations import RECTIFIED
from onnxcomp.passes._attention_layers import find_attention_layers
from onnxcomp.passes._dense import Dense
from onnxcomp.passes._feed_forward import Blocks, FeedForward, find_feed_forward
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select

Method = Literal["cats", "chess", "teal", "wina", "fatrelu", "topk", "cett"]

MARK = "onnxcomp.threshold"
"""Metadata of a node whose input was given a threshold, with the method."""

_BEFORE_UP = ("cats", "chess", "fatrelu")  # decide by the activated gate, so that `up` is skipped as well
_BEFORE_DOWN = ("topk", "cett")  # decide by what `down` reads


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A tensor whose small values are dropped.

    The score of a value is its magnitude, times the mean magnitude of what a gate multiplies with `by_linear`, times
    the norm of the weights that read it with `by_norms`.

    Attributes:
        node: The product that is reported.
        observed: The tensor.
        dense: The product that reads it, for a feed-forward block its last one.
        block: The feed-forward block, if the decision is taken in it; None for the input of any product.
        by_linear: See above.
        by_norms: See above.
        weights: Number of weights that are not read if everything is dropped.
    """

    node: ir.Node
    observed: ir.Value
    dense: Dense
    block: FeedForward | None
    by_linear: bool
    by_norms: bool
    weights: int


def find_sites(
    model: ir.Model, method: Method, where: Select, *, attention: bool, column_norms: bool
) -> tuple[list[Site], list[Edit], list[Dense]]:
    """Sites of a method, refusals of selected products that are none, and all products with a constant matrix."""
    found = find_feed_forward(model)
    reasons = dict(found.reasons)
    if method in ("teal", "wina"):
        sites = _inputs(model, found, by_norms=method == "wina" or column_norms)
    else:
        sites = [s for b in found.blocks if (s := _block(b, method, column_norms, reasons)) is not None]
        if attention:
            sites += _attention(model, found, column_norms, reasons)
    taken: list[Site] = []
    for site in sites:
        reasons.pop(site.node, None)
        if not where(site.node):
            continue
        if MARK in site.node.metadata_props:
            reasons[site.node] = f"its input has a threshold already, by {site.node.metadata_props[MARK]}"
        else:
            taken.append(site)
    order = {node: i for i, node in enumerate(model.graph)}
    edits = [refused(node, reason) for node, reason in reasons.items() if where(node)]
    return sorted(taken, key=lambda s: order[s.node]), edits, list(found.dense)


def _block(block: FeedForward, method: Method, column_norms: bool, reasons: dict[ir.Node, str]) -> Site | None:
    down = block.down
    if method == "fatrelu" and block.activation not in RECTIFIED:
        reasons[down.node] = f"its activation is {block.activation}, not ReLU; the pass relufy makes it one"
        return None
    early = method in _BEFORE_UP
    skipped = block.up.dense.inputs * block.hidden if early and block.gate is not None else 0
    return Site(
        node=down.node,
        observed=block.activated if early else down.source,
        dense=down,
        block=block,
        by_linear=method == "chess" and block.linear is not None,
        by_norms=column_norms or method == "cett",
        weights=skipped + down.inputs * down.outputs,
    )


def _input(dense: Dense, *, by_norms: bool) -> Site:
    return Site(
        node=dense.node, observed=dense.source, dense=dense, block=None, by_linear=False, by_norms=by_norms,
        weights=dense.inputs * dense.outputs,
    )  # fmt: skip


def _inputs(model: ir.Model, found: Blocks, *, by_norms: bool) -> list[Site]:
    """Inputs of all products of attention and feed-forward blocks."""
    attention = find_attention_layers(model, found.dense)
    nodes = {n for layers in attention for n in layers.nodes} | {n for b in found.blocks for n in b.products}
    return [_input(d, by_norms=by_norms) for d in found.dense if d.node in nodes]


def _attention(model: ir.Model, found: Blocks, column_norms: bool, reasons: dict[ir.Node, str]) -> Sequence[Site]:
    """Inputs of the projections of queries and of the output; keys and values, which are kept, stay exact."""
    sites: list[Site] = []
    for layers in find_attention_layers(model, found.dense):
        if layers.query.node in (layers.key.node, layers.value.node):
            reasons[layers.query.node] = "it makes keys or values as well as queries, which have to stay exact"
        else:
            sites.append(_input(layers.query, by_norms=column_norms))
        sites.append(_input(layers.output, by_norms=column_norms))
    return sites
