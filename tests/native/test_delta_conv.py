"""Layers that recompute changed pixels only, against numpy and ONNX Runtime's own ops.

Inputs and weights are small integers wherever possible: then every sum is exact, and so is every comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcomp import native

ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built")
Array = np.ndarray[Any, Any]
F32 = np.float32


def session(
    nodes: list[onnx.NodeProto],
    feed: dict[str, Array],
    outputs: dict[str, int],
    *,
    threads: int = 1,
    constants: dict[str, Array] | None = None,
) -> Any:
    """A session of `nodes`; `outputs` are names and element types."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(t).dtype), [None] * np.ndim(t))
        for name, t in feed.items()
    ]
    outs = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    initializers = [numpy_helper.from_array(t, name) for name, t in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(native.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library_path()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def delta(
    op: str, feed: dict[str, Array], *, threads: int = 1, constant: tuple[str, ...] = (), **attributes: Any
) -> Any:
    """A session of one op; `feed` holds its inputs in order."""
    node = helper.make_node(op, list(feed), ["held", "sent"], domain=native.DOMAIN, **attributes)
    given = {name: t for name, t in feed.items() if name not in constant}
    kinds = {"held": onnx.TensorProto.FLOAT, "sent": onnx.TensorProto.UINT8}
    return session([node], given, kinds, threads=threads, constants={name: feed[name] for name in constant})


def run(made: Any, feed: dict[str, Array]) -> tuple[Array, Array]:
    held, sent = made.run(None, {i.name: feed[i.name] for i in made.get_inputs()})
    return held, sent


def run_in_place(made: Any, feed: dict[str, Array]) -> tuple[Array, Array]:
    """With one buffer for `last` and `held`."""
    binding, state = made.io_binding(), ort.OrtValue.ortvalue_from_numpy(feed["last"].copy())
    sent = ort.OrtValue.ortvalue_from_numpy(np.full(feed["last"].shape[:3], 7, np.uint8))
    for i in made.get_inputs():
        value = state if i.name == "last" else ort.OrtValue.ortvalue_from_numpy(np.asarray(feed[i.name]))
        binding.bind_ortvalue_input(i.name, value)
    binding.bind_ortvalue_output("held", state)
    binding.bind_ortvalue_output("sent", sent)
    made.run_with_iobinding(binding)
    return state.numpy().copy(), sent.numpy().copy()  # both are views of memory that goes with the values


ACTIVATIONS: list[Callable[[Array, float, float], Array]] = [
    lambda v, a, b: v,
    lambda v, a, b: np.maximum(v, 0),
    lambda v, a, b: np.clip(v, a, b),
    lambda v, a, b: np.where(v < 0, v * a, v),
    lambda v, a, b: 1 / (1 + np.exp(-v)),
    lambda v, a, b: v / (1 + np.exp(-v)),
    lambda v, a, b: np.clip(a * v + b, 0, 1),
    lambda v, a, b: v * np.clip(v / 6 + 0.5, 0, 1),
]


def expect(
    value: Array, reached: Array, feed: dict[str, Array], activation: int = 0, alpha: float = 0.0, beta: float = 0.0
) -> tuple[Array, Array]:
    """What is held and sent by a layer that computes `value` [N, H, W, C]; only pixels `reached` may have changed."""
    y = ACTIVATIONS[activation](value.astype(F32), F32(alpha), F32(beta)).astype(F32)
    step = np.broadcast_to(feed["step"], y.shape[-1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(step > 0, np.round(y / step) * step, y).astype(F32)
        threshold = F32(feed["threshold"][0])
        limit = F32(-1) if threshold < 0 else threshold * threshold * F32(y.shape[-1])
        over = ~(np.square(y - feed["last"]).sum(-1, dtype=F32) <= limit)
    sent = (reached != 0) & over
    if not np.ravel(feed["started"])[0]:
        sent = np.ones_like(sent)
    return np.where(sent[..., None], y, feed["last"]), sent.astype(np.uint8)


def integers(rng: np.random.Generator, *shape: int, most: int = 4) -> Array:
    return rng.integers(-most, most + 1, shape).astype(F32)


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


@dataclass
class Conv:
    """A convolution and how its output is sent."""

    cin: int
    cout: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    group: int = 1
    size: tuple[int, int] = (11, 9)
    batch: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)
    threshold: Any = (0.0,)
    step: Any = (0.0,)

    def out(self) -> tuple[int, int]:
        top, left, bottom, right = self.pads
        h, w = (
            (size + before + after - (k - 1) * d - 1) // s + 1
            for size, before, after, k, s, d in zip(
                self.size, (top, left), (bottom, right), self.kernel, self.stride, self.dilation, strict=True
            )
        )
        return h, w

    def reference(self) -> Callable[[Array, Array, Array], Array]:
        top, left, bottom, right = self.pads
        node = helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["y"],
            kernel_shape=self.kernel,
            strides=self.stride,
            dilations=self.dilation,
            group=self.group,
            pads=[top, left, bottom, right],
        )
        some = {"x": np.zeros((1, 1, 1, 1), F32), "w": np.zeros((1, 1, 1, 1), F32), "b": np.zeros(1, F32)}
        made = session([node], some, {"y": onnx.TensorProto.FLOAT})

        def conv(x: Array, w: Array, b: Array) -> Array:
            feed = {"x": x.transpose(0, 3, 1, 2).copy(), "w": w.transpose(3, 2, 0, 1).copy(), "b": b}
            return np.asarray(made.run(None, feed)[0]).transpose(0, 2, 3, 1)

        return conv

    def reached(self, mask: Array) -> Array:
        plain = Conv(1, 1, self.kernel, self.stride, self.pads, self.dilation, size=self.size)
        ones = np.ones((*self.kernel, 1, 1), F32)
        return plain.reference()(mask[..., None].astype(F32), ones, np.zeros(1, F32))[..., 0]

    def feed(self, rng: np.random.Generator) -> dict[str, Array]:
        x = integers(rng, self.batch, *self.size, self.cin)
        return {
            "x": x,
            "mask": np.ones(x.shape[:3], np.uint8),
            "w": integers(rng, *self.kernel, self.cin // self.group, self.cout),
            "b": integers(rng, self.cout),
            "last": np.full((self.batch, *self.out(), self.cout), np.nan, F32),
            "started": np.array(False),
            "threshold": np.asarray(self.threshold, F32),
            "step": np.asarray(self.step, F32),
        }

    def session(self, feed: dict[str, Array], threads: int = 1, constant: tuple[str, ...] = ("w", "b")) -> Any:
        return delta(
            "DeltaConv",
            feed,
            threads=threads,
            constant=constant,
            stride_h=self.stride[0],
            stride_w=self.stride[1],
            pad_top=self.pads[0],
            pad_left=self.pads[1],
            dilation_h=self.dilation[0],
            dilation_w=self.dilation[1],
            group=self.group,
            **self.attributes,
        )


CONVS = {
    "3x3": Conv(16, 33),
    "wide": Conv(40, 100),
    "first": Conv(3, 32, stride=(2, 2), size=(23, 30), pads=(1, 1, 0, 1)),
    "7x7": Conv(3, 20, kernel=(7, 7), stride=(2, 2), pads=(3, 3, 3, 3), size=(20, 21)),
    "larger than the map": Conv(3, 5, kernel=(5, 7), pads=(2, 3, 2, 3), size=(2, 3)),
    "1x1": Conv(24, 96, kernel=(1, 1), pads=(0, 0, 0, 0), size=(17, 19)),
    "1x1 stride": Conv(7, 80, kernel=(1, 1), stride=(2, 3), pads=(0, 0, 0, 0)),
    "one column": Conv(5, 1, kernel=(1, 3), pads=(0, 1, 0, 1)),
    "no pads": Conv(9, 17, pads=(0, 0, 0, 0)),
    "lopsided": Conv(4, 16, kernel=(2, 3), pads=(0, 2, 1, 0), stride=(1, 2)),
    "dilated": Conv(6, 48, dilation=(2, 3), pads=(2, 3, 2, 3)),
    "dilated far": Conv(6, 8, dilation=(9, 8), pads=(9, 8, 9, 8)),
    "groups": Conv(12, 20, group=4),
    "groups of vectors": Conv(64, 64, group=2, size=(7, 7)),
    "many channels": Conv(130, 70, size=(4, 5)),
    "depthwise": Conv(35, 35, group=35),
    "depthwise wide": Conv(128, 128, group=128, kernel=(5, 5), pads=(2, 2, 2, 2), stride=(2, 2), size=(14, 15)),
    "depthwise few": Conv(3, 3, group=3),
    "multiplier": Conv(5, 15, group=5),
    "large": Conv(32, 40, size=(30, 31)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONVS)
def test_conv_over_steps(name: str, batch: int) -> None:
    base = CONVS[name]
    rng = np.random.default_rng(len(name))
    limits = integers(rng, base.cout, most=20) + 20
    sends = [
        {"threshold": [0.0]},
        {"threshold": [12.0], "attributes": {"activation": 1}},
        {"threshold": [9.0], "step": [4.0]},
        {
            "threshold": [3.0],
            "step": np.where(limits < 15, 0, limits / 4),
            "attributes": {"activation": 2, "alpha": -8.0, "beta": 20.0},
        },
    ]
    for variant, how in enumerate(sends):
        case = Conv(**{**base.__dict__, "batch": batch, **how})
        conv, feed = case.reference(), case.feed(rng)
        one, two = case.session(feed), case.session(feed, threads=2, constant=("b",) if variant % 2 else ("w",))
        for index in range(6):
            reached = case.reached(feed["mask"])
            expected = expect(conv(feed["x"], feed["w"], feed["b"]), reached, feed, **case.attributes)
            for found in (run(one, feed), run_in_place(one, feed), run(two, feed), run_in_place(two, feed)):
                np.testing.assert_array_equal(found[1], expected[1], err_msg=f"{how} {index}")
                np.testing.assert_array_equal(found[0], expected[0], err_msg=f"{how} {index}")
            feed = {**feed, "last": expected[0], "started": np.array([True])}
            feed["x"], feed["mask"] = change(rng, feed["x"])


@pytest.mark.parametrize("name", ["3x3", "first", "7x7", "1x1", "groups", "depthwise", "multiplier", "many channels"])
def test_a_pixel_has_the_same_bits_alone(name: str) -> None:
    case, rng = CONVS[name], np.random.default_rng(0)
    feed = {k: rng.standard_normal(v.shape).astype(F32) if k in "xwb" else v for k, v in case.feed(rng).items()}
    made = case.session(feed)
    whole, _ = run(made, feed)
    feed |= {"last": np.full_like(whole, 1e9), "started": np.array(True)}
    for share in (0.01, 0.1, 0.5):
        feed["mask"] = (rng.random(feed["mask"].shape) < share).astype(np.uint8)
        held, sent = run(made, feed)
        np.testing.assert_array_equal(sent != 0, case.reached(feed["mask"]) != 0)
        np.testing.assert_array_equal(held[sent != 0].view(np.uint32), whole[sent != 0].view(np.uint32))


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_activations(activation: int) -> None:
    rng = np.random.default_rng(activation)
    x = np.concatenate([rng.standard_normal((1, 5, 7, 70)) * scale for scale in (0.01, 1, 5, 40)], -1).astype(F32)
    feed = {
        "x": x,
        "mask": np.ones(x.shape[:3], np.uint8),
        "last": np.zeros_like(x),
        "started": np.array(True),
        "threshold": np.array([-1], F32),
        "step": np.array([0], F32),
    }
    how = {"activation": activation, "alpha": 0.21, "beta": 0.55}
    held, _ = run(delta("DeltaUnary", feed, **how), feed)
    expected = ACTIVATIONS[activation](x.astype(np.float64), 0.21, 0.55)
    np.testing.assert_allclose(held, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_nan_and_infinity_are_sent(activation: int, special: float) -> None:
    case = Conv(
        8,
        24,
        kernel=(1, 1),
        pads=(0, 0, 0, 0),
        threshold=[np.inf] if np.isnan(special) else [1e6],
        attributes={"activation": activation, "alpha": 0.5, "beta": 0.5},
    )
    feed = case.feed(np.random.default_rng(0)) | {"started": np.array(True)}
    feed["w"] = np.abs(feed["w"]) + 1
    feed["last"] = np.zeros_like(feed["last"])
    feed["x"][0, 3, 4, 5] = special
    held, sent = run(case.session(feed), feed)
    with np.errstate(invalid="ignore"):
        value = ACTIVATIONS[activation](np.array(special), 0.5, 0.5)
    if np.isnan(special):
        assert np.isnan(held[0, 3, 4]).all()
        assert sent.sum() == 1
    elif np.isinf(value):
        np.testing.assert_array_equal(held[0, 3, 4], np.full(24, value))
        assert sent.sum() == 1


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 224, 224),
        (2, 1, 9, 7),
        (1, 2, 5, 13),
        (2, 3, 31, 17),
        (1, 4, 8, 8),
        (1, 15, 20, 20),
        (1, 16, 7, 9),
        (2, 37, 6, 5),
        (1, 512, 7, 7),
        (1, 5000, 3, 3),
    ],
)
def test_enter(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    n, c, h, w = shape
    for variant in range(4):
        x = integers(rng, n, h, w, c)
        feed = {
            "x": x.transpose(0, 3, 1, 2).copy(),
            "last": np.full_like(x, np.nan),
            "started": np.array(False),
            "threshold": integers(rng, 1) + 2,
            "step": (integers(rng, c if variant > 1 else 1) if variant else np.zeros(1, F32)),
        }
        made, two = delta("DeltaEnter", feed), delta("DeltaEnter", feed, threads=2)
        for _ in range(5):
            expected = expect(x, np.ones((n, h, w)), feed)
            for found in (run(made, feed), run_in_place(made, feed), run(two, feed), run_in_place(two, feed)):
                np.testing.assert_array_equal(found[1], expected[1])
                np.testing.assert_array_equal(found[0], expected[0])
            x, _ = change(rng, x)
            if variant == 3:
                x[0, h // 2, w // 2, c // 2] = np.nan
            feed |= {"x": x.transpose(0, 3, 1, 2).copy(), "last": expected[0], "started": np.array([True])}


def pool(
    x: Array, kind: int, kernel: tuple[int, int], stride: tuple[int, int], pads: tuple[int, int, int, int], include: int
) -> Array:
    node = helper.make_node(
        "AveragePool" if kind else "MaxPool",
        ["x"],
        ["y"],
        kernel_shape=kernel,
        strides=stride,
        pads=pads,
        **({"count_include_pad": include} if kind else {}),
    )
    feed = {"x": x.transpose(0, 3, 1, 2).copy()}
    (y,) = session([node], feed, {"y": onnx.TensorProto.FLOAT}).run(None, feed)
    return np.asarray(y).transpose(0, 2, 3, 1)


def over_steps(
    op: str,
    maps: list[Array],
    value: Callable[..., Array],
    reached: Callable[..., Array],
    exact: bool = True,
    **attributes: Any,
) -> None:
    """Five steps of an op with changing `maps`; `value(*maps)` and `reached(*masks)` are the references."""
    rng = np.random.default_rng(1)
    shape = value(*maps).shape
    for variant in range(2):
        feed = {}
        for i, m in enumerate(maps):
            feed |= {f"x{i}": m, f"mask{i}": np.ones(m.shape[:3], np.uint8)}
        feed |= {
            "last": np.zeros(shape, F32),
            "started": np.array(False),
            "threshold": np.array([3 if variant else 2], F32),
            "step": np.array([2.0 * variant], F32),
        }
        one, two = delta(op, feed, **attributes), delta(op, feed, threads=2, **attributes)
        activation = {k: v for k, v in attributes.items() if k in ("activation", "alpha", "beta")}
        for _ in range(6):
            expected = expect(
                value(*(feed[f"x{i}"] for i in range(len(maps)))),
                reached(*(feed[f"mask{i}"] for i in range(len(maps)))),
                feed,
                **activation,
            )
            for found in (run(one, feed), run_in_place(one, feed), run(two, feed), run_in_place(two, feed)):
                np.testing.assert_array_equal(found[1], expected[1])
                if exact:
                    np.testing.assert_array_equal(found[0], expected[0])
                else:
                    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)
            feed |= {"last": found[0], "started": np.array(True)}
            for i in range(len(maps)):
                if rng.random() < 0.7:
                    feed[f"x{i}"], feed[f"mask{i}"] = change(rng, feed[f"x{i}"])
                else:
                    feed[f"mask{i}"] = np.zeros_like(feed[f"mask{i}"])


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize(("op", "value"), [("DeltaAdd", np.add), ("DeltaMul", np.multiply)])
@pytest.mark.parametrize("channels", [1, 20, 130])
def test_add_and_mul(op: str, value: Callable[..., Array], channels: int, activation: int) -> None:
    rng = np.random.default_rng(0)
    a, b = integers(rng, 2, 13, 11, channels), integers(rng, 2, 13, 11, channels)
    over_steps(op, [a, b], value, lambda m, o: m | o, activation=activation)
    over_steps(op, [a, b[:, :1, :1]], value, lambda m, o: m | o, activation=activation)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("kind", [0, 1])
def test_pool(kind: int, include: int) -> None:
    for kernel, stride, pads in (
        ((3, 3), (2, 2), (1, 1, 1, 1)),
        ((2, 2), (2, 2), (0, 0, 0, 0)),
        ((4, 1), (1, 2), (2, 0, 1, 0)),
    ):
        x = integers(np.random.default_rng(0), 2, 12, 10, 70)
        spread = Conv(1, 1, kernel, stride, pads, size=(12, 10))
        # Means are no integers: limits are, so none is close to them unless it is one.
        over_steps(
            "DeltaPool",
            [x],
            lambda v, k=kernel, s=stride, p=pads: pool(v, kind, k, s, p, include),
            spread.reached,
            exact=kind == 0,
            kind=kind,
            kernel_h=kernel[0],
            kernel_w=kernel[1],
            stride_h=stride[0],
            stride_w=stride[1],
            pad_top=pads[0],
            pad_left=pads[1],
            count_include_pad=include,
        )


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
def test_global_pool(kind: int, size: tuple[int, int]) -> None:
    x = integers(np.random.default_rng(0), 3, *size, 150)  # as many pixels as a power of two: means are exact
    over_steps(
        "DeltaGlobalPool",
        [x],
        lambda v: (v.mean if kind else v.max)((1, 2), keepdims=True),
        lambda m: m.max((1, 2), keepdims=True),
        kind=kind,
    )


def test_concat_slice_resize_unary() -> None:
    rng = np.random.default_rng(0)
    a, b = integers(rng, 2, 6, 7, 5), integers(rng, 2, 6, 7, 19)
    over_steps("DeltaConcat", [a, b], lambda v, o: np.concatenate([v, o], -1), lambda m, o: m | o)
    over_steps("DeltaSlice", [b], lambda v: v[..., 3:14], lambda m: m, begin=3)
    last = np.zeros((2, 6, 7, 17), F32)
    feed = {
        "x": b,
        "mask": np.ones(b.shape[:3], np.uint8),
        "last": last,
        "started": np.array(True),
        "threshold": np.zeros(1, F32),
        "step": np.zeros(1, F32),
    }
    np.testing.assert_array_equal(run(delta("DeltaSlice", feed, begin=2), feed)[0], b[..., 2:])
    over_steps("DeltaResize", [a], lambda v: v.repeat(2, 1).repeat(3, 2), lambda m: m.repeat(2, 1).repeat(3, 2))
    over_steps("DeltaUnary", [b], lambda v: v, lambda m: m, activation=3, alpha=0.25)


def test_nothing_changed_touches_nothing() -> None:
    case = CONVS["3x3"]
    feed = case.feed(np.random.default_rng(0)) | {"started": np.array(True)}
    feed |= {"mask": np.zeros_like(feed["mask"]), "last": np.full_like(feed["last"], 5)}
    for found in (run(case.session(feed), feed), run_in_place(case.session(feed), feed)):
        assert (found[0] == 5).all()
        assert not found[1].any()


def test_no_pixels() -> None:
    for batch, size in ((0, (4, 5)), (1, (0, 5))):
        case = Conv(4, 6, size=size, batch=batch)
        feed = case.feed(np.random.default_rng(0))
        feed["last"] = np.zeros((batch, *size, 6), F32)
        held, sent = run(case.session(feed), feed)
        assert held.shape == feed["last"].shape
        assert sent.shape == held.shape[:3]


def resized(feed: dict[str, Array], name: str, *shape: int) -> dict[str, Array]:
    return {**feed, name: np.zeros(shape, feed[name].dtype)}


def test_shapes_are_inferred() -> None:
    """Without a declared shape of the output."""
    case = CONVS["3x3"]
    feed = case.feed(np.random.default_rng(0))
    nodes = [
        helper.make_node("DeltaConv", list(feed), ["held", "sent"], domain=native.DOMAIN, pad_top=1, pad_left=1),
        helper.make_node("Shape", ["held"], ["s"]),
    ]
    kinds = {"held": onnx.TensorProto.FLOAT, "sent": onnx.TensorProto.UINT8, "s": onnx.TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(t.dtype), t.shape) for n, t in feed.items()
    ]
    outs = [helper.make_tensor_value_info(n, k, None) for n, k in kinds.items()]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(native.library_path()))
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outs),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(native.DOMAIN, 1)],
    )
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = {o.name: o.shape for o in made.get_outputs()}
    assert shapes["held"] == list(feed["last"].shape)
    assert shapes["sent"] == list(feed["last"].shape[:3])


def test_wrong_shapes_are_refused() -> None:
    case = Conv(8, 12, batch=1, size=(6, 6), group=2)
    feed = case.feed(np.random.default_rng(0))
    made = case.session(feed, constant=())
    run(made, feed)
    wrong = [
        ("x", 1, 6, 6, 7),
        ("x", 1, 6, 6),
        ("x", 2, 6, 6, 8),
        ("x", 1, 6, 5, 8),
        ("mask", 1, 6, 5),
        ("mask", 1, 6, 7),
        ("mask", 6, 6, 1),
        ("w", 3, 3, 8, 12),
        ("w", 3, 3, 4, 11),
        ("w", 0, 3, 4, 12),
        ("b", 11),
        ("b", 13),
        ("last", 1, 6, 6, 11),
        ("last", 2, 6, 6, 12),
        ("last", 1, 8, 6, 12),
        ("last", 1, 6, 60, 12),
        ("started", 0),
        ("started", 2),
        ("threshold", 12),
        ("threshold", 0),
        ("step", 2),
        ("threshold", 1, 1),
    ]
    for name, *shape in wrong:
        bad = resized(feed, name, *shape)
        different = case.session(bad, constant=())
        with pytest.raises(Exception, match="DeltaConv"):
            run(different, bad)
    for attributes in (
        {"group": 3},
        {"group": 0},
        {"stride_h": 0},
        {"dilation_w": 0},
        {"pad_top": -1},
        {"activation": 8},
        {"activation": -1},
        {"stride_w": 1 << 40},
    ):
        with pytest.raises(Exception, match="DeltaConv"):
            run(delta("DeltaConv", feed, **({"group": 2, "pad_top": 1, "pad_left": 1} | attributes)), feed)


def test_wrong_shapes_of_other_ops_are_refused() -> None:
    rng = np.random.default_rng(0)
    x, mask = integers(rng, 2, 6, 4, 5), np.ones((2, 6, 4), np.uint8)
    tail = {"started": np.array(True), "threshold": np.zeros(1, F32), "step": np.zeros(1, F32)}
    one, two = {"x": x, "mask": mask}, {"x": x, "mask": mask, "b": x, "bm": mask}
    last = np.zeros((2, 6, 4, 5), F32)
    good: list[tuple[str, dict[str, Array], Array, dict[str, Any]]] = [
        ("DeltaEnter", {"x": x.transpose(0, 3, 1, 2).copy()}, last, {}),
        ("DeltaAdd", two, last, {}),
        ("DeltaMul", {**two, "b": x[:, :1, :1], "bm": mask[:, :1, :1]}, last, {}),
        ("DeltaConcat", two, np.zeros((2, 6, 4, 10), F32), {}),
        ("DeltaSlice", one, np.zeros((2, 6, 4, 3), F32), {"begin": 2}),
        ("DeltaUnary", one, last, {"activation": 1}),
        ("DeltaResize", one, np.zeros((2, 12, 12, 5), F32), {}),
        ("DeltaPool", one, np.zeros((2, 5, 3, 5), F32), {"kernel_h": 2, "kernel_w": 2}),
        ("DeltaGlobalPool", one, np.zeros((2, 1, 1, 5), F32), {}),
    ]
    for op, sources, held, attributes in good:
        feed = {**sources, "last": held, **tail}
        run(delta(op, feed, **attributes), feed)
        for name in feed:
            for axis in range(feed[name].ndim):
                if (op, name, axis) == ("DeltaSlice", "x", 3):
                    continue  # channels beyond those that are taken do no harm
                shape = list(feed[name].shape)
                shape[axis] = 2 * shape[axis] + 13
                bad = resized(feed, name, *shape)
                with pytest.raises(Exception, match=op):
                    run(delta(op, bad, **attributes), bad)
            bad = resized(feed, name, *feed[name].shape, 2)
            with pytest.raises(Exception, match=op):
                run(delta(op, bad, **attributes), bad)
    feed = {**one, "last": np.zeros((2, 6, 4, 3), F32), **tail}
    for begin in (3, -1, 1 << 62):
        with pytest.raises(Exception, match="DeltaSlice"):
            run(delta("DeltaSlice", feed, begin=begin), feed)
