"""What a converter is handed: one node of ours, on its way into Relax."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tvm import relax, s_tir, tirx

from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import OWN

OPAQUE = 8
"""Pattern kind of a function that TVM is to fuse with nothing."""

Expr: TypeAlias = Any
"""A `tvm.relax.Expr`."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One node.

    Attributes:
        builder: Emits into the function that is built.
        kind: Op type of the node.
        inputs: A Relax expression an input; None where an optional one is left out.
        attributes: Of the node; strings are bytes.
        machine: What it is compiled for.
    """

    builder: Any
    kind: str
    inputs: Sequence[Expr | None]
    attributes: Mapping[str, Any]
    machine: Machine

    def kernels(self, name: str) -> Any:
        """The module with kernels of a kind for the machine, as `gemm`."""
        return importlib.import_module(f"{self.machine.kernels}.{name}")

    def shape(self, index: int) -> list[Any]:
        """Dimensions of an input: an int where it is fixed, else an expression."""
        expression = self.inputs[index]
        assert expression is not None
        return [int(d) if isinstance(d, tirx.IntImm) else d for d in expression.ty.shape]

    def dtype(self, index: int) -> str:
        """Element type of an input."""
        expression = self.inputs[index]
        assert expression is not None
        return str(expression.ty.dtype)

    def text(self, name: str) -> str:
        """A string attribute; empty if it is absent."""
        value = self.attributes.get(name, b"")
        return value.decode() if isinstance(value, bytes) else str(value)

    def tir(self, function: Any, inputs: Sequence[Expr], *, shape: Sequence[Any], dtype: str) -> Expr:
        """Emits a call of a kernel: it takes `inputs` in order, and last the output that it fills.

        Args:
            function: The `tvm.tirx.PrimFunc`.
            inputs: What it reads.
            shape: Of the output.
            dtype: Of the output.
        """
        return kernel_call(self.builder, self.kind, function, inputs, relax.TensorType(shape, dtype))

    def reshaped(self, expression: Expr, shape: Sequence[Any]) -> Expr:
        """The same values in another shape, without a copy."""
        return self.builder.emit(relax.op.reshape(expression, tuple(shape)))


def kernel_call(builder: Any, kind: str, function: Any, inputs: Sequence[Expr], output: Any) -> Expr:
    """Emits a call of a kernel.

    Args:
        builder: Emits into the function that is built.
        kind: Wish for the name of the kernel.
        function: The `tvm.tirx.PrimFunc`.
        inputs: Tensors and numbers, which it takes in order, before the output.
        output: `relax.TensorType` of the output.
    """
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", function.body))  # some passes need it
    function = function.with_body(root).with_attr("op_pattern", OPAQUE).with_attr(OWN, 1).without_attr("global_symbol")
    name = builder.add_func(function, kind)
    return builder.emit(relax.call_tir(name, list(inputs), out_ty=output))


Converter: TypeAlias = Callable[[Call], Expr]
