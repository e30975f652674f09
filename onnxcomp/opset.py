"""Conversion between versions of the default ONNX operator set."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from onnxscript.version_converter import ConvertVersionPass

from onnxcomp.edit import attribute, constant
from onnxcomp.errors import GraphError
from onnxcomp.model import all_nodes, name_nodes, quiet, root_cause

_SCAN_WITHOUT_BATCH = 9
_RESIZE_WITH_MODES = 11
_HARDMAX_OF_ONE_AXIS = 13


def opset(model: ir.Model) -> int:
    """Version of the default domain that the model imports; 1 if it imports none."""
    return model.opset_imports.get("") or model.opset_imports.get("ai.onnx") or 1


def raise_opset(model: ir.Model, version: int) -> bool:
    """Converts the model, in place, to at least opset `version`; a newer model stays as it is.

    Returns:
        Whether it was converted.

    Raises:
        GraphError: If the converter cannot do it, or would change what the model computes.
    """
    before = opset(model)
    if before >= version:
        return False
    if all(node.domain for node in all_nodes(model)):
        model.opset_imports[""] = version  # no node is of the default domain, so there is nothing to convert
        return True
    _check_convertible(model, before, version)
    rounding = _roundings(model) if before < _RESIZE_WITH_MODES <= version else []
    try:
        with quiet():  # its warning on which of its two implementations works is of no use to a user
            ConvertVersionPass(version, fallback=True)(model)
    except Exception as error:
        reason = root_cause(error)
        raise GraphError(f"the model cannot be converted from opset {before} to {version}: {reason}") from error
    if opset(model) != version:
        raise GraphError(
            f"the model cannot be converted from opset {before} to {version}; export it anew with a newer opset"
        )
    _keep_sampling(model, rounding)
    NameFixPass()(model)  # the converter names values of subgraphs as it names those outside
    name_nodes(model)
    return True


def _check_convertible(model: ir.Model, before: int, version: int) -> None:
    """Refuses what the converter gets wrong without a word."""
    for node in all_nodes(model):
        if node.domain:
            continue
        reason = ""
        if node.op_type == "Scan" and before < _SCAN_WITHOUT_BATCH:
            reason = "is a Scan over a batch, which later opsets do not have"
        if node.op_type == "Hardmax" and before < _HARDMAX_OF_ONE_AXIS <= version and not _is_last_axis(node):
            reason = "is a Hardmax over several axes, which later opsets do not have"
        if reason:
            raise GraphError(
                f"the model cannot be converted from opset {before} to {version}: node {node.name!r} {reason}; export "
                "it anew with a newer opset"
            )


def _is_last_axis(node: ir.Node) -> bool:
    axis, shape = attribute(node, "axis", 1), node.inputs[0].shape if node.inputs[0] is not None else None
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _roundings(model: ir.Model) -> list[str]:
    """How every Upsample and Resize rounds the place that a sample is taken from, in the order of the graph.

    Raises:
        GraphError: If one enlarges along one axis and shrinks along another, which rounds in two ways.
    """
    found = []
    for node in all_nodes(model):
        if node.op_type not in ("Upsample", "Resize") or node.domain:
            continue
        scales = attribute(node, "scales") or constant(node.inputs[1] if len(node.inputs) > 1 else None)
        shrinks = scales is not None and min(scales) < 1
        if scales is not None and shrinks and max(scales) > 1 and attribute(node, "mode", "nearest") == "nearest":
            raise GraphError(
                f"the model cannot be converted to a newer opset: node {node.name!r} enlarges along one axis and "
                "shrinks along another; export it anew with a newer opset"
            )
        found.append("ceil" if shrinks else "floor")
    return found


def _keep_sampling(model: ir.Model, rounding: list[str]) -> None:
    """Says what every Resize did before opset 11, where the converter leaves it to the new defaults.

    Raises:
        GraphError: If the nodes round in different ways and the converter left more or fewer of them.
    """
    if not rounding:
        return
    nodes = [node for node in all_nodes(model) if node.op_type == "Resize" and not node.domain]
    if len(set(rounding)) == 1:
        rounding = rounding[:1] * len(nodes)
    if len(nodes) != len(rounding):
        raise GraphError("the model cannot be converted to a newer opset: it samples in several ways; export it anew")
    for node, nearest in zip(nodes, rounding, strict=True):  # by order, since the converter names values anew
        node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "asymmetric"
        )
        if attribute(node, "mode", "nearest") == "nearest":
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", nearest)
