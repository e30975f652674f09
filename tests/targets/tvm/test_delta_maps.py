"""Layers that compute changed pixels only, by TVM: each against ONNX Runtime's dense op.

Inputs and weights of single layers are small integers: every sum is exact then, and so are comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

tvm = pytest.importorskip("tvm")

from builder import Builder  # noqa: E402
from tvm_harness import Compiled, machines  # noqa: E402

from onnxcomp import native  # noqa: E402
from onnxcomp.edit import Editor  # noqa: E402
from onnxcomp.targets.ort import reference_runner  # noqa: E402
from onnxcomp.targets.tvm.importing import to_relax  # noqa: E402
from onnxcomp.targets.tvm.lower.delta_maps import replace_map_op  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402
from onnxcomp.targets.tvm.pipeline import build  # noqa: E402

BEST = machines()[-1]
Array = np.ndarray[Any, Any]
Given = dict[str, Array]


def integers(rng: np.random.Generator, *shape: int, most: int = 4) -> Array:
    return rng.integers(-most, most + 1, shape).astype(np.float32)


def change(rng: np.random.Generator, x: Array) -> tuple[Array, Array]:
    """New values in a rectangle of each image and in some single pixels, and the mask of these."""
    n, h, w = x.shape[:3]
    mask = (rng.random((n, h, w)) < 0.02).astype(np.uint8)
    for image in range(n):
        top, left = rng.integers(h), rng.integers(w)
        mask[image, top : top + 1 + rng.integers(h), left : left + 1 + rng.integers(w)] = 1
        if rng.random() < 0.3:
            mask[image] = 0
    return np.where(mask[..., None] != 0, integers(rng, *x.shape), x), mask


def one_layer(op_type: str, given: Given, constants: Given, out: Sequence[int], **attributes: Any) -> ir.Model:
    """One op of the native library, lowered to ours; all inputs but `constants` are given in each step."""
    every = {**given, **constants}
    last = ["last", "started", "threshold", "step"]
    names = [*(name for name in every if name not in last), *last]
    node = helper.make_node(op_type, names, ["held", "sent"], name="layer", domain=native.DOMAIN, **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in every.items()}
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(name, kinds[name], every[name].shape) for name in given],
        [
            helper.make_tensor_value_info("held", onnx.TensorProto.FLOAT, out),
            helper.make_tensor_value_info("sent", onnx.TensorProto.UINT8, out[:3]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(native.DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    replace_map_op(Editor(model), model.graph[0])
    return model


class Layer(Compiled):
    """`one_layer`, compiled."""

    def __init__(
        self, op_type: str, given: Given, constants: Given, out: Sequence[int], machine: Machine, **attributes: Any
    ) -> None:
        super().__init__(one_layer(op_type, given, constants, out, **attributes), [], machine)

    def bind(self, feed: Mapping[str, Array]) -> list[Any]:
        return [tvm.runtime.tensor(np.asarray(feed[name])) for name in self.names if name in feed] + self._weights


def dense(node: onnx.NodeProto, *inputs: Array) -> Array:
    """What ONNX Runtime computes, `[N, H, W, C]` of inputs of which the first ones are maps of that layout."""
    b = Builder()
    b.nodes.append(node)
    feed = {name: np.ascontiguousarray(a) for name, a in zip(node.input, inputs, strict=True)}
    for name, array in feed.items():
        b.input(name, list(array.shape))
    (y,) = reference_runner(b.output("y").model(opset=18), ["y"], threads=1)(feed).values()
    return np.asarray(y).transpose(0, 2, 3, 1)


def channels_first(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


def follow(
    op_type: str,
    maps: Sequence[Array],
    value: Callable[..., Array],
    reached: Callable[..., Array],
    machine: Machine = BEST,
    *,
    weights: Given | None = None,
    threshold: float = 0.0,
    step: Any = (0.0,),
    after: Callable[[Array], Array] = lambda y: y,
    **attributes: Any,
) -> None:
    """Six steps of a layer with changing maps; `value(*maps)` and `reached(*masks)` are the references."""
    rng = np.random.default_rng(1)
    held = np.full_like(value(*maps), np.nan)
    given: Given = {}
    for i, m in enumerate(maps):
        given |= {f"x{i}": m, f"mask{i}": np.ones(m.shape[:3], np.uint8)}
    given |= {"last": held, "started": np.array(False)}
    steps = np.asarray(step, np.float32)
    constants = {**(weights or {}), "threshold": np.array([threshold], np.float32), "step": steps}
    layer = Layer(op_type, given, constants, held.shape, machine, **attributes)
    for _ in range(6):
        masks = [given[f"mask{i}"] for i in range(len(maps))]
        y = after(value(*(given[f"x{i}"] for i in range(len(maps)))))
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.where(steps > 0, np.round(y / steps) * steps, y).astype(np.float32)
            over = ~(np.square(y - held).sum(-1) <= np.float32(threshold) ** 2 * held.shape[-1])
        sent = (reached(*masks) != 0) & over if given["started"] else np.ones(held.shape[:3], bool)
        held = np.where(sent[..., None], y, held)
        found = layer.run(given)
        np.testing.assert_array_equal(found[1], sent)
        np.testing.assert_allclose(found[0], held, rtol=1e-6, atol=1e-6)
        given |= {"last": found[0], "started": np.array(True)}
        held = found[0].copy()
        for i in range(len(maps)):
            given[f"x{i}"], given[f"mask{i}"] = change(rng, given[f"x{i}"])


def slides(
    kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int] = (1, 1)
) -> tuple[dict[str, Any], dict[str, int]]:
    """What slides, as ONNX has it and as our layers do; `pads` are top, left, bottom, right."""
    ours = {"stride_h": strides[0], "stride_w": strides[1], "pad_top": pads[0], "pad_left": pads[1]}
    ours |= {"dilation_h": dilations[0], "dilation_w": dilations[1]}
    theirs = {"kernel_shape": kernel, "strides": strides, "pads": pads, "dilations": dilations}
    return theirs, ours


def follow_conv(
    machine: Machine, shape: Sequence[int], weight: Sequence[int], slide: tuple[Any, ...], group: int = 1, **how: Any
) -> None:
    """A convolution of weight (KH, KW, C / group, N)."""
    rng = np.random.default_rng(0)
    theirs, ours = slides(weight[:2], *slide)
    w, b = integers(rng, *weight), integers(rng, weight[3])
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=group, **theirs)
    alone = helper.make_node("Conv", ["x", "w"], ["y"], **theirs)
    ones = np.ones((1, 1, *weight[:2]), np.float32)
    follow(
        "DeltaConv",
        [integers(rng, *shape)],
        lambda x: dense(node, channels_first(x), w.transpose(3, 2, 0, 1), b),
        lambda mask: dense(alone, mask[:, None].astype(np.float32), ones)[..., 0],
        machine,
        weights={"w": w, "b": b},
        group=group,
        **ours,
        **how,
    )


RELU = {"activation": 1, "after": lambda y: np.maximum(y, 0)}
LEAKY = {"activation": 3, "alpha": 0.25, "after": lambda y: np.where(y < 0, y * np.float32(0.25), y)}
CLIP = {"activation": 2, "alpha": -8.0, "beta": 20.0, "after": lambda y: np.clip(y, -8, 20)}
CONVS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "1x1": (((2, 17, 19, 24), (1, 1, 24, 97), ((1, 1), (0, 0, 0, 0))), RELU),
    "first": (((1, 23, 30, 3), (3, 3, 3, 32), ((2, 2), (1, 1, 0, 1))), {"threshold": 9.0}),
    "lopsided": (((2, 11, 9, 4), (2, 3, 4, 16), ((1, 2), (0, 2, 1, 0))), {"threshold": 9.0, "step": [4.0]}),
    "groups": (
        ((1, 11, 9, 12), (3, 2, 3, 20), ((1, 1), (2, 3, 2, 3), (2, 3)), 4),
        {**CLIP, "threshold": 3.0, "step": np.arange(20) % 3},
    ),
}


@pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str, machine: Machine) -> None:
    where, how = CONVS[name]
    follow_conv(machine, *where, **how)


def test_a_window_larger_than_the_map() -> None:
    follow_conv(BEST, (1, 2, 3, 3), (5, 7, 3, 5), ((1, 1), (2, 3, 2, 3)))


def test_a_convolution_that_makes_several_channels_of_each() -> None:
    follow_conv(BEST, (1, 11, 9, 5), (3, 3, 1, 15), ((1, 1), (1, 1, 1, 1)), 5)


@pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)
def test_depthwise_convolutions(machine: Machine) -> None:
    follow_conv(machine, (2, 11, 9, 35), (3, 3, 1, 35), ((1, 1), (1, 1, 1, 1)), 35)
    follow_conv(machine, (1, 14, 15, 64), (5, 5, 1, 64), ((2, 2), (2, 2, 2, 2)), 64, threshold=20.0)


def test_dilated_depthwise_convolution_of_few_channels() -> None:
    follow_conv(BEST, (1, 11, 9, 3), (3, 2, 1, 3), ((1, 1), (2, 3, 2, 3), (2, 3)), 3)


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("counts_pads", [0, 1])
def test_pools(op_type: str, counts_pads: int) -> None:
    if op_type == "MaxPool" and counts_pads:
        pytest.skip("no such attribute")
    kernel, slide = (3, 2), ((2, 1), (1, 1, 1, 0))
    theirs, ours = slides(kernel, *slide)
    alone = helper.make_node("Conv", ["x", "w"], ["y"], **theirs)
    if op_type == "AveragePool":
        theirs = {**theirs, "count_include_pad": counts_pads}
        del theirs["dilations"]
    node = helper.make_node(op_type, ["x"], ["y"], **theirs)
    follow(
        "DeltaPool",
        [integers(np.random.default_rng(0), 2, 12, 10, 21)],
        lambda x: dense(node, channels_first(x)),
        lambda mask: dense(alone, mask[:, None].astype(np.float32), np.ones((1, 1, *kernel), np.float32))[..., 0],
        kind=int(op_type == "AveragePool"),
        kernel_h=kernel[0],
        kernel_w=kernel[1],
        count_include_pad=counts_pads,
        **ours,
    )


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_global_pools(kind: str) -> None:
    follow(
        "DeltaGlobalPool",
        [integers(np.random.default_rng(0), 3, 9, 8, 37)],
        lambda x: getattr(x, kind)((1, 2), keepdims=True),
        lambda mask: mask.max((1, 2), keepdims=True),
        kind=int(kind == "mean"),
        threshold=0.01,
    )


def test_sums_and_products() -> None:
    rng = np.random.default_rng(0)
    a, b, one = integers(rng, 2, 7, 9, 37), integers(rng, 2, 7, 9, 37), integers(rng, 2, 1, 1, 37)
    follow("DeltaAdd", [a, b], np.add, np.maximum, **LEAKY)
    follow("DeltaMul", [a, one], np.multiply, np.maximum, threshold=3.0)


def test_moves_of_values() -> None:
    rng = np.random.default_rng(0)
    a, b = integers(rng, 2, 7, 9, 21), integers(rng, 2, 7, 9, 20)
    follow("DeltaConcat", [a, b], lambda *maps: np.concatenate(maps, -1), np.maximum)
    follow("DeltaSlice", [a], lambda x: np.pad(x[..., 3:12], [(0, 0)] * 4), lambda mask: mask, begin=3)
    follow(
        "DeltaResize",
        [a],
        lambda x: x.repeat(3, 1).repeat(2, 2),
        lambda mask: mask.repeat(3, 1).repeat(2, 2),
    )
    follow("DeltaUnary", [a], lambda x: x, lambda mask: mask, **CLIP)


@pytest.mark.parametrize("shape", [(2, 3, 31, 17), (1, 1, 9, 7), (2, 37, 6, 5)])
@pytest.mark.parametrize("rounds", [False, True])
def test_frames(shape: tuple[int, ...], rounds: bool) -> None:
    n, c, h, w = shape
    rng = np.random.default_rng(0)
    step = np.full(c, 2.0 * rounds, np.float32)
    x = integers(rng, n, h, w, c)
    held, started = np.full_like(x, np.nan), np.array(False)
    given = {"x": channels_first(x), "last": held, "started": started}
    constants = {"threshold": np.array([3], np.float32), "step": step}
    layer = Layer("DeltaEnter", given, constants, x.shape, BEST)
    for index in range(5):
        y = np.round(x / 2) * 2 if rounds else x
        with np.errstate(invalid="ignore"):
            sent = ~(np.square(y - held).sum(-1) <= 9 * c) | ~started
        found = layer.run({"x": np.ascontiguousarray(channels_first(x)), "last": held, "started": started})
        held = np.where(sent[..., None], y, held)
        np.testing.assert_array_equal(found[1], sent)
        np.testing.assert_array_equal(found[0], held)
        started = np.array(True)
        x, _ = change(rng, x)
        if index == 3:
            x[0, h // 2, w // 2, c // 2] = np.nan


@pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)
@pytest.mark.parametrize("group", [1, 24])
def test_a_pixel_has_the_same_bits_alone(machine: Machine, group: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 13, 11, 24)).astype(np.float32)
    weights = {
        "w": rng.standard_normal((3, 3, 24 // group, 24)).astype(np.float32),
        "b": rng.standard_normal(24).astype(np.float32),
    }
    mask = np.ones((1, 13, 11), np.uint8)
    given = {"x": x, "mask": mask, "last": np.zeros_like(x), "started": np.array(False)}
    nothing = {"threshold": np.zeros(1, np.float32), "step": np.zeros(1, np.float32)}
    _, ours = slides((3, 3), (1, 1), (1, 1, 1, 1))
    layer = Layer("DeltaConv", given, {**weights, **nothing}, x.shape, machine, group=group, **ours)
    whole = layer.run(given)[0].copy()
    for share in (0.01, 0.1, 0.5):
        given |= {"mask": (rng.random(mask.shape) < share).astype(np.uint8), "started": np.array(True)}
        held, sent = layer.run({**given, "last": np.full_like(x, 1e9)})
        assert sent.sum() > 0
        np.testing.assert_array_equal(held[sent != 0].view(np.uint32), whole[sent != 0].view(np.uint32))


def test_activations() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((1, 3, 5, 21)) * scale for scale in (0.1, 1, 20)], -1).astype(np.float32)
    mask = np.ones((1, 3, 5), np.uint8)
    given = {"x": x, "mask": mask, "last": np.zeros_like(x), "started": np.array(True)}
    constants = {"threshold": np.array([-1], np.float32), "step": np.zeros(1, np.float32)}
    for code, expected in (
        (4, 1 / (1 + np.exp(-x.astype(np.float64)))),
        (5, x / (1 + np.exp(-x.astype(np.float64)))),
        (6, np.clip(0.21 * x + 0.55, 0, 1)),
        (7, x * np.clip(x / 6 + 0.5, 0, 1)),
    ):
        layer = Layer("DeltaUnary", given, constants, x.shape, BEST, activation=code, alpha=0.21, beta=0.55)
        np.testing.assert_allclose(layer.run(given)[0], expected, rtol=2e-6, atol=2e-7)


def test_a_nan_is_sent_and_leaves_again() -> None:
    x = np.ones((1, 4, 5, 24), np.float32)
    given = {"x": x, "mask": np.ones((1, 4, 5), np.uint8), "last": x.copy(), "started": np.array(True)}
    weights = {"w": np.ones((1, 1, 24, 20), np.float32), "b": np.zeros(20, np.float32)}
    constants = {**weights, "threshold": np.array([1e6], np.float32), "step": np.zeros(1, np.float32)}
    given["last"] = np.full((1, 4, 5, 20), 24, np.float32)
    layer = Layer("DeltaConv", given, constants, (1, 4, 5, 20), BEST, activation=1)
    broken = x.copy()
    broken[0, 2, 3, 4] = np.nan
    held, sent = layer.run({**given, "x": broken})
    assert np.isnan(held[0, 2, 3]).all()
    assert sent.sum() == 1
    held, sent = layer.run({**given, "last": held.copy()})
    assert (held == 24).all()
    assert sent.sum() == 1


@pytest.mark.parametrize("group", [1, 24])
def test_convolutions_compile_for_arm(group: int) -> None:
    arm = Machine(name="a76", triple="aarch64-linux-gnu", cpu="cortex-a76", lanes=4, registers=32, dot="none")
    x = np.zeros((1, 9, 11, 24), np.float32)
    given = {"x": x, "mask": np.ones((1, 9, 11), np.uint8), "last": x, "started": np.array(True)}
    weights = {"w": np.ones((3, 3, 24 // group, 24), np.float32), "b": np.zeros(24, np.float32)}
    constants = {**weights, "threshold": np.zeros(1, np.float32), "step": np.zeros(1, np.float32)}
    _, ours = slides((3, 3), (1, 1), (1, 1, 1, 1))
    build(to_relax(one_layer("DeltaConv", given, constants, x.shape, group=group, **ours), arm).module, arm)
