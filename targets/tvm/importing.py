"""From a lowered model to Relax: TVM's importer for plain ONNX, converters of our own for nodes of ours.

TVM's importer does not look at the domain of a node and knows no local functions, so nodes of ours get their domain
into the name of the op, and what is left of functions was inlined before. Weights become parameters, in order, so that
they can lie beside the compiled code.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.script.parser.core.parser import ScriptMacro

from onnxcomp.errors import CompileError
from onnxcomp.model import root_cause
from onnxcomp.targets.tvm.convert import CONVERTERS
from onnxcomp.targets.tvm.convert._call import Call, Converter
from onnxcomp.targets.tvm.convert.ranges import between_sizes
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import DOMAIN

_SMALL = 1024
"""Bytes up to which a constant stays in the code: shapes, axes and scalars are needed to convert other nodes."""

_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model as Relax.

    Attributes:
        module: The `IRModule`; its function `main` takes the model's inputs and then the weights.
        weights: Name to tensor, in the order of the parameters.
    """

    module: Any
    weights: Mapping[str, ir.TensorProtocol]


def to_relax(model: ir.Model, machine: Machine) -> Imported:
    """Imports a lowered model, which is changed.

    Raises:
        CompileError: If TVM's importer fails.
    """
    weights = _lift(model)
    _rename_inputs(model.graph)
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            node.op_type, node.domain = f"{DOMAIN}::{node.op_type}", ""
    with _lock, _converters(machine), _quick_macros(), contextlib.redirect_stdout(io.StringIO()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the ONNX checker does not know our nodes
                module = onnx_frontend.from_onnx(proto, opset=model.opset_imports[""], sanitize_input_names=False)
        except Exception as error:
            raise CompileError(f"TVM cannot import the model: {root_cause(error)}") from error
    return Imported(module=module, weights=weights)


def _rename_inputs(graph: ir.Graph) -> None:
    """Gives inputs, and their open dimensions, names that suit CUDA source, into which they get."""
    dimensions: dict[str, str] = {}
    for index, value in enumerate(graph.inputs):
        value.name = f"onnxcomp_{index}"
        if value.shape is not None:
            value.shape = ir.Shape(
                size
                if isinstance(size, int) or size.value is None
                else dimensions.setdefault(size.value, f"onnxcomp_size_{len(dimensions)}")
                for size in value.shape
            )


def _lift(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Makes graph inputs of weights."""
    graph, lifted = model.graph, {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or not value.uses():
            continue
        ours = any(node.domain == DOMAIN for node, _ in value.uses())
        if not ours and tensor.nbytes <= _SMALL:
            continue
        del graph.initializers[name]
        value.shape, value.dtype, value.const_value = ir.Shape(tensor.shape.numpy()), tensor.dtype, None
        graph.inputs.append(value)
        lifted[name] = tensor
    return lifted


@contextlib.contextmanager
def _converters(machine: Machine) -> Iterator[None]:
    """Adds ours to those that TVM's importer looks up."""
    original = onnx_frontend._get_convert_map
    ours = {f"{DOMAIN}::{name}": _as_class(name, converter, machine) for name, converter in CONVERTERS.items()}
    take, ranges = relax.op.take, original()["Range"]
    ours["Range"] = type("Range", (), {"get_converter": staticmethod(partial(_range, ranges, machine))})
    onnx_frontend._get_convert_map = lambda: {**original(), **ours}
    relax.op.take = partial(_take, take)
    try:
        yield
    finally:
        onnx_frontend._get_convert_map, relax.op.take = original, take


def _range(theirs: Any, machine: Machine, opset: int) -> Callable[..., Any]:
    def convert(builder: Any, inputs: Any, *others: Any) -> Any:
        given = [inputs[i] for i in range(3)]
        found = between_sizes(Call(builder=builder, kind="Range", inputs=given, attributes={}, machine=machine))
        return theirs.get_converter(opset)(builder, inputs, *others) if found is None else found

    return convert


def _take(original: Callable[..., Any], x: Any, indices: Any, axis: int | None = None, mode: str = "clip") -> Any:
    """TVM's Gather with indices kept within the axis: by default it reads whatever memory they point to."""
    return original(x, indices, axis, mode)


@contextlib.contextmanager
def _quick_macros() -> Iterator[None]:
    """Lets macros find the parser that they run in without reading source files: kernels are parsed 5 times faster."""
    original = ScriptMacro._find_parser_def
    ScriptMacro._find_parser_def = _parser
    try:
        yield
    finally:
        ScriptMacro._find_parser_def = original


def _parser(macro: Any) -> Any:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if (found := frame.f_globals.get(macro.parser_object_name)) is not None:
            return found
        frame = frame.f_back
    raise RuntimeError("a macro was called outside of TVMScript")


def _as_class(kind: str, converter: Converter, machine: Machine) -> type:
    def convert(builder: Any, inputs: Any, attributes: Mapping[str, Any], _: Any) -> Any:
        given = [inputs[i] for i in range(len(inputs))]
        own = {k: v for k, v in attributes.items() if k != "tvm_custom"}
        return converter(Call(builder=builder, kind=kind, inputs=given, attributes=own, machine=machine))

    def get_converter(_: int) -> Callable[..., Any]:
        return convert

    return type("Converter", (), {"get_converter": staticmethod(get_converter)})
