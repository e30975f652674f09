"""Times products, GRUs and LSTMs that follow changes against ONNX Runtime's dense ops, one step of one stream.

    python -m examples.delta.recurrent [--threads 1] [--shapes 4096x4096 ...] [--units 512 1024] [--sent 20 10 5 ...]

Each time is the median of interleaved runs: CPU time with one thread, which a busy machine disturbs less, else time
that passed. Inputs and outputs are bound, the states of ours in place. Between runs, untimed, the given share of the
inputs changes, of a cell's hidden values as well. Weights come from memory, as in a large model, or from the cache, as
when a small one runs alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from examples.sparse_gemv.__main__ import session
from onnxcomp import native
from onnxcomp.target import Array
from onnxcomp.targets.ort.break_even_trials import beyond_cache, clock
from onnxcomp.targets.ort.runtime import onnxruntime

MICROSOFT = "com.microsoft"
FLOAT = ir.TensorType(ir.DataType.FLOAT)
GATES = {"GRU": 3, "LSTM": 4}


@dataclass
class Model:
    """Copies of one op, each with weights and states of its own, all with the same inputs."""

    copies: int
    inputs: Mapping[str, tuple[int, ...]]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[ir.Node] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)
    states: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # of outputs: the inputs they follow
    values: dict[str, ir.Value] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of `values`

    def value(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """An input of the model."""
        if name not in self.values:
            self.shapes[name] = shape
            self.values[name] = ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)
        return self.values[name]

    def weight(self, array: Array) -> ir.Value:
        """An initializer."""
        value = ir.Value(name=f"w{len(self.weights)}", shape=ir.Shape(array.shape), const_value=ir.tensor(array))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.weights.append(value)
        return value

    def floats(self, *shape: int) -> ir.Value:
        """A random weight."""
        return self.weight(self.rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-2:][0])))

    def integers(self, k: int, n: int) -> list[ir.Value]:
        """A random weight with its scales."""
        w = np.frombuffer(self.rng.bytes(k * n), np.int8).reshape(k, n)
        return [self.weight(w), self.weight(np.full(n, 0.01, np.float32))]

    def node(
        self, op: str, inputs: Sequence[ir.Value | None], follows: Mapping[str, tuple[int, ...]], domain: str = "",
        attributes: Mapping[str, int] | None = None, skip: int = 0,
    ) -> None:  # fmt: skip
        """Adds an op whose outputs are `follows`: the states that they go to, by name and shape."""
        node = ir.node(op, inputs, num_outputs=skip + len(follows), domain=domain, attributes=attributes)
        for output in node.outputs[:skip]:
            output.name = ""
        for output, (name, shape) in zip(node.outputs[skip:], follows.items(), strict=True):
            output.name, output.type = f"{name}_out", FLOAT
            self.states[output.name] = (name, shape)
        self.nodes.append(node)

    def build(self) -> bytes:
        """The model, serialised."""
        inputs = list(self.values.values())
        outputs = [output for node in self.nodes for output in node.outputs if output.name]
        domains = {"": 20, MICROSOFT: 1, native.DOMAIN: 1}
        graph = ir.Graph(inputs, outputs, nodes=self.nodes, initializers=self.weights, opset_imports=domains, name="g")
        return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def product(kind: str, k: int, n: int, copies: int, *, dense: bool) -> Model:
    """DeltaMatMul, or the runtime's product of such weights."""
    m = Model(copies, {"X": (1, k)})
    x = m.value("X", (1, k))
    zero = m.weight(np.zeros(1, np.float32))
    for c in range(copies):
        last, sums = (f"last{c}", (1, k)), (f"sum{c}", (1, n))
        weights = m.integers(k, n) if kind == "int8" else [m.floats(k, n)]
        if not dense:
            states = [m.value(*last), m.value(*sums)]
            op = "DeltaMatMulInt8" if kind == "int8" else "DeltaMatMul"
            m.node(op, [x, *states, zero, zero, *weights], dict([sums, last]), native.DOMAIN)
        elif kind == "int8":
            none = m.weight(np.zeros(n, np.int8))
            m.node("DynamicQuantizeMatMul", [x, *weights, none], dict([sums]), MICROSOFT)
        else:
            m.node("MatMul", [x, *weights], dict([sums]))
    return m


def cell(op: str, size: int, copies: int, *, dense: bool, int8: bool = False) -> Model:
    """A GRU or an LSTM of `size` units and inputs, or the runtime's."""
    shape, columns = (1, 1, size), GATES[op] * size
    m = Model(copies, {"X": shape, "H": shape})
    x, h = m.value("X", shape), m.value("H", shape)
    zero = m.weight(np.zeros(1, np.float32))
    for c in range(copies):
        out, cells = {f"Y{c}": shape}, {f"C{c}": shape} if op == "LSTM" else {}
        c_value = [m.value(*item) for item in cells.items()]
        if dense:
            weights = [*(m.floats(1, columns, size) for _ in "WR"), m.weight(np.zeros((1, 2 * columns), np.float32))]
            attributes = {"hidden_size": size} | ({"linear_before_reset": 1} if op == "GRU" else {})
            m.node(op, [x, *weights, None, h, *c_value], out | cells, "", attributes, skip=1)
            continue
        sums = ("m_x", "m_h") if op == "GRU" else ("m",)
        states = {f"x_last{c}": shape, f"h_last{c}": shape} | {f"{name}{c}": (1, 1, columns) for name in sums}
        matrices = [w for _ in "WR" for w in (m.integers(size, columns) if int8 else [m.floats(size, columns)])]
        biases = [m.weight(np.zeros(columns, np.float32)) for _ in sums]
        state_values = [m.value(*item) for item in states.items()]
        inputs = [x, h, *c_value, *state_values, zero, zero, *matrices, *biases]
        m.node(f"Delta{op}" + "Int8" * int8, inputs, out | cells | states, native.DOMAIN)
    return m


class Stream:
    """A session with all its inputs and outputs bound."""

    def __init__(self, model: Model, threads: int) -> None:
        runtime = onnxruntime()
        self.copies, self.session = model.copies, session(model.build(), threads)
        self.binding = self.session.io_binding()
        self.arrays = {name: np.zeros(shape, np.float32) for name, shape in model.inputs.items()}
        self.bound: dict[str, Any] = {}

        def memory(name: str, shape: tuple[int, ...]) -> Any:
            if name not in self.bound:
                self.bound[name] = runtime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu")
                self.bound[name].update_inplace(np.zeros(shape, np.float32))
            return self.bound[name]

        for name, shape in model.shapes.items():
            self.binding.bind_ortvalue_input(name, memory(name, shape))
        for name, (follows, shape) in model.states.items():
            self.binding.bind_ortvalue_output(name, memory(follows, shape))

    def change(self, rng: np.random.Generator, share: float) -> None:
        """Gives a share of the inputs new values."""
        for name, array in self.arrays.items():
            chosen = rng.permutation(array.size)[: round(share * array.size)]
            array.flat[chosen] = rng.uniform(-1, 1, len(chosen))
            self.bound[name].update_inplace(array)

    def seconds(self, threads: int) -> float:
        """Of one op in one run."""
        start = clock(threads)
        self.session.run_with_iobinding(self.binding)
        return (clock(threads) - start) / self.copies


def measure(
    dense: Model, others: Mapping[str, Model], shares: Sequence[float], repeat: int, threads: int
) -> Iterator[tuple[str, float, float, float]]:
    """Name, share of inputs sent, seconds, and seconds of the dense op in the same turns."""
    rng = np.random.default_rng(1)
    base, streams = Stream(dense, threads), {name: Stream(model, threads) for name, model in others.items()}
    times: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for turn in range(repeat + 1):
        for share in shares:
            base.change(rng, share)
            reference = base.seconds(threads)
            for name, stream in streams.items():
                stream.change(rng, share)
                if turn:
                    times.setdefault((name, share), []).append((stream.seconds(threads), reference))
                else:
                    stream.seconds(threads)
    for (name, share), found in times.items():
        ours, theirs = np.median(found, axis=0)
        yield name, share, float(ours), float(theirs)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="*", default=["4096x4096"], help="K x N of products")
    parser.add_argument("--units", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--sent", nargs="+", type=float, default=[100, 50, 20, 10, 5, 0], help="percent")
    parser.add_argument("--repeat", type=int, default=25)
    args = parser.parse_args()
    shares = [percent / 100 for percent in args.sent]
    header = ("op", "size", "from", "sent", "us", "dense us", "x dense")
    print("{:20} {:>10} {:>7} {:>6} {:>10} {:>10} {:>8}".format(*header))

    def show(size: str, source: str, rows: Iterator[tuple[str, float, float, float]]) -> None:
        for name, share, ours, dense in rows:
            ratio = dense / ours
            print(f"{name:20} {size:>10} {source:>7} {share:6.0%} {ours * 1e6:10.1f} {dense * 1e6:10.1f} {ratio:8.2f}")

    for shape in args.shapes:
        k, n = (int(part) for part in shape.split("x"))
        for kind, size in (("fp32", 4), ("int8", 1)):
            copies = max(2, round(beyond_cache() / (k * n * size)))
            ours = {f"DeltaMatMul {kind}": product(kind, k, n, copies, dense=False)}
            dense = product(kind, k, n, copies, dense=True)
            show(shape, "memory", measure(dense, ours, shares, args.repeat, args.threads))
    for op, gates in GATES.items():
        for units in args.units:
            for source in ("cache", "memory"):
                copies = 1 if source == "cache" else max(2, round(beyond_cache() / (8 * gates * units * units)))
                ours = {f"Delta{op} fp32": cell(op, units, copies, dense=False)}
                ours[f"Delta{op} int8"] = cell(op, units, copies, dense=False, int8=True)
                dense = cell(op, units, copies, dense=True)
                repeat = args.repeat * (8 if source == "cache" else 1)
                show(str(units), source, measure(dense, ours, shares, repeat, args.threads))


if __name__ == "__main__":
    main()
