"""What kind of model a graph is taken for, and why."""

from __future__ import annotations

from typing import get_args

import kinds
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.kind import KindName, classify

CASES = [(kind, name) for kind, models in kinds.KINDS.items() for name, _ in models]


def made(kind: str, name: str) -> ir.Model:
    return dict(kinds.KINDS[kind])[name]()


def test_every_kind_has_a_case():
    assert set(kinds.KINDS) == set(get_args(KindName))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_kind(kind, name):
    model = made(kind, name)
    before = ir.to_onnx_text(model)
    found = classify(model)
    assert found.name == kind, str(found)
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_names_play_no_part(kind, name):
    model = made(kind, name)
    values = {*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph.all_nodes() for v in n.outputs)}
    for number, value in enumerate(values):
        value.name = f"v{number}"
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{number}"
    assert classify(model).name == kind


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_untyped_values(kind, name):
    """Only what the model says of its inputs and weights is needed, except for the shapes of states."""
    model = made(kind, name)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None
    assert classify(model).name == kind


@pytest.mark.parametrize(
    ("kind", "name", "evidence"),
    [
        ("cnn", "float", "2 convolutions with 792 weights"),
        ("cnn", "quantized", "2 convolutions with 1,152 weights"),
        ("transformer-encoder", "plain", "1 attention block;"),
        ("decoder-lm", "trilu", "ids looks up 96 tokens"),
        ("decoder-lm", "trilu", "scores 96 tokens"),
        ("decoder-lm", "trilu", "causal mask (Trilu)"),
        ("decoder-lm", "constant", "causal mask (constant triangle)"),
        ("decoder-lm", "range", "causal mask (Greater of positions)"),
        ("decoder-lm", "grouped", "causal by GroupQueryAttention"),
        ("decoder-lm", "cached", "2 cache tensors in and out"),
        ("decoder-lm", "grouped", "2 cache tensors in and out"),
        ("decoder-lm", "embeddings", "scores 5000 tokens"),
        ("recurrent-streaming", "lstm", "2 states in and out"),
        ("recurrent-streaming", "gru", "1 state in and out"),
    ],
)
def test_evidence(kind, name, evidence):
    assert evidence in str(classify(made(kind, name)))


def test_a_tied_weight_counts_once():
    tied, untied = (str(classify(kinds.decoder(tied=t))) for t in (True, False))
    blocks = 4 * 32 * 32 + 2 * 32 * 128
    assert f"7 matrix products with {blocks + 96 * 32:,} weights" in tied
    assert tied.split("; ")[-1] == untied.split("; ")[-1]


def test_a_weight_of_two_layers_counts_once():
    b = Builder()
    weight = b.floats(4, 4, 3, 3)
    y = b.op("Conv", b.op("Conv", b.input("x", [1, 4, 8, 8]), weight), weight)
    assert str(classify(b.output(y).model())) == "cnn (2 convolutions with 144 weights)"


def test_layers_in_functions_are_seen():
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[1, 1, 8, 8] x) => (float[1, 1, 6, 6] y)
        <float[1, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> { y = local.Layer(x, w) }
        <domain: "local", opset_import: ["" : 17]> Layer (p, q) => (r) { r = Conv(p, q) }""")
    assert classify(model).name == "cnn"
    assert len(model.functions) == 1, "it stays as it is"


def test_a_model_without_layers():
    model = ir.from_onnx_text('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    assert str(classify(model)) == "other (no layer with weights)"


@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("local.F (x, x)", '<domain: "local", opset_import: ["" : 17]> F (a) => (b) { b = Relu (a) }'),
        ("local.F (x)", '<domain: "local", opset_import: ["" : 13]> F (a) => (b) { b = Relu (a) }'),
        ("local.F (x)", '<domain: "local", opset_import: ["local" : 1]> F (a) => (b) { b = local.F (a) }'),
    ],
    ids=["too many inputs", "another opset", "calls itself"],
)
def test_function_that_cannot_be_inlined(call, function):
    """What stands around the call is still seen."""
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "local" : 1]> '
        "g (float[1, 1, 8, 8] x) => (float[1, 1, 6, 6] y) <float[1, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> "
        f"{{ z = {call}\n y = Conv (z, w) }}\n{function}"
    )
    before = ir.to_onnx_text(model)
    assert classify(model).name == "cnn"
    assert ir.to_onnx_text(model) == before


@pytest.mark.torch
@pytest.mark.parametrize("dynamo", [True, False])
def test_torch_exports(dynamo, tmp_path):
    """The same decoder from both exporters of PyTorch."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(96, 32)
            self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

        def forward(self, ids):
            x = self.table(ids)
            q, k, v = self.qkv(x).view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(1, -1, 32))
            return x @ self.table.weight.T

    path = tmp_path / "m.onnx"
    options = {"dynamo": True, "verbose": False} if dynamo else {"dynamo": False, "opset_version": 17}
    torch.onnx.export(Decoder().eval(), (torch.zeros(1, 12, dtype=torch.int64),), str(path), **options)
    found = classify(ir.load(path))
    assert found.name == "decoder-lm"
    assert "causal mask" in str(found)
    assert "1 attention block;" in str(found)
