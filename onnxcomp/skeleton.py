"""A model as protobuf without its large weights: enough for the checker and for shape inference, which are C++."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

_SMALL = 4096  # bytes up to which a weight is kept, since shapes depend on its values

_MARK = "dropped by onnxcomp: "


def release(tensor: ir.ExternalTensor) -> None:
    """Closes the mapping of a weight on disk, or leaves that to the last one who still looks at it."""
    try:
        tensor.release()
    except BufferError:  # a view of it is about, such as one that a folder of constants keeps
        tensor.raw = None


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model with every weight that is large or on disk turned into an input; `model` stays as it is."""
    functions = [ir.to_proto(f) for f in model.functions.values()]
    graph = onnx.GraphProto()
    keep: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for owner in (model.graph, *model.graph.subgraphs()):
            for value in owner.initializers.values():
                tensor = value.const_value
                if tensor is not None and (tensor.nbytes > _SMALL or isinstance(tensor, ir.ExternalTensor)):
                    value.const_value = ir.tensor([0.0], name=tensor.name, doc_string=f"{_MARK}{len(keep)}")
                    keep.append((value, tensor))
        graph = ir.to_proto(model.graph)
    finally:
        for value, tensor in keep:
            value.const_value = tensor
    for proto in _graph_protos(graph):
        stay = [t for t in proto.initializer if not t.doc_string.startswith(_MARK)]
        gone = [keep[int(t.doc_string[len(_MARK) :])] for t in proto.initializer if t.doc_string.startswith(_MARK)]
        del proto.initializer[:]
        proto.initializer.extend(stay)
        names = {i.name for i in proto.input}
        proto.input.extend(
            onnx.helper.make_tensor_value_info(value.name or "", tensor.dtype, list(tensor.shape.numpy()))
            for value, tensor in gone
            if value.name not in names
        )
    return onnx.ModelProto(
        ir_version=model.ir_version,
        graph=graph,
        functions=functions,
        opset_import=[onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()],
    )


def merge_types(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    """Takes over the types and shapes of values that stand in `proto`, subgraphs included.

    Args:
        graph: Changed in place.
        proto: The same graph as protobuf, with more known about it.
    """
    known = {v.name: v.type for v in (*proto.output, *proto.value_info)}
    for node, written in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            found = known.get(value.name or "")
            if found is not None and found.WhichOneof("value") is not None:
                kind = ir.serde.deserialize_type_proto_for_type(found)
                shape = ir.serde.deserialize_type_proto_for_shape(found)
                value.type = value.type if kind is None else kind
                value.shape = value.shape if shape is None else shape
        bodies = {a.name: [*a.graphs, *([a.g] if a.HasField("g") else [])] for a in written.attribute}
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                inner_graphs = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                inner_graphs = list(attribute.as_graphs())
            else:
                continue
            for body, inner in zip(inner_graphs, bodies[name], strict=False):  # inference drops malformed ones
                merge_types(body, inner)


def _graph_protos(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graph_protos(inner)
