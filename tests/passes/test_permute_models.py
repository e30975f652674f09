"""Orders of channels in whole networks: those of the examples, and what PyTorch's exporters make of small ones."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.export import export_module
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.permute import Permute
from onnxcomp.rewrite import Edit
from onnxcomp.targets.ort import reference_runner

KEPT = re.compile(r"keeps ([\d.]+)% -> ([\d.]+)%")


def gains(edits: list[Edit]) -> dict[str, float]:
    """Percent of the score that more is kept, by layer."""
    found = {e.node: KEPT.search(e.detail) for e in edits if e.action == "applied"}
    return {name: float(m[2]) - float(m[1]) for name, m in found.items() if m}


def largest_change(model: ir.Model, feed: dict[str, np.ndarray], expected: list[np.ndarray]) -> float:
    names = [v.name for v in model.graph.outputs][: len(expected)]
    found = reference_runner(model, names)(feed)
    return max(np.abs(found[n] - e).max() / np.abs(e).max() for n, e in zip(names, expected, strict=True))


def first_output(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    name = model.graph.outputs[0].name
    return [reference_runner(model, [name])(feed)[name]]


@pytest.mark.slow
def test_smollm2(run_passes):
    from examples.llm.gguf import GgufFile
    from examples.llm.model import Config, build, smollm2_weights

    file = GgufFile(smollm2_weights())
    config, model = Config.read(file), build(file)
    empty = np.zeros((1, config.kv_heads, 0, config.head_size), np.float32)
    ids = np.random.default_rng(0).integers(0, 40_000, (2, 1, 32))
    feeds = [
        {"input_ids": i, **{f"past_{k}.{n}": empty for n in range(config.layers) for k in ("key", "value")}}
        for i in ids
    ]
    expected = first_output(model, feeds[0])
    edits = run_passes(model, Permute(search="deal", cache=True), data=feeds).edits
    assert largest_change(model, feeds[0], expected) < 1e-5
    found = gains(edits)
    assert len(found) == 7 * config.layers
    assert np.mean([g for n, g in found.items() if "down" in n]) > 0.2


@pytest.mark.torch
def test_efficientnet(tmp_path, run_passes):
    pytest.importorskip("torch", reason="needs PyTorch")
    export_module("examples.efficientnet.model:model", tmp_path / "m.onnx", input_names=["image"],
                  output_names=["logits"], runner=reference_runner)  # fmt: skip
    model = load(tmp_path / "m.onnx")
    feeds = [{"image": np.random.default_rng(i).uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)} for i in range(2)]
    expected = first_output(model, feeds[0])
    edits = run_passes(model, Permute(), data=feeds).edits
    assert largest_change(model, feeds[0], expected) < 1e-5
    found = gains(edits)
    assert len(found) >= 30
    assert np.mean(list(found.values())) > 1


@pytest.mark.torch
def test_vit(tmp_path, run_passes):
    pytest.importorskip("torch", reason="needs PyTorch")
    from examples.vit.model import weights

    if not weights().is_file():
        pytest.skip(f"the ViT is not at {weights()}: set ONNXCOMP_VIT")
    export_module("examples.vit.model:model", tmp_path / "m.onnx", input_names=["image"], output_names=["logits"],
                  runner=reference_runner)  # fmt: skip
    model = load(tmp_path / "m.onnx")
    shape = tuple(model.graph.inputs[0].shape)
    shape = tuple(d if isinstance(d, int) else 1 for d in shape)
    feeds = [{"image": np.random.default_rng(i).normal(size=shape).astype(np.float32)} for i in range(2)]
    expected = first_output(model, feeds[0])
    edits = run_passes(model, Permute(search="deal"), data=feeds).edits
    assert largest_change(model, feeds[0], expected) < 1e-5
    assert len(gains(edits)) >= 12


def network(name: str):
    """A small network, an input, and how many layers have inputs that can be reordered."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    nn, functional = torch.nn, torch.nn.functional

    class SwiGlu(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, dim=-1)
            return self.down(functional.silu(gate) * up)

    class Inverted(nn.Module):
        """An inverted bottleneck with squeeze and excitation."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.expand, self.norm = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
            self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
            self.project, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)
            self.norm.running_mean.normal_()

        def forward(self, x):
            x = torch.relu(self.stem(x))
            y = functional.hardswish(self.depthwise(functional.relu6(self.norm(self.expand(x)))))
            s = torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))
            y = y * torch.sigmoid(self.excite(s))
            return self.head((x + self.project(y)).mean((2, 3)))

    class Grouped(nn.Module):
        """Attention of four heads of queries that share two of values, in a residual stream."""

        def __init__(self):
            super().__init__()
            self.read = nn.Linear(6, 32)
            self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
            self.q, self.kv, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
            self.head = nn.Linear(32, 7)

        def forward(self, x):
            x = self.read(x)
            y = self.norm(x)
            q = self.q(y).view(*y.shape[:2], 4, 8).transpose(1, 2)
            k, v = (t.view(*y.shape[:2], 2, 8).transpose(1, 2) for t in self.kv(y).split(16, dim=-1))
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.o(y)
            return self.head(self.last(x + self.down(functional.gelu(self.up(self.last(x))))))

    torch.manual_seed(0)
    made, shape, layers = {
        "swiglu": (SwiGlu, (3, 5, 16), 1),
        "inverted": (Inverted, (2, 3, 12, 12), 5),
        "grouped": (Grouped, (2, 5, 6), 6),
    }[name]
    return made().eval(), (torch.randn(shape),), layers


@pytest.mark.torch
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["swiglu", "inverted", "grouped"])
def test_exported(name, dynamo, tmp_path, run_passes):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    module, example, layers = network(name)
    path = tmp_path / "m.onnx"
    if dynamo:
        torch.onnx.export(module, example, str(path), dynamo=True, verbose=False)
    else:
        torch.onnx.export(module, example, str(path), dynamo=False, opset_version=17, input_names=["x"],
                          dynamic_axes={"x": {0: "batch"}})  # fmt: skip
    model = load(path)
    given = {model.graph.inputs[0].name: example[0].numpy()}
    run_passes(model, Cleanup())
    expected = first_output(model, given)
    edits = run_passes(model, Permute(include_ends=True), data=[given]).edits
    assert largest_change(model, given, expected) < 1e-5
    assert len(gains(edits)) >= layers, [(e.node, e.detail) for e in edits]
