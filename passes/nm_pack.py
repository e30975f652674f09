"""Packed storage of N:M sparse weights: of every M consecutive weights of an output, N and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from onnxcomp.errors import RecipeError
from onnxcomp.ops import LARGEST_GROUP, MIN_OPSET, keeps_to, packed_bytes, smallest_pattern
from onnxcomp.passes._nm_pack_layers import find_packable, matrix
from onnxcomp.passes._nm_packed import PackedRewriter, Values, pack, stored_bytes, value_bits
from onnxcomp.passes._nm_scores import Pattern
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused


@dataclass(frozen=True, kw_only=True)
class NmPack(Pass):
    """Stores the weights of MatMul and Gemm without the zeros of an N:M pattern, whoever made them sparse.

    A weight takes `N * (bits + ceil(log2 M)) / M` bits: 5 for 2:4 in int8, 2.5 for 1:4. It has to be float32, float16
    or 8-bit integers with a scale for every output or for all, and zero in the middle. Each is read from disk and
    packed by itself. Tables that are looked up, convolutions, products of quantized inputs, which integers compute, and
    weights that would not get smaller stay as they are.

    The ops written run everywhere. A runtime that has no kernel for them unpacks the weights when it loads the model,
    for which ONNX Runtime takes 18 to 26 bytes a weight meanwhile, and is then as fast, and as large in memory, as with
    dense float32 weights: there, only the file is smaller.

    Attributes:
        pattern: "N:M" to pack weights of that pattern only; without, each is packed in the pattern that takes the
            fewest bytes, of those with powers of two from 1:2 to 16:32 and at least half zeros.
        values: How the values of float weights are stored: `keep` changes no bit; `float16`; `int8` with one scale an
            output. Zeros stay exact. Integers stay what they are.
    """

    name: ClassVar[str] = "nm_pack"
    summary: ClassVar[str] = "N:M sparse weights stored as values and packed indices, in float32, float16 or int8"
    min_opset: ClassVar[int] = MIN_OPSET

    pattern: str | None = None
    values: Values = "keep"

    def __post_init__(self) -> None:
        if self.pattern is not None and Pattern.parse(self.pattern).size > LARGEST_GROUP:
            raise RecipeError(f"pattern {self.pattern!r}: indices reach {LARGEST_GROUP}, so M can be no larger")

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        layers, edits = find_packable(model, self.where)
        rewriter = PackedRewriter(model)
        for layer in layers:
            before = stored_bytes(layer)
            pattern = self._pattern(layer, before)
            packed = pack(layer, pattern, self.values) if isinstance(pattern, Pattern) else pattern
            if isinstance(packed, str):
                edits += [refused(node, packed) for node in layer.nodes]
                continue
            assert isinstance(pattern, Pattern)
            rewriter.write(layer, packed, pattern)
            shared = f", shared by {len(layer.nodes)} nodes" if len(layer.nodes) > 1 else ""
            detail = f"{pattern} {packed.values.dtype.name}: {before:,} -> {packed.nbytes:,} bytes{shared}"
            edits += [applied(node, detail) for node in layer.nodes]
        return edits

    def _pattern(self, layer: Layer, before: int) -> Pattern | str:
        """The pattern to pack a weight in, or why there is none."""
        bits = value_bits(layer, self.values)
        with matrix(layer) as weight:
            if self.pattern is not None:
                pattern = Pattern.parse(self.pattern)
                if not keeps_to(weight, pattern.kept, pattern.size):
                    return f"its weight is not {pattern} sparse"
            elif (found := smallest_pattern(weight, bits)) is None:
                return "its weight keeps to no N:M pattern that is half zeros"
            else:
                pattern = Pattern(kept=found[0], size=found[1])
            after = packed_bytes(weight.shape, pattern.kept, pattern.size, bits)
        after += 4 * layer.outputs if bits == 8 else 0
        if after >= before:
            return f"packed {pattern} it would take {after:,} bytes, and it takes {before:,} as it is"
        return pattern
