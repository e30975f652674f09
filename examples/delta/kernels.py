"""Times convolutions of changed pixels against ONNX Runtime's Conv of the same shape.

    python -m examples.delta.kernels [--share 100 20 5 0] [--repeat 15] [--library path]

One thread and its CPU time, which a busy machine disturbs less; medians of interleaved runs; all tensors are bound,
ours with the state in place. The changed pixels are one square in the middle of the input, and what is recomputed is
all sent. The columns of shares say how many times as fast as `Conv`, which computes everything, a layer is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxcomp import native

# Channels in and out, kernel, stride, height and width, groups.
LAYERS = {
    "64-64 3x3 56": (64, 64, 3, 1, 56, 1),
    "128-128 3x3 28": (128, 128, 3, 1, 28, 1),
    "256-256 3x3 14": (256, 256, 3, 1, 14, 1),
    "512-512 3x3 7": (512, 512, 3, 1, 7, 1),
    "64-128 3x3/2 56": (64, 128, 3, 2, 56, 1),
    "3-32 3x3/2 224": (3, 32, 3, 2, 224, 1),
    "3-64 7x7/2 224": (3, 64, 7, 2, 224, 1),
    "96-24 1x1 112": (96, 24, 1, 1, 112, 1),
    "144-24 1x1 56": (144, 24, 1, 1, 56, 1),
    "24-144 1x1 56": (24, 144, 1, 1, 56, 1),
    "240-80 1x1 14": (240, 80, 1, 1, 14, 1),
    "672-112 1x1 14": (672, 112, 1, 1, 14, 1),
    "192-1152 1x1 7": (192, 1152, 1, 1, 7, 1),
    "32 dw3 112": (32, 32, 3, 1, 112, 32),
    "96 dw3/2 112": (96, 96, 3, 2, 112, 96),
    "144 dw3 56": (144, 144, 3, 1, 56, 144),
    "240 dw5 28": (240, 240, 5, 1, 28, 240),
    "672 dw5 14": (672, 672, 5, 1, 14, 672),
    "1152 dw3 7": (1152, 1152, 3, 1, 7, 1152),
}
Array = np.ndarray[Any, Any]


def session(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Array],
    outputs: dict[str, Array],
    constants: dict[str, Array],
    library: Path,
) -> Any:
    def infos(tensors: dict[str, Array]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(t.dtype), t.shape)
            for n, t in tensors.items()
        ]

    graph = helper.make_graph(
        nodes, "g", infos(inputs), infos(outputs), [numpy_helper.from_array(t, n) for n, t in constants.items()]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(native.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Bound:
    """A session with all its tensors bound; an output of the name of an input, after `new_`, is that very tensor."""

    def __init__(self, made: Any, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        self.session, self.binding = made, made.io_binding()
        self.values = {n: ort.OrtValue.ortvalue_from_numpy(t) for n, t in inputs.items()}
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, t in outputs.items():
            kept = name.removeprefix("new_")
            value = self.values[kept] if kept != name else ort.OrtValue.ortvalue_from_numpy(t)
            self.values[name] = value
            self.binding.bind_ortvalue_output(name, value)

    def seconds(self, calls: int) -> float:
        start = time.thread_time()
        for _ in range(calls):
            self.session.run_with_iobinding(self.binding)
        return (time.thread_time() - start) / calls


def dense(layer: tuple[int, ...], library: Path) -> Bound:
    cin, cout, k, stride, size, group = layer
    out = (size - 1) // stride + 1
    rng = np.random.default_rng(0)
    x = {"x": rng.standard_normal((1, cin, size, size), np.float32)}
    y = {"y": np.zeros((1, cout, out, out), np.float32)}
    w = {
        "w": rng.standard_normal((cout, cin // group, k, k), np.float32) / np.float32(np.sqrt(cin * k * k / group)),
        "b": rng.standard_normal(cout).astype(np.float32),
    }
    node = helper.make_node(
        "Conv", ["x", "w", "b"], ["y"], kernel_shape=[k, k], strides=[stride] * 2, group=group, pads=[k // 2] * 4
    )
    return Bound(session([node], x, y, w, library), x, y)


def ours(layer: tuple[int, ...], share: float, library: Path) -> Bound:
    cin, cout, k, stride, size, group = layer
    out = (size - 1) // stride + 1
    rng = np.random.default_rng(0)
    mask = np.zeros((1, size, size), np.uint8)
    side = round(size * np.sqrt(share))
    at = (size - side) // 2
    mask[:, at : at + side, at : at + side] = 1
    x = {
        "x": rng.standard_normal((1, size, size, cin), np.float32),
        "mask": mask,
        "held": np.zeros((1, out, out, cout), np.float32),
    }
    y = {"new_held": x["held"], "sent": np.zeros((1, out, out), np.uint8)}
    w = {
        "w": rng.standard_normal((k, k, cin // group, cout), np.float32) / np.float32(np.sqrt(cin * k * k / group)),
        "b": rng.standard_normal(cout).astype(np.float32),
        "started": np.array(True),
        # Everything that is recomputed is sent.
        "threshold": np.array([-1], np.float32),
        "step": np.array([0], np.float32),
    }
    node = helper.make_node(
        "DeltaConv",
        ["x", "mask", "w", "b", "held", "started", "threshold", "step"],
        ["new_held", "sent"],
        domain=native.DOMAIN,
        stride_h=stride,
        stride_w=stride,
        pad_top=k // 2,
        pad_left=k // 2,
        group=group,
    )
    return Bound(session([node], x, y, w, library), x, y)


def enter(channels: int, size: int, library: Path) -> Bound:
    rng = np.random.default_rng(0)
    frame = rng.standard_normal((1, channels, size, size), np.float32)
    x = {"x": frame, "held": np.ascontiguousarray(frame.transpose(0, 2, 3, 1))}
    y = {"new_held": x["held"], "sent": np.zeros((1, size, size), np.uint8)}
    w = {"started": np.array(True), "threshold": np.array([0.1], np.float32), "step": np.array([0], np.float32)}
    node = helper.make_node(
        "DeltaEnter", ["x", "held", "started", "threshold", "step"], ["new_held", "sent"], domain=native.DOMAIN
    )
    return Bound(session([node], x, y, w, library), x, y)


def medians(bound: list[Bound], repeat: int) -> list[float]:
    """Seconds of a call of each, a few milliseconds of calls at a time, in turn."""
    calls = [max(1, int(2e-3 / max(b.seconds(2), 1e-6))) for b in bound]
    times: list[list[float]] = [[] for _ in bound]
    for _ in range(repeat):
        for one, count, found in zip(bound, calls, times, strict=True):
            found.append(one.seconds(count))
    return [float(np.median(found)) for found in times]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", nargs="+", type=float, default=[100, 20, 5, 0], help="percent of pixels changed")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--library", type=Path, default=native.library_path())
    args = parser.parse_args()
    print(f"{'layer':18} {'Conv ms':>8}" + "".join(f"{f'{share:g} %':>9}" for share in args.share))
    for name in args.layers:
        layer = LAYERS[name]
        bound = [dense(layer, args.library)] + [ours(layer, share / 100, args.library) for share in args.share]
        first, *rest = medians(bound, args.repeat)
        print(f"{name:18} {first * 1e3:8.3f}" + "".join(f"{first / found:9.2f}" for found in rest), flush=True)
    for channels, size in ((3, 224), (32, 112), (512, 7)):
        (found,) = medians([enter(channels, size, args.library)], args.repeat)
        print(f"DeltaEnter {channels}x{size}x{size}, nothing changed: {found * 1e6:.0f} us")


if __name__ == "__main__":
    main()
