"""Activations whose channels may be scaled, as the linear ops that read them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.model import all_nodes
from onnxcomp.passes._scale_folds import (
    Linear,
    Source,
    direct_source,
    find_layer,
    find_linear,
    layer_sources,
    unsuitable_reader,
)
from onnxcomp.rewrite import Context, Edit, refused
from onnxcomp.select import Select


@dataclass(frozen=True, kw_only=True)
class Site:
    """An activation and the linear ops that read it.

    Attributes:
        value: The activation.
        linears: All ops that read it.
        source: The norm before it that takes the scale, or why there is none.
    """

    value: ir.Value
    linears: tuple[Linear, ...]
    source: Source | str

    @property
    def name(self) -> str:
        """Of the activation."""
        return self.value.name or ""

    @property
    def nodes(self) -> list[ir.Node]:
        """The ops that read it."""
        return [linear.node for linear in self.linears]

    @property
    def channels(self) -> int:
        """Length of the last axis."""
        return len(self.linears[0].matrix)


def find_sites(model: ir.Model, where: Select, treated: str) -> tuple[list[Site], list[Edit]]:
    """All sites of the main graph, and why other linear ops are none.

    Args:
        model: The model.
        where: The ops that may be changed.
        treated: Key in the metadata of ops that were treated already.
    """
    readers: dict[ir.Value, list[Linear]] = {}
    refusals: list[Edit] = []
    for node in all_nodes(model):
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or not where(node):
            continue
        linear = find_linear(model, node)
        if treated in node.metadata_props:
            refusals.append(refused(node, "a scale was searched for it already"))
        elif isinstance(linear, str):
            refusals.append(refused(node, linear))
        elif (value := node.inputs[0]) is not None:
            readers.setdefault(value, []).append(linear)
    sites: list[Site] = []
    for value, linears in readers.items():
        unfit = unsuitable_reader(value, [linear.node for linear in linears])
        if unfit is not None:
            refusals += [refused(linear.node, unfit) for linear in linears]
            continue
        source = direct_source(value, len(linears[0].matrix))
        sites.append(Site(value=value, linears=tuple(linears), source=source))
    return sites, refusals


def may_be_scaled(model: ir.Model, site: Site) -> bool:
    """Whether something before the site might take the scale for free."""
    return not isinstance(site.source, str) or find_layer(model, site.value) is not None


def layers_before(model: ir.Model, context: Context, sites: Sequence[Site]) -> Mapping[ir.Value, Source]:
    """Activation to the layer before it that takes the scale, for sites behind no norm."""
    behind = {s.value: found for s in sites if isinstance(s.source, str) and (found := find_layer(model, s.value))}
    return layer_sources(model, context, behind, {s.value: s.channels for s in sites})
