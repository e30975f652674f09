"""The only door to onnxscript's optimizer, whose interface is still young: everything else goes through here.

Nodes that the optimizer is known to get wrong are hidden from it, and rules that it gets wrong are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from onnxcomp.edit import attribute, constant, users
from onnxcomp.model import all_nodes, initializers

_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft", "onnxcomp"})

# What their reference implementation computes is not what onnxruntime does, or is drawn at random.
_NOT_FOLDED = frozenset({"Bernoulli", "MaxUnpool", "Resize", "Upsample"})


class FoldConstants(ir.passes.InPlacePass):
    """Evaluates what depends on constants only.

    Args:
        output_limit: Largest result in elements that is kept.
    """

    def __init__(self, output_limit: int) -> None:
        super().__init__()
        self._limit = output_limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = len(model.graph)

        def should_fold(node: ir.Node) -> bool | None:
            """None leaves it to the folder, which would hold every transposed weight in memory however large it is."""
            if node.op_type != "Transpose" or node.graph is not model.graph:
                return None
            tensor = node.inputs[0].const_value if node.inputs[0] is not None else None
            return False if tensor is not None and tensor.size > self._limit else None

        with hidden(model):
            fold_constants_ir(model, onnx_shape_inference=True, output_size_limit=self._limit, should_fold=should_fold)
        return ir.passes.PassResult(model, nodes != len(model.graph))


class Simplify(ir.passes.InPlacePass):
    """onnxscript's rules that keep the function: no-ops, chains of reshapes and casts, BatchNorm into Conv.

    Attributes:
        failed: What a rule that could not cope with the model said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = len(model.graph)
        before = _by_input(model)
        chosen = _rules(model.opset_imports.get("", 1))
        with hidden(model):
            try:
                RewriteRuleSet(chosen).apply_to_model(model)
            except Exception:  # a rule that fails must not keep the others from working
                self._one_by_one(chosen, model)
        _restore_weights(model)
        _restore_names(before, _by_input(model))
        return ir.passes.PassResult(model, nodes != len(model.graph))

    def _one_by_one(self, chosen: list[RewriteRule], model: ir.Model) -> None:
        for rule in chosen:
            try:
                RewriteRuleSet([rule]).apply_to_model(model)
            except Exception as error:  # noqa: PERF203 - whatever a rule trips over
                self.failed.append(f"rule {rule.name!r} cannot cope with this model: {error}")


def _rules(opset: int) -> list[RewriteRule]:
    """Rules that are right for models of this opset.

    Left out are: slices to Split, which swaps halves of odd length; the fusions of Min, Max, Clip and Relu, see
    `onnxcomp.passes._clips`; constant ScatterND, which forgets its reduction; Cast of ConstantOfShape, which fails on
    infinity; Pad into ConvInteger, which forgets the zero point.
    """
    chosen = [
        *rules.mul_by_1_rule.commute(),
        *rules.add_0_rule.commute(),
        rules.sub_0_rule,
        rules.div_by_1_rule,
        rules.dropout_zero_rule,
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.normalize_pad_format_conv_rule,
        rules.fuse_pad_into_conv_rule,
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
        rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_conv_transpose_rule,
        rules.remove_optional_bias_from_qlinear_conv_rule,
    ]
    if opset >= 11:
        chosen.append(rules.remove_optional_bias_from_gemm_rule)
    if opset >= 14:
        chosen.append(rules.materialize_reshape_shape_rule)
    return chosen


@contextmanager
def hidden(model: ir.Model) -> Iterator[None]:
    """Gives nodes that optimizers get wrong an op type of their own meanwhile, so that they are left alone."""
    opset = model.opset_imports.get("", 1)
    names = {n: n.op_type for n in all_nodes(model) if _gets_wrong(n, opset)}
    try:
        for index, (node, op_type) in enumerate(names.items()):
            node.op_type = f"{op_type} {index}"
        yield
    finally:
        for node, op_type in names.items():
            node.op_type = op_type


def _gets_wrong(node: ir.Node, opset: int) -> bool:
    if node.domain not in _DOMAINS:
        return True  # it may draw random numbers
    if any(not v.name for v in node.outputs):
        return True  # merging equal nodes would let others read the output that is not there
    check = _CHECKS.get(node.op_type)
    return node.domain == "" and (node.op_type in _NOT_FOLDED or (check is not None and check(node, opset)))


def _is_training(node: ir.Node, opset: int) -> bool:
    if opset < 7:
        return not attribute(node, "is_test", 0)
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    value = None if mode is None else constant(mode)
    return mode is not None and (value is None or bool(value.any()))


def _is_odd_batch_norm(node: ir.Node, opset: int) -> bool:
    types = {v.dtype for v in node.inputs if v is not None and v.dtype is not None}
    return bool(attribute(node, "training_mode", 0)) or not attribute(node, "spatial", 1) or len(types) > 1


_CHECKS: dict[str, Callable[[ir.Node, int], bool]] = {
    "BatchNormalization": _is_odd_batch_norm,
    "CastLike": lambda node, opset: not node.attributes.keys() <= {"to"},  # a Cast in its place would forget them
    "ConcatFromSequence": lambda node, opset: opset < 13,
    "Dropout": _is_training,
    # Behind a DequantizeLinear, onnxruntime 1.32 aborts on a Reshape that a subgraph reads.
    "Flatten": lambda node, opset: any(reader.graph is not node.graph for reader in users(node.outputs[0])),
    "Pad": lambda node, opset: opset < 11,
    "SplitToSequence": lambda node, opset: opset < 18 or constant(node.inputs[1] if node.inputs[1:] else None) is None,
}


def _restore_weights(model: ir.Model) -> None:
    """Registers weights that a rule pushed out when it made one of the same name."""
    kept = {id(v) for v in initializers(model)}
    taken = {v.name for v in initializers(model)}
    for node in all_nodes(model):
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None or id(value) in kept:
                continue
            if value.is_graph_input() or not isinstance(node.graph, ir.Graph):
                continue
            name, number = value.name, 0
            while value.name in taken:
                number += 1
                value.name = f"{name}_{number}"
            model.graph.register_initializer(value)
            kept.add(id(value))
            taken.add(value.name)


_Key: TypeAlias = "tuple[str, str | None]"


def _by_input(model: ir.Model) -> dict[_Key, dict[str | None, ir.Node]]:
    """Nodes by op type and name of the first input, then by name, in order."""
    found: dict[_Key, dict[str | None, ir.Node]] = {}
    for node in model.graph.all_nodes():
        first = node.inputs[0] if node.inputs else None
        found.setdefault((node.op_type, first.name if first is not None else None), {})[node.name] = node
    return found


def _restore_names(before: dict[_Key, dict[str | None, ir.Node]], after: dict[_Key, dict[str | None, ir.Node]]) -> None:
    """A rule puts a nameless node in the place of the old one; selectors and reports go by the name that it had."""
    for key, nodes in after.items():
        old = before.get(key, {})
        gone = [name for name in old if name not in nodes]
        new = [node for name, node in nodes.items() if name not in old]
        if len(gone) == len(new):
            for name, node in zip(gone, new, strict=True):
                node.name = name
