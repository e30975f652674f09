"""onnxcomp: hardware-portable compression of ONNX models.

    import onnxcomp

    report = onnxcomp.compress("model.onnx", "out", recipe="int8", data="samples.npz")
    print(report.summary())

All verbs are functions of `onnxcomp.api`. Importing the package is cheap: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcomp.api import compress, inspect
    from onnxcomp.errors import OnnxcompError
    from onnxcomp.model import load, save
    from onnxcomp.report import Report
    from onnxcomp.rewrite import Context, Edit, Pass, Pipeline
    from onnxcomp.select import Select

__all__ = [
    "Context",
    "Edit",
    "OnnxcompError",
    "Pass",
    "Pipeline",
    "Report",
    "Select",
    "compress",
    "inspect",
    "load",
    "save",
]

__version__ = "0.1.0"

_HOMES = {
    "Context": "rewrite",
    "Edit": "rewrite",
    "OnnxcompError": "errors",
    "Pass": "rewrite",
    "Pipeline": "rewrite",
    "Report": "report",
    "Select": "select",
    "compress": "api",
    "inspect": "api",
    "load": "model",
    "save": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxcomp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onnxcomp.{_HOMES[name]}"), name)
