"""Finds what a rotation can be folded into, and folds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, bypass, constant, in_main_graph, redirect, replace_output, users
from onnxcomp.passes._bias import find_bias
from onnxcomp.passes._hadamard import rotate, rotation
from onnxcomp.passes._rotation_elementwise import ELEMENTWISE_RULES, betas, is_norm
from onnxcomp.passes._rotation_flow import Flow
from onnxcomp.passes._rotation_layout import LAYOUT_RULES
from onnxcomp.passes._rotation_linear import LINEAR_RULES, attention_values
from onnxcomp.passes._turns import Shapes, Turn, Use, agree, constant_shape, is_constant, transposed_constant
from onnxcomp.target import Array

_RULES = {**LINEAR_RULES, **ELEMENTWISE_RULES, **LAYOUT_RULES}
_TREATED = "onnxcomp.rotate"  # start of the metadata of a node whose channels were turned
_SMALLEST = 16  # channels that are worth turning at run time


@dataclass(frozen=True, kw_only=True)
class Seed:
    """An activation from which a rotation may spread.

    Attributes:
        value: The activation.
        node: Its reader, a norm or the op that weighs values by attention.
    """

    value: ir.Value
    node: ir.Node


def norm_seeds(model: ir.Model) -> Iterator[Seed]:
    """Inputs of norms, in one op or decomposed."""
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        if source is None:
            continue
        if is_norm(node):
            yield Seed(value=source, node=node)
        elif node.op_type == "ReduceMean" and (square := source.producer()) is not None:
            squared = square.inputs[0] if square.inputs else None
            if squared is not None and (
                square.op_type == "Pow" or (square.op_type == "Mul" and square.inputs[1] is squared)
            ):
                yield Seed(value=squared, node=square)


def value_seeds(model: ir.Model) -> Iterator[Seed]:
    """Values that attention weighs."""
    for node in model.graph:
        value = attention_values(node)
        if value is not None and not is_constant(value):
            yield Seed(value=value, node=node)


def find_flow(model: ir.Model, shapes: Shapes, seed: Seed, block: int, label: str, *, cache: bool = False) -> Flow:
    """Everything that turns with the seed; its objections say what stands against it."""
    flow = Flow(model=model, shapes=shapes, rules=_RULES, block=block, cache=cache)
    flow.spread(seed.value, seed.node)
    if not flow.objections:
        flow.objections += list(_weight_objections(flow, seed.node, label))
    return flow


def _weight_objections(flow: Flow, start: ir.Node, label: str) -> Iterator[tuple[ir.Node, str]]:
    for node in flow.nodes:
        if is_turned(node, label):
            yield node, "it is rotated already"
    for use in flow.uses.values():
        if any((reader, i) not in flow.uses for reader, i in use.value.uses()) or use.value.is_graph_output():
            yield use.node, f"constant {use.value.name!r} is read by an op besides that does not turn"
        array = constant(use.value)
        if array is None or array.dtype.kind not in "fV" or not np.isfinite(array.astype(np.float32, copy=False)).all():
            yield use.node, f"constant {use.value.name!r} is not floating-point, or holds NaN or infinity"
    ends = [v.is_graph_input() for v in flow.turns if v.is_graph_input() or v.is_graph_output()]
    if ends.count(True) != ends.count(False):
        yield start, "the cache has not as many inputs as outputs"
    if not flow.readers or not flow.writers:
        yield start, "no linear op reads the channels, or none writes them"


def fold(editor: Editor, flow: Flow, matrix: Array, label: str) -> list[str]:
    """Turns all constants of the flow, gammas and betas going into the readers.

    Args:
        editor: Of the main graph.
        flow: Without objections.
        matrix: Rotation of one block.
        label: Of the metadata.

    Returns:
        What was added to the graph, in words.
    """
    added = _untie(editor, flow, matrix)
    for node, turn in flow.readers.items():
        if turn.shift is not None:
            added += _shift(editor, node, turn.shift)
    for use, nodes in _shared(flow):
        _turn_weight(editor, use, nodes, matrix)
    for node, data in flow.scales.items():
        bypass(node, data)
    for node, indices in flow.norms.items():
        _neutralize(editor, node, indices)
    for value in flow.turns:
        if value.producer() is not None and value.uses():
            editor.rename(value, "rotated")
    for node in flow.nodes:
        node.metadata_props[f"{_TREATED}.{label}"] = str(len(matrix))
    return added


def _shared(flow: Flow) -> Iterator[tuple[Use, list[tuple[ir.Node, int]]]]:
    """Each constant once a way of turning it, with its readers."""
    groups: dict[ir.Value, list[list[Use]]] = {}
    for use in flow.uses.values():
        kinds = groups.setdefault(use.value, [])
        same = next((kind for kind in kinds if agree(kind[0], use)), None)
        kinds.append([use]) if same is None else same.append(use)
    for kinds in groups.values():
        for kind in kinds:
            yield kind[0], [(use.node, use.index) for use in kind]


def _turn_weight(editor: Editor, use: Use, readers: list[tuple[ir.Node, int]], matrix: Array) -> None:
    array = constant(use.value)
    assert array is not None
    turned = rotate(array, use.axis, matrix, use.gain, use.window)
    new = editor.weight(f"{use.value.name}_rotated", turned)
    for node, index in readers:
        node.replace_input_with(index, new)


def _untie(editor: Editor, flow: Flow, matrix: Array) -> list[str]:
    """Where a weight is read with a gain and without, as by a tied head behind a norm, the gain gets its own MatMul.

    `x @ (Q.T * gain) @ Q` has the gain in it and is turned, so that both read one weight all the same.
    """
    added = []
    for node, turn in list(flow.readers.items()):
        weight, data = node.inputs[1], node.inputs[0]
        assert weight is not None
        assert data is not None
        transpose = weight.producer() if transposed_constant(weight) is not None else None
        key = (node, 1) if transpose is None else (transpose, 0)
        use = flow.uses[key]
        array = constant(use.value)
        assert array is not None
        if use.gain is None or all(agree(use, u) for u in flow.uses.values() if u.value is use.value):
            continue
        mixed = editor.weight(f"{node.name}_rotation_weight", (matrix.T * use.gain @ matrix).astype(array.dtype))
        new = editor.before(node, "MatMul", [data, mixed], name=f"{node.name}_rotation", like=data)
        if turn.shift is not None:
            vector = editor.weight(f"{node.name}_shift", (turn.shift @ matrix).astype(array.dtype))
            new = editor.before(node, "Add", [new, vector], name=f"{node.name}_shift", like=data)
        node.replace_input_with(0, new)
        flow.uses[key] = replace(use, gain=None)
        flow.readers[node] = Turn()
        added.append(f"MatMul of {len(matrix)} x {len(matrix)} before {node.name!r}, whose weight others read, too")
    return added


def _shift(editor: Editor, node: ir.Node, shift: Array) -> list[str]:
    """Adds what the norm no longer adds, through the weight as it was, to the bias of a reader."""
    given = node.inputs[1]
    assert given is not None
    source = transposed_constant(given)
    weight = constant(given if source is None else source)
    assert weight is not None
    swapped = (source is not None) != bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    delta = shift @ (weight.T if swapped else weight).astype(np.float64)
    bias = find_bias(node)
    old = None if bias is None else constant(bias.value)
    if bias is not None and old is not None:
        new = editor.weight(f"{bias.value.name}_shifted", (old + delta).astype(old.dtype))
        redirect(bias.value, new, [bias.user])
        return []
    if not delta.any():
        return []
    vector = editor.weight(f"{node.name}_shift", delta.astype(weight.dtype))
    if node.op_type == "Gemm" and (len(node.inputs) < 3 or node.inputs[2] is None):
        node.resize_inputs(3)
        node.replace_input_with(2, vector)
        return []
    output, readers = node.outputs[0], users(node.outputs[0])
    total = editor.after(output, "Add", [output, vector], name=f"{output.name}_shifted", like=output)
    redirect(output, total, readers)
    if output.is_graph_output():
        replace_output(output, total)
    return [f"Add behind {node.name!r}, which had no constant bias for the beta of the norm"]


def _neutralize(editor: Editor, node: ir.Node, indices: tuple[int, ...]) -> None:
    """Sets gamma to one and beta to zero. The ops stay: runtimes fuse the whole pattern only."""
    for index in indices:
        value = node.inputs[index]
        array = constant(value)
        assert value is not None
        assert array is not None
        fill = np.zeros_like(array) if index == betas(node) else np.ones_like(array)
        node.replace_input_with(index, editor.weight(f"{value.name}_folded", fill))


def turn_online(editor: Editor, shapes: Shapes, node: ir.Node, most: int, seed: int) -> str:
    """Turns blocks of the input of a linear op at run time, and the weight to match.

    Args:
        editor: Of the main graph.
        shapes: Of the model.
        node: A MatMul or Gemm with a constant weight.
        most: Largest block.
        seed: Of the signs.

    Returns:
        Why it cannot be; empty if it is done.
    """
    data, weight = node.inputs[0], node.inputs[1]
    shape, sizes = constant_shape(weight), shapes.sizes(data)
    if data is None or weight is None or shape is None or transposed_constant(weight) is not None or not sizes:
        return "the shape of its input is not known, or its weight is transposed at run time"
    swapped = bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    channels = shape[1] if swapped else shape[0]
    block = min(channels & -channels, most)
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return "its weight is shared"
    if block < _SMALLEST:
        return f"its {channels} channels make no blocks of {_SMALLEST} or more"
    array = constant(weight)
    assert array is not None
    matrix = rotation(block, seed)
    name, leading = f"{node.name}_rotation", [0] * (len(sizes) - 1)
    parts = editor.weight(f"{name}_parts", np.array([*leading, channels // block, block]))
    whole = editor.weight(f"{name}_whole", np.array([*leading, channels]))
    factor = editor.weight(f"{name}_weight", matrix.astype(array.dtype))
    split = editor.before(node, "Reshape", [data, parts], name=f"{name}_split")
    turned = editor.before(node, "MatMul", [split, factor], name=name)
    joined = editor.before(node, "Reshape", [turned, whole], name=f"{name}_join", like=data)
    node.replace_input_with(0, joined)
    node.replace_input_with(1, editor.weight(f"{weight.name}_online", rotate(array, int(swapped), matrix, None, None)))
    node.metadata_props[f"{_TREATED}.online"] = str(block)
    return ""


def is_turned(node: ir.Node, label: str) -> bool:
    """Whether the channels of a node were turned before."""
    return f"{_TREATED}.{label}" in node.metadata_props


def in_subgraph(model: ir.Model) -> Iterator[ir.Node]:
    """Norms that stand in a subgraph or function."""
    for node in model.graph.all_nodes():
        if is_norm(node) and not in_main_graph(model, node):
            yield node
    for function in model.functions.values():
        yield from (node for node in function.all_nodes() if is_norm(node))
