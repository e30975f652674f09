"""Rotations in what both exporters of PyTorch make of Llama and GPT-2."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.rotate import Rotate

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytestmark = pytest.mark.torch

nn, functional = torch.nn, torch.nn.functional
WIDTH, HEADS, KV_HEADS, SIZE, VOCABULARY = 48, 4, 2, 12, 64


class RmsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Llama(nn.Module):
    """One layer with rotary positions and grouped queries."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(RmsNorm() for _ in range(3))
        widths = {"q": WIDTH, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE, "o": WIDTH, "gate": 96, "up": 96}
        self.linears = nn.ModuleDict({k: nn.Linear(WIDTH, w, bias=False) for k, w in widths.items()})
        self.down, self.head = nn.Linear(96, WIDTH, bias=False), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def attend(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (self.linears[n](x).view(batch, tokens, -1, SIZE).transpose(1, 2) for n in "qkv")
        angle = torch.arange(tokens)[:, None] / 10.0 ** (torch.arange(0, SIZE, 2) / SIZE)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat((-t[..., SIZE // 2 :], t[..., : SIZE // 2]), -1) * sin for t in (q, k))
        shape = (batch, KV_HEADS, HEADS // KV_HEADS, tokens, SIZE)
        k, v = (t[:, :, None].expand(shape).reshape(batch, HEADS, tokens, SIZE) for t in (k, v))
        mask = torch.full((tokens, tokens), -1e9).triu(1)
        y = (q @ k.transpose(2, 3) / SIZE**0.5 + mask).softmax(-1) @ v
        return self.linears["o"](y.transpose(1, 2).reshape(batch, tokens, WIDTH))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attend(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.down(functional.silu(self.linears["gate"](y)) * self.linears["up"](y))
        return self.head(self.norms[2](x))


class Rows(nn.Module):
    """GPT-2's Conv1D."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.1), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], len(self.bias))


class Gpt2(nn.Module):
    """One layer with one projection for queries, keys and values, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(32, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.qkv, self.o = Rows(WIDTH, 3 * WIDTH), Rows(WIDTH, WIDTH)
        self.up, self.down = Rows(WIDTH, 96), Rows(96, WIDTH)

    def forward(self, ids):
        batch, tokens = ids.shape
        x = self.table(ids) + self.places(torch.arange(tokens))
        parts = self.qkv(self.norms[0](x)).split(WIDTH, dim=2)
        q, k, v = (t.view(batch, tokens, HEADS, SIZE).transpose(1, 2) for t in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        x = x + self.down(functional.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return functional.linear(self.norms[2](x), self.table.weight)


@pytest.mark.parametrize("network", [Llama, Gpt2])
@pytest.mark.parametrize("dynamo", [True, False])
def test_exported(network, dynamo, tmp_path, run_passes, outputs):
    torch.manual_seed(0)
    path, example = tmp_path / "m.onnx", (torch.zeros(1, 8, dtype=torch.int64),)
    axes = {"ids": {0: "batch", 1: "tokens"}}
    if dynamo:
        torch.onnx.export(network().eval(), example, str(path), dynamo=True, dynamic_shapes=axes, verbose=False)
    else:
        options = {"opset_version": 17, "input_names": ["ids"], "dynamic_axes": axes}
        torch.onnx.export(network().eval(), example, str(path), dynamo=False, **options)
    model = ir.load(path)
    feed = {model.graph.inputs[0].name: np.random.default_rng(0).integers(0, VOCABULARY, (2, 11))}
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    edits = run_passes(model, Rotate(online=True)).edits
    assert not [e for e in edits if e.action == "refused"]
    assert sum("stream" in e.detail for e in edits) == (8 if network is Llama else 5)
    assert sum("values" in e.detail for e in edits) == 2
    assert sum("run time" in e.detail for e in edits) == 1
    assert np.abs(outputs(model, feed)[0] - expected).max() < 2e-5 * np.abs(expected).max()
