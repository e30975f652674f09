"""Feed-forward blocks and attention in what both exporters of PyTorch write, with thresholds against torch itself."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.model import name_nodes
from onnxcomp.passes._attention_layers import find_attention_layers
from onnxcomp.passes._feed_forward import find_feed_forward
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.prune_dead import PruneDead
from onnxcomp.passes.relufy import Relufy
from onnxcomp.passes.threshold import Threshold

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytestmark = pytest.mark.torch

nn, functional = torch.nn, torch.nn.functional
WIDTH, HIDDEN, HEADS = 16, 48, 2


class Gated(nn.Module):
    """Gate and up as two layers, or as one whose output is cut in two, as Phi-3 has it."""

    def __init__(self, act, *, merged: bool):
        super().__init__()
        self.act, self.merged = act, merged
        self.first = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def parts(self, x):
        if self.merged:
            return self.first(x).chunk(2, dim=-1)
        return self.gate(x), self.up(x)

    def forward(self, x):
        gate, up = self.parts(x)
        return x + self.down(self.act(gate) * up)


class Block(nn.Module):
    """Attention and an MLP with biases, as in GPT-2."""

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


def export(module, dynamo: bool) -> ir.Model:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (torch.zeros(1, 12, WIDTH),), file, dynamo=dynamo, input_names=["x"], output_names=["y"],
            opset_version=18, **({"verbose": False} if dynamo else {}),
        )  # fmt: skip
    model = ir.from_proto(onnx.load_from_string(file.getvalue()))
    name_nodes(model)
    return model


def feeds(count: int = 8) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.normal(size=(1, 12, WIDTH)).astype(np.float32)} for _ in range(count)]


ACTS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(("kind", "merged"), [("silu", False), ("gelu", True), ("gelu_tanh", False), ("relu", True)])
def test_gated(kind, merged, dynamo, run_passes, outputs):
    torch.manual_seed(0)
    module = Gated(ACTS[kind], merged=merged)
    model = export(module, dynamo)
    run_passes(model, Cleanup())
    (block,) = find_feed_forward(model).blocks
    assert (block.activation, block.gate is not None, block.hidden) == (kind, True, HIDDEN)
    data = feeds()
    if kind == "relu":
        run_passes(model, Threshold(method="fatrelu", value=0.05), data=data)
        level = 0.05
    else:
        run_passes(model, Threshold(method="cats", sparsity=0.5), data=data)
        with torch.no_grad():
            activated = torch.cat([module.act(module.parts(torch.from_numpy(f["x"]))[0]) for f in data])
        level = float(activated.abs().quantile(0.5))
    assert "GatedMLP" in {n.op_type for n in model.graph}
    with torch.no_grad():
        x = torch.from_numpy(data[0]["x"])
        gate, up = module.parts(x)
        a = module.act(gate)
        want = (x + module.down(torch.where(a.abs() > level, a, 0) * up)).numpy()
    found = outputs(model, data[0])[0]
    # One value between the two thresholds, which differ by less than 1 %, is allowed for.
    assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_block(kind, dynamo, run_passes, outputs):
    torch.manual_seed(0)
    module = Block(ACTS[kind])
    model = export(module, dynamo)
    run_passes(model, Cleanup())
    found = find_feed_forward(model)
    (layers,) = find_attention_layers(model, found.dense)
    assert len(layers.nodes) == 4
    (block,) = found.blocks
    assert (block.activation, block.gate) == (kind, None)
    data = feeds()
    before = outputs(model, data[0])[0]
    for method, count in (("wina", 6), ("chess", 3)):
        changed = model.clone()
        report = run_passes(changed, Threshold(method=method, sparsity=0.1, attention=True), data=data)
        assert sum(e.action == "applied" and bool(e.node) for e in report.edits) == count
        after = outputs(changed, data[0])[0]
        assert 0 < np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)
    report = run_passes(model, Relufy())
    assert (report.applied == 1) == (kind != "relu")
    with torch.no_grad():
        module.act = functional.relu
        want = module(torch.from_numpy(data[0]["x"])).numpy()
    np.testing.assert_allclose(outputs(model, data[0])[0], want, rtol=0, atol=1e-5 * np.abs(want).max())
    run_passes(model, PruneDead(), data=data)
    np.testing.assert_allclose(outputs(model, data[0])[0], want, rtol=0, atol=1e-5 * np.abs(want).max())
