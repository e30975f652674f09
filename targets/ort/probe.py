"""Writes a model as protobuf with other outputs, leaving the model alone and the weights where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.errors import CalibrationError
from onnxcomp.skeleton import release
from onnxcomp.target import Array
from onnxcomp.targets.ort.runtime import onnxruntime

PLACEHOLDER = "shared_in_memory"
"""External file that the placeholders name."""

SHARE_ABOVE = 1 << 30
"""Total bytes of weights above which they are handed over in memory; protobuf ends at 2 GiB."""

_SHARED_BYTES = 1 << 16  # smaller weights are written into the protobuf, where shape inference sees them

_PLAIN = frozenset({
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model in protobuf form and the weights that it lacks.

    Attributes:
        proto: The model; initializers in `weights` stand in it as placeholders.
        weights: Initializer name to `onnxruntime.OrtValue`; each has to outlive the session.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, Any]


def build_probe(model: ir.Model, outputs: Sequence[str]) -> Probe:
    """A model that computes `outputs`.

    Outputs are written without a type, which onnxruntime infers; that also serves values whose type is unknown here.

    Raises:
        CalibrationError: If a name is no value of the main graph.
    """
    graph = model.graph
    _check_outputs(graph, outputs)
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items())
    proto.functions.extend(ir.to_proto(f) for f in model.functions.values())
    proto.graph.name = graph.name or "probe"
    proto.graph.input.extend(ir.to_proto(v) for v in graph.inputs)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    nodes, used = _needed(graph, outputs)
    proto.graph.node.extend(ir.to_proto(n) for n in nodes)
    weights: dict[str, Any] = {}
    share = _weight_bytes(graph, used) > SHARE_ABOVE
    for name, value in graph.initializers.items():
        if value not in used and name not in outputs and not value.is_graph_input():
            continue
        tensor = value.const_value
        if tensor is None:
            raise CalibrationError(f"weight {name!r} has no data; load the model together with its external data")
        if not share or tensor.nbytes < _SHARED_BYTES or tensor.dtype not in _PLAIN or value.is_graph_input():
            written = ir.to_proto(tensor) if not isinstance(tensor, ir.ExternalTensor) else _embedded(tensor)
            written.name = name
            proto.graph.initializer.append(written)
        else:
            proto.graph.initializer.append(_placeholder(name, tensor))
            weights[name] = onnxruntime().OrtValue.ortvalue_from_numpy(_shared(tensor))
    return Probe(proto=proto, weights=weights)


def _weight_bytes(graph: ir.Graph, used: set[ir.Value]) -> int:
    return sum(v.const_value.nbytes for v in graph.initializers.values() if v in used and v.const_value is not None)


def _check_outputs(graph: ir.Graph, outputs: Sequence[str]) -> None:
    known = {v.name for v in graph.inputs} | set(graph.initializers)
    known.update(v.name for node in graph for v in node.outputs)
    missing = [name for name in outputs if name not in known or not name]
    if not missing:
        return
    inner = {v.name for sub in graph.subgraphs() for node in sub for v in node.outputs}
    inside = [name for name in missing if name in inner]
    if inside:
        raise CalibrationError(
            f"the values {inside} stand inside an If, Loop or Scan body and cannot be observed; leave out what is there"
        )
    raise CalibrationError(f"the model has no values named {missing}; was it rewritten since the names were taken?")


def _needed(graph: ir.Graph, outputs: Sequence[str]) -> tuple[list[ir.Node], set[ir.Value]]:
    """Nodes that the outputs depend on, in order, and all values that these read; onnxruntime would run all nodes."""
    wanted = set(outputs)
    nodes: list[ir.Node] = []
    used: set[ir.Value] = set()
    for node in reversed(graph):
        if not any(v in used or v.name in wanted for v in node.outputs):
            continue
        nodes.append(node)
        used.update(v for v in node.inputs if v is not None)
        for inner in _bodies(node):
            used.update(inner.outputs)
            used.update(v for n in inner.all_nodes() for v in n.inputs if v is not None)
            used.update(v for sub in inner.subgraphs() for v in sub.outputs)
    return nodes[::-1], used


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _embedded(tensor: ir.ExternalTensor) -> onnx.TensorProto:
    """External data read into the protobuf; the mapping of the file is released again."""
    proto = onnx.TensorProto(data_type=int(tensor.dtype), dims=tensor.shape.numpy(), raw_data=tensor.tobytes())
    release(tensor)
    return proto


def _placeholder(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """An initializer whose data is handed over in memory."""
    proto = onnx.TensorProto(
        name=name,
        data_type=int(tensor.dtype),
        dims=list(tensor.shape.numpy()),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    entries = {"location": PLACEHOLDER, "offset": "0", "length": str(tensor.nbytes)}
    proto.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
    return proto


def _shared(tensor: ir.TensorProtocol) -> Array:
    """The tensor's array, contiguous; an external one as a mapping of our own, which the model cannot release."""
    if isinstance(tensor, ir.ExternalTensor):
        return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, tensor.shape.numpy())
    return np.ascontiguousarray(tensor.numpy())
