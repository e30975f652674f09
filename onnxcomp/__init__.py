"""onnxcomp: hardware-portable compression of ONNX models.

    import onnxcomp

    report = onnxcomp.compress("model.onnx", "out", recipe="int8", data="samples.npz")
    print(report.summary())

Importing the package is cheap: the verbs load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcomp.api import compare, compile, compress, doctor, export, inspect, profile, rewrite
    from onnxcomp.errors import OnnxcompError
    from onnxcomp.rewrite import Pass

__all__ = [
    "OnnxcompError",
    "Pass",
    "compare",
    "compile",
    "compress",
    "doctor",
    "export",
    "inspect",
    "profile",
    "rewrite",
]

__version__ = "0.1.0"

_HOMES = {"OnnxcompError": "onnxcomp.errors", "Pass": "onnxcomp.rewrite"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'onnxcomp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "onnxcomp.api")), name)
