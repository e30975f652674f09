"""Jacobian-weighted errors against exact derivatives, and blocks by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.passes._groups import groups
from onnxcomp.passes._jacobian import Jacobian
from onnxcomp.passes._sensitivity import Trials
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import reference_runner


def test_linear_model_against_the_exact_jacobian(capabilities):
    """Of two matrices the second is the Jacobian of the first's output; each row of 256 has random signs of its own."""
    b = Builder()
    first, second = (b.rng.normal(size=shape).astype(np.float32) for shape in ((16, 12), (12, 6)))
    second[3] *= 30.0
    y = b.op("MatMul", b.input("x", [1, 64, 16]), b.const(first), name="first")
    model = b.output(b.op("MatMul", y, b.const(second), name="second")).model()
    data = [{"x": np.random.default_rng(i).normal(size=(1, 64, 16)).astype(np.float32)} for i in range(8)]
    pipeline = Pipeline(passes=[], capabilities=capabilities, runner=reference_runner)
    trials = Trials(model=model, context=pipeline.context(data), step=Quantize(), samples=8)
    nodes = trials.linears()
    jacobian = Jacobian(trials, nodes)
    alone = trials.only(["first"])
    found = jacobian.error(nodes[0], alone)
    run = reference_runner(alone, ["first_out"])
    noise = power = 0.0
    for feed in data[::2]:  # which 4 of the 8 are looked at
        exact = feed["x"][0].astype(np.float64) @ first
        sizes = ((run(feed)["first_out"][0] - exact) ** 2).mean(axis=0)
        noise += 64 * float(sizes @ (second.astype(np.float64) ** 2).sum(axis=1))
        power += float(((exact @ second) ** 2).sum())
    assert found == pytest.approx(noise / power, rel=0.15)  # 256 rows of random signs
    assert jacobian.error(nodes[0], alone) == found  # the same signs each time


def test_the_model_stays_as_it_is(capabilities):
    b = Builder()
    model = b.output(b.op("Conv", b.input("x", [1, 3, 8, 8]), b.floats(4, 3, 3, 3), name="only")).model()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    data = [{"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}]
    pipeline = Pipeline(passes=[], capabilities=capabilities, runner=reference_runner)
    trials = Trials(model=model, context=pipeline.context(data), step=Quantize(), samples=1)
    (node,) = trials.linears()
    weighted = Jacobian(trials, [node]).error(node, trials.only(["only"]))
    assert 1e-6 < weighted < 1e-3
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_outputs_that_are_no_floats_have_no_jacobian(capabilities):
    b = Builder()
    y = b.op("ArgMax", b.op("MatMul", b.input("x", [1, 16]), b.floats(16, 4), name="only"), axis=-1)
    model = b.output(y, 7).model()
    data = [{"x": np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)}]
    pipeline = Pipeline(passes=[], capabilities=capabilities, runner=reference_runner)
    trials = Trials(model=model, context=pipeline.context(data), step=Quantize(), samples=1)
    (node,) = trials.linears()
    assert Jacobian(trials, [node]).error(node, trials.only(["only"])) == 0.0


def nodes(*names: str) -> list[ir.Node]:
    return [ir.node("MatMul", [], name=name) for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/blocks.0/fc1/MatMul", "/blocks.0/fc2/MatMul", "/blocks.1/fc1/MatMul"], ["blocks.0", "blocks.1"]),
        (["/m/layer.0/q/MatMul", "/m/layer.1/q/MatMul", "/m/head/Gemm"], ["m.layer.0", "m.layer.1", "m.head"]),
        (["encoder.layers.3.fc", "encoder.layers.4.fc"], ["encoder.layers.3", "encoder.layers.4"]),
        (["MatMul_1", "MatMul_2"], ["MatMul"]),
    ],
)
def test_blocks_by_name(names, expected):
    assert list(groups(nodes(*names))) == expected


def test_blocks_by_module():
    first, second = nodes("node_1", "node_2")
    for index, node in enumerate((first, second)):
        scopes = ["", "vit", f"vit.blocks.{index}", f"vit.blocks.{index}.fc", "op"]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(scopes)
    assert list(groups([first, second])) == ["vit.blocks.0", "vit.blocks.1"]
