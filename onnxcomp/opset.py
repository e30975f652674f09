"""Conversion between versions of the default ONNX operator set."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnxscript.version_converter import ConvertVersionPass

from onnxcomp.errors import GraphError
from onnxcomp.model import name_nodes


def opset(model: ir.Model) -> int:
    """Version of the default domain that the model imports; 1 if it imports none."""
    return model.opset_imports.get("") or model.opset_imports.get("ai.onnx") or 1


def raise_opset(model: ir.Model, version: int) -> bool:
    """Converts the model, in place, to at least opset `version`; a newer model stays as it is.

    Returns:
        Whether it was converted.

    Raises:
        GraphError: If the converter cannot do it.
    """
    before = opset(model)
    if before >= version:
        return False
    logger = logging.getLogger("onnxscript.version_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warning on which of its two implementations works is of no use to a user
    try:
        ConvertVersionPass(version, fallback=True)(model)
    except Exception as error:
        raise GraphError(f"the model cannot be converted from opset {before} to {version}: {error}") from error
    finally:
        logger.setLevel(level)
    if opset(model) != version:
        raise GraphError(
            f"the model cannot be converted from opset {before} to {version}; export it anew with a newer opset"
        )
    name_nodes(model)
    return True
