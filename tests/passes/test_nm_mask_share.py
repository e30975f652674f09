"""Layers that stay dense where not all may be sparse, and zeros that a later pass has to keep."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.edit import constant
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.targets.ort import reference_runner


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("share", "expected"), [(1.0, 3), (0.7, 2), (0.34, 1), (0.1, 0)])
def test_layers_that_lose_least_are_made_sparse_first(method, share, expected, b, run_passes):
    """Of the second half of the weights is nearly nothing in the third layer, less in the first, much in the second."""
    x = b.input("x", [7, 16])
    for index, rest in enumerate((0.1, 0.9, 0.01)):
        weight = b.rng.choice([-1.0, 1.0], (16, 16)) * np.where(np.arange(16) % 4 < 2, 1.0, rest)[:, None]
        x = b.op("MatMul", x, b.const(weight.astype(np.float32), f"w{index}"), name=f"layer{index}")
    model = b.output(x).model()
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(7, 16)).astype(np.float32)} for _ in range(4)]
    step = NmMask(method=method, share=share, include_ends=True)
    report = run_passes(model, step, data=None if method == "magnitude" else data)
    sparse = [e.node for e in report.edits if e.action == "applied"]
    assert sorted(sparse) == sorted(["layer2", "layer0", "layer1"][:expected])
    for index in range(3):
        zeros = (constant(model.graph.initializers[f"w{index}"]) == 0).mean()
        assert zeros == (0.5 if f"layer{index}" in sparse else 0.0)
    dense = [e.detail for e in report.edits if e.action == "refused"]
    assert all(d.startswith("stays dense, since its output would lose ") for d in dense)


def test_zeros_survive_gptq_in_blocks(b, run_passes):
    weight = b.const(b.rng.normal(size=(64, 32)).astype(np.float32), "w")
    model = b.output(b.op("MatMul", b.input("x", [7, 64]), weight)).model()
    data = [{"x": b.rng.normal(size=(7, 64)).astype(np.float32)} for _ in range(4)]
    run_passes(model, NmMask(method="sparsegpt", include_ends=True), data=data)
    zeros = constant(model.graph.initializers["w"]) == 0
    run_passes(model, WeightOnly(bits=4, block_size=32, method="gptq", min_weights=0), data=data)
    (node,) = (n for n in model.graph if n.op_type == "MatMulNBits")
    session = reference_runner(model, [node.outputs[0].name])
    found = session({"x": np.eye(64, dtype=np.float32)[:7]})[node.outputs[0].name]
    assert zeros[:7].any()
    assert np.abs(found[zeros[:7]]).max() < 1e-5 < np.abs(found[~zeros[:7]]).min()
