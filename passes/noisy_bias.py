"""NoisyQuant: a fixed bias before an activation quantizer, taken off again in the bias of the layer behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from annotated_types import Ge, Le
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, in_main_graph, users
from onnxcomp.noise import Method, find_noise
from onnxcomp.passes._bias import shift_bias
from onnxcomp.passes._noise_folds import Fold, attention_folds, direct_fold
from onnxcomp.qdq import QuantizedTensor, dequantized_weight, read_activation
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.stats import Observer, RowSample
from onnxcomp.target import Array

_TREATED = "onnxcomp.noisy_bias"  # metadata of a QuantizeLinear for whose input a noise was searched


@dataclass(frozen=True, kw_only=True)
class Site:
    """A quantized activation and the linear ops that read it.

    Attributes:
        tensor: The activation.
        readers: MatMul and Gemm nodes, all that read it.
    """

    tensor: QuantizedTensor
    readers: tuple[ir.Node, ...]


@dataclass(frozen=True, kw_only=True)
class NoisyBias(Pass):
    """Adds NoisyQuant's bias (Liu et al., arXiv 2211.16056) to quantized inputs of MatMul and Gemm, after `quantize`.

    Where the input comes from a LayerNormalization or an Add of a constant, the bias is folded there; where it is
    attention-weighted values, it is folded into the bias of the value projection, since rows of a softmax sum to one.
    Both are free at run time. Elsewhere an explicit Add is inserted. The bias is searched on one half of the sampled
    rows and kept only where it lowers the layer's output error on the other half. Tensors with structural zeros are
    left alone: a shift would move the zeros off the grid.

    Attributes:
        method: `channel` searches each channel, `random` and `scalar` are the paper's searches, `best` tries all.
        rows: Rows of each activation that are sampled.
        explicit: Also insert an Add where the bias cannot be folded; it costs time.
        min_gain: Least relative fall of the held-out output error for a noise to be kept.
        max_zeros: Largest share of exact zeros in a tensor that is touched.
    """

    name: ClassVar[str] = "noisy_bias"
    summary: ClassVar[str] = "NoisyQuant: fixed bias before activation quantizers, folded where that is free"

    method: Method = "best"
    rows: Annotated[int, Ge(32), Le(1 << 20)] = 1024
    explicit: bool = True
    min_gain: Annotated[float, Ge(0.0), Le(1.0)] = 0.01
    max_zeros: Annotated[float, Ge(0.0), Le(1.0)] = 0.02

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        return {
            site.tensor.value.name or "": RowSample(self.rows, seed=context.seed) for site in self._sites(model, [])
        }

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits: list[Edit] = []
        sites = self._sites(model, edits)
        if not sites:
            return edits
        editor = Editor(model)
        attention = attention_folds(model, context, [s.tensor for s in sites])
        for site in sites:
            fold = direct_fold(site.tensor) or attention.get(site.tensor.quantize)
            edits.append(self._add_noise(editor, site, fold, context))
        return edits

    def _add_noise(self, editor: Editor, site: Site, fold: Fold | None, context: Context) -> Edit:
        node = site.readers[0]
        if fold is None and not self.explicit:
            return refused(node, "the noise cannot be folded, and explicit = false")
        rows = context.statistic(site.tensor.value.name or "", RowSample).sample
        zeros = float((rows == 0.0).mean())
        if zeros > self.max_zeros:
            return refused(node, f"{zeros:.0%} of its input are exact zeros, which noise would move off the grid")
        weights = [_matrix(reader) for reader in site.readers]
        site.tensor.quantize.metadata_props[_TREATED] = self.method
        noise = find_noise(rows, np.concatenate(weights, axis=1), site.tensor.grid, self.method, context.seed)
        if noise.ratio > 1.0 - self.min_gain:
            return refused(node, f"no noise lowers the held-out output error by {self.min_gain:.0%}")
        vector = noise.vector
        if fold is not None:
            vector = fold.shift(editor, vector)
        else:
            _add_explicitly(editor, site.tensor, vector)
        for reader, weight in zip(site.readers, weights, strict=True):
            shift_bias(editor, reader, -(vector @ weight), site.tensor.grid.scale)
        where = fold.place if fold is not None else "explicit Add"
        return applied(node, f"{noise.method} noise in {where}; held-out output error x {noise.ratio:.3f}")

    def _sites(self, model: ir.Model, edits: list[Edit]) -> list[Site]:
        found: list[Site] = []
        for quantizer in model.graph:
            if quantizer.op_type != "QuantizeLinear":
                continue
            pair = next((n for n in _pair_end(quantizer) if n.op_type == "DequantizeLinear"), None)
            tensor = read_activation(pair.outputs[0]) if pair is not None else None
            if pair is None or tensor is None or tensor.grid.scale.ndim:
                continue
            readers = users(pair.outputs[0])
            if not readers or not any(self.where(r) for r in readers):
                continue
            if _TREATED in quantizer.metadata_props:
                edits.append(refused(readers[0], "a noise was searched for its input already"))
                continue
            unfit = next((r for r in readers if not _is_linear(model, r)), None)
            if unfit is None:
                found.append(Site(tensor=tensor, readers=tuple(readers)))
            elif any(_is_linear(model, r) for r in readers) or unfit.op_type == "Conv":
                padded = "padding inserts zeros behind the noise"
                reason = padded if unfit.op_type == "Conv" else "it would see the noise"
                edits.append(refused(unfit, f"it reads the quantized tensor, and {reason}"))
        return found


def _pair_end(quantizer: ir.Node) -> list[ir.Node]:
    readers = users(quantizer.outputs[0])
    return users(readers[0].outputs[0]) if len(readers) == 1 and readers[0].op_type == "Clip" else readers


def _is_linear(model: ir.Model, node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or not in_main_graph(model, node) or attribute(node, "transA", 0):
        return False
    weight = dequantized_weight(node.inputs[1])
    return weight is not None and weight.ndim == 2


def _matrix(node: ir.Node) -> Array:
    """Weight as `(channels, outputs)`."""
    weight = dequantized_weight(node.inputs[1])
    assert weight is not None
    return weight.T if attribute(node, "transB", 0) else weight


def _add_explicitly(editor: Editor, tensor: QuantizedTensor, vector: Array) -> None:
    name = f"{tensor.value.name}_noisy"
    inputs = [tensor.value, editor.weight(f"{name}_bias", vector.astype(np.float32))]
    tensor.quantize.replace_input_with(0, editor.before(tensor.quantize, "Add", inputs, name=name, like=tensor.value))
