"""Measures from which sparsity on sparse kernels in TIR beat dense ones, on the CPU of this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tvm

from onnxcomp.break_even import AS_ACCURATE, BreakEven, Op, Weights
from onnxcomp.target import Array
from onnxcomp.targets.ort.break_even_trials import (
    LEVELS,
    MANY,
    REPEAT,
    REPEAT_LONG,
    ROWS,
    SHAPES,
    WARM,
    beyond_cache,
    clock,
    crossing,
)
from onnxcomp.targets.tvm.kernels import gated_mlp, gemm, int4, int8_dynamic, int8_gemm, selection, sparse_rows
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels.int8_output import Floats
from onnxcomp.targets.tvm.machine import Machine

_BYTES: dict[Weights, float] = {"fp32": 4, "int8": 1, "int4": 0.5}
_KINDS: tuple[Weights, ...] = ("fp32", "int8", "int4")
_GROUP = 32  # inputs that share a scale of 4-bit weights
_MOST_COPIES = 2048  # of a small weight, which would take millions

_Step: TypeAlias = Callable[[], Any]


def measure(
    machine: Machine,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[BreakEven]:
    """Measures products, and gated MLPs where there are the shapes of both an up projection and its down projection.

    Args:
        machine: The CPU of this machine.
        shapes: Rows and columns of weights, multiples of 32.
        rows: Rows of activations.
        threads: Threads of a run.
        progress: Told how many of how many cases are measured.
    """
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    cases: list[tuple[Op, Weights, tuple[int, int]]] = []
    for shape in dict.fromkeys(shapes):
        cases += [("matmul", kind, shape) for kind in _KINDS]
        if shape[0] < shape[1] and shape[::-1] in shapes:
            cases += [("gated_mlp", kind, shape) for kind in _KINDS]
    for index, (op, kind, (inputs, outputs)) in enumerate(cases):
        gc.collect()  # the last one's weights are held by closures that hold each other
        trial = _Trial(machine, op, kind, inputs, outputs)
        for count in rows:
            yield BreakEven(
                op=op,
                weights=kind,
                dense=AS_ACCURATE[kind],
                inputs=inputs,
                outputs=outputs,
                rows=count,
                threads=threads,
                sparsity=trial.break_even(count, threads),
            )
        del trial
        if progress:
            progress(index + 1, len(cases))


@dataclass(frozen=True)
class _Layer:
    """One weight in both forms: `sparse` are the parts of the sparse kernel's, `dense` those of the dense one's."""

    sparse: Sequence[Any]
    dense: Sequence[Any]


class _Trial:
    """Kernels and weights of one case."""

    def __init__(self, machine: Machine, op: Op, kind: Weights, inputs: int, outputs: int) -> None:
        self._machine, self._kind, self._gated = machine, kind, op == "gated_mlp"
        self._shapes = [(inputs, outputs), (outputs, inputs)] if self._gated else [(inputs, outputs)]
        size = sum(k * n for k, n in self._shapes)
        copies = max(2, min(_MOST_COPIES, round(beyond_cache() / (size * _BYTES[kind]))))
        self._random = np.random.default_rng(0)
        self._layers = [[self._layer(k, n, up=self._gated and not i) for i, (k, n) in enumerate(self._shapes)]]
        # Copies take memory of their own; what is in them does not matter.
        self._layers += [[_copied(layer) for layer in self._layers[0]] for _ in range(copies - 1)]
        self._functions = self._compiled()

    def break_even(self, rows: int, threads: int) -> float:
        """The level of sparsity from which on the sparse kernels are faster."""
        features, hidden = self._shapes[0]
        compared = self._random.standard_normal((rows, hidden if self._gated else features)).astype(np.float32)
        x = self._random.standard_normal((rows, features)).astype(np.float32)
        limits = [float(np.quantile(np.abs(compared), level)) if level else -1.0 for level in LEVELS]
        runs = [self._sparse(compared, x, limit) for limit in limits] + [self._dense(x)]
        times: list[list[float]] = [[] for _ in runs]
        for turn in range(WARM + (REPEAT_LONG if rows > MANY else REPEAT)):
            for run, taken in zip(runs, times, strict=True):
                start = clock(threads)
                # Many rows are bound by arithmetic, wherever the weights are.
                for layers in self._layers if rows <= MANY else self._layers[:2]:
                    for step in run(layers):
                        step()
                if turn >= WARM:
                    taken.append(clock(threads) - start)
        found = [float(np.percentile(taken, 25)) for taken in times]
        return round(crossing(LEVELS, found[:-1], found[-1]), 3)

    def _sparse(self, compared: Array, x: Array, limit: float) -> Callable[[Sequence[_Layer]], list[_Step]]:
        rows, k = compared.shape
        given, threshold = _tensor(compared), _tensor(np.array([limit], np.float32))
        lists = [_tensor(np.zeros((rows, k), t)) for t in (np.float32, np.int32)] + [_tensor(np.zeros(rows, np.int32))]
        out = _tensor(np.zeros((rows, self._shapes[-1][1]), np.float32))
        features, hidden, functions = _tensor(x), _tensor(np.zeros_like(compared)), self._functions

        def steps(layers: Sequence[_Layer]) -> list[_Step]:
            down = layers[-1].sparse
            listed = [lambda: functions["above"](given, threshold, *lists)]
            if not self._gated:
                return [*listed, lambda: functions["sums"](*lists, *down, out)]
            return [
                *listed,
                lambda: functions["neurons"](*lists, features, *layers[0].sparse, hidden),
                lambda: functions["sums"](hidden, *lists[1:], *down, out),
            ]

        return steps

    def _dense(self, x: Array) -> Callable[[Sequence[_Layer]], list[_Step]]:
        rows = len(x)
        values = [_tensor(x), *(_tensor(np.zeros((rows, n), np.float32)) for _, n in self._shapes)]
        flat = [_tensor(np.zeros(rows * k, np.float32)) for k, _ in self._shapes]
        codes = [_tensor(np.zeros((rows, k), np.uint8)) for k, _ in self._shapes]
        flat_codes = [_tensor(np.zeros(rows * k, np.uint8)) for k, _ in self._shapes]
        parameters, zero = _tensor(np.ones(2, np.float32)), _tensor(np.zeros(1, np.float32))
        functions = self._functions

        def step(layer: _Layer, index: int) -> None:
            name = f"dense{index}"
            if AS_ACCURATE[self._kind] == "fp32":
                functions[name](values[index], *layer.dense, values[index + 1])
                return
            weight, totals, affine, offset, scaled = layer.dense
            functions["range"](flat[index], zero, parameters)
            functions["quantize"](flat[index], parameters, flat_codes[index])
            functions[f"offset{index}"](parameters, totals, offset)
            functions[f"affine{index}"](parameters, affine, scaled)
            functions[name](codes[index], weight, offset, scaled, values[index + 1])

        return lambda layers: [lambda i=i, layer=layer: step(layer, i) for i, layer in enumerate(layers)]  # type: ignore[misc]

    def _layer(self, k: int, n: int, *, up: bool) -> _Layer:
        rows, columns = (n, k) if up else (k, n)
        if self._kind == "int4":
            words = self._integers(int4.int4_shape(self._machine, rows, columns), np.int32)
            scales = np.full((rows, columns // _GROUP), 0.01, np.float16 if self._machine.lanes >= 8 else np.float32)
            sparse = [words, scales, np.full(1, 8, np.uint8)]
        else:
            matrix = self._integers((rows, columns), np.int8) if self._kind == "int8" else self._floats((rows, columns))
            sparse = [matrix, np.ones(n, np.float32)]
        if AS_ACCURATE[self._kind] == "fp32":
            shape = gemm.packed_shape(self._machine, k, n)
            dense = [self._floats(shape), np.zeros(shape[0] * shape[2], np.float32)]
        else:
            panels = Panels(machine=self._machine, n=n)
            width = panels.count * panels.columns
            dense = [
                self._integers(panels.shape(k), np.int8),
                *(np.ones(s, t) for s, t in ((width, np.int32), ((2, width), np.float32))),
                *(np.ones(s, t) for s, t in ((width, np.int32), ((2, width), np.float32))),
            ]
        return _Layer([_tensor(a) for a in sparse], [_tensor(a) for a in dense])

    def _compiled(self) -> Any:
        machine, kind, (k, n) = self._machine, self._kind, self._shapes[-1]
        functions = {"above": selection.above(rows=None, k=k, each=False, one_sided=False)}
        four = {"scale": "float16" if machine.lanes >= 8 else "float32", "zeros": False}
        dtype = "float32" if kind == "fp32" else "int8"
        if kind == "int4":
            functions["sums"] = sparse_rows.sum_rows_int4(machine, rows=None, k=k, n=n, **four)
        else:
            functions["sums"] = sparse_rows.sum_rows(machine, rows=None, k=k, n=n, dtype=dtype)
        if self._gated:
            features, hidden = self._shapes[0]
            functions["neurons"] = (
                gated_mlp.neurons_int4(machine, rows=None, k=features, f=hidden, **four)
                if kind == "int4"
                else gated_mlp.neurons(machine, rows=None, k=features, f=hidden, dtype=dtype)
            )
        for index, (k, n) in enumerate(self._shapes):
            if AS_ACCURATE[kind] == "fp32":
                functions[f"dense{index}"] = gemm.gemm(machine, rows=None, k=k, n=n, epilogue=Epilogue())
                continue
            panels = Panels(machine=machine, n=n)
            width = panels.count * panels.columns
            functions["range"] = int8_dynamic.value_range(machine, size=None)
            functions["quantize"] = int8_dynamic.quantize(machine, size=None)
            functions[f"offset{index}"] = int8_dynamic.offset(machine, columns=width)
            functions[f"affine{index}"] = int8_dynamic.affine(machine, columns=width)
            functions[f"dense{index}"] = int8_gemm.gemm(machine, rows=None, k=k, n=n, dtype="uint8", output=Floats())
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
        built = tvm.compile(module, target=machine.target())
        return {name: built[name] for name in functions}

    def _floats(self, shape: Sequence[int]) -> Array:
        return self._random.standard_normal(tuple(shape), np.float32)

    def _integers(self, shape: Sequence[int], dtype: Any) -> Array:
        about = np.iinfo(dtype)
        return self._random.integers(about.min, about.max, tuple(shape), dtype=dtype)


def _tensor(array: Array) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def _copied(layer: _Layer) -> _Layer:
    return _Layer(*([_tensor(part.numpy()) for part in parts] for parts in (layer.sparse, layer.dense)))
