"""What a portable op is: a name, a function body in plain ONNX, and the same in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from onnxcomp.errors import GraphError

DOMAIN = "onnxcomp"
"""Domain of the portable ops."""

VERSION = 1
"""Version of the domain. An op whose meaning changes gets a new name, so this only grows when ops are added."""

MIN_OPSET = 16
"""Lowest opset of the default domain that the bodies are valid in."""

Float = npt.NDArray[np.floating[Any]]
"""An array of floating type."""


@dataclass(frozen=True, kw_only=True)
class PortableOp:
    """An op that runs anywhere.

    Attributes:
        name: Op type.
        summary: One line for `onnxcomp list ops`.
        signature: Inputs and outputs with shapes.
        body: The function in ONNX's text form, without the header that names domain and opset.
        reference: The same in numpy: inputs in order, attributes by name; a tuple where there are several outputs.
    """

    name: str
    summary: str
    signature: str
    body: str
    reference: Callable[..., Float | tuple[Float, ...]]

    def function(self, opset: int = 18) -> ir.Function:
        """Builds the function, anew every time: a function belongs to one model.

        Args:
            opset: Version of the default domain that the body is declared for; that of the model it goes into, since
                inlining needs the two to agree.

        Raises:
            GraphError: If `opset` is older than `MIN_OPSET`.
        """
        if opset < MIN_OPSET:
            raise GraphError(
                f"{DOMAIN}::{self.name} needs opset {MIN_OPSET} or newer, not {opset}; convert the model first"
            )
        text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{self.body}'
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        function.doc_string = f"{self.summary}. {self.signature}"
        return function

    def install(self, model: ir.Model) -> None:
        """Adds the function and the domain to `model`; where they are there already, nothing changes.

        Raises:
            GraphError: If the model's opset is older than `MIN_OPSET`, or it has a newer version of the domain.
        """
        version = model.opset_imports.setdefault(DOMAIN, VERSION)
        if version > VERSION:
            raise GraphError(f"the model has version {version} of the ops in {DOMAIN!r}; this onnxcomp knows {VERSION}")
        if (DOMAIN, self.name, "") not in model.functions:
            function = self.function(model.opset_imports.get("", MIN_OPSET))
            model.functions[function.identifier()] = function
