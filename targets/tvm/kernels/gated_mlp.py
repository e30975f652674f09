"""The up projection of a gated MLP for those neurons only whose gate is open."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.ops import GROUP
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._int4_dots import has_dots, int4_dots, pack_int4_rows
from onnxcomp.targets.tvm.kernels._prefetch import fetch
from onnxcomp.targets.tvm.kernels.int4 import int4_columns, int4_shape, pack_int4, sixteen_plus
from onnxcomp.targets.tvm.machine import Machine

_SUMS = 4
"""Vectors that a product is summed in, so that no addition waits for the one before."""


_AHEAD = 4
"""Neurons until the one whose weights are asked for."""


@cache
def neurons(machine: Machine, *, rows: int | None, k: int, f: int, dtype: str) -> Any:
    """Kernel `(gates (rows, F), places (rows, F), counts (rows,), x (rows, K), u (F, K), scale (F,), y (rows, F))`.

    `y[r, i] = gates[r, i] * scale[j] * (x[r] @ u[j])`, j = places[r, i], for the first `counts[r]` of them.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs.
        f: Neurons.
        dtype: Of `u`, float32 or int8.
    """
    lanes = machine.lanes
    m = tirx.Var("rows", "int64") if rows is None else rows
    step = _SUMS * lanes
    steps, floats = k // step, f"float32x{lanes}"
    lines = max(1, step * (4 if dtype == "float32" else 1) // 64)  # of memory that a step reads

    def lane(index):
        return T.ramp(index * lanes, 1, lanes)

    @T.prim_func
    def kernel(g_: T.handle, p_: T.handle, c_: T.handle, x_: T.handle, u_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        gates = T.match_buffer(g_, (m, f), "float32")
        places = T.match_buffer(p_, (m, f), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        x = T.match_buffer(x_, (m, k), "float32")
        up = T.match_buffer(u_, (f, k), dtype)
        scale = T.match_buffer(s_, (f,), "float32")
        y = T.match_buffer(y_, (m, f), "float32")
        for row in T.serial(m):
            for i in T.parallel(counts[row]):
                at = T.alloc_buffer((2,), "int64")
                sums = T.alloc_buffer((step,), "float32")
                rest = T.alloc_buffer((1,), "float32")
                at[0] = T.Cast("int64", places[row, i])
                at[1] = T.Cast("int64", places[row, T.min(i + _AHEAD, counts[row] - 1)])
                for v in T.unroll(_SUMS):
                    sums[lane(v)] = T.broadcast(T.float32(0), lanes)
                for j in T.serial(steps):
                    for i_ in T.unroll(lines):
                        fetch(up[at[1], j * step + i_ * (step // lines)])
                    for v in T.unroll(_SUMS):
                        c = T.meta_var(T.ramp(j * step + v * lanes, 1, lanes))
                        sums[lane(v)] = sums[lane(v)] + x[row, c] * T.Cast(floats, up[at[0], c])
                rest[0] = vm.total((sums[lane(0)] + sums[lane(1)]) + (sums[lane(2)] + sums[lane(3)]))
                for j in T.serial(k - steps * step):
                    rest[0] = rest[0] + x[row, steps * step + j] * T.Cast("float32", up[at[0], steps * step + j])
                y[row, i] = gates[row, i] * scale[at[0]] * rest[0]

    return kernel


def pack_neurons_int4(machine: Machine, weight: Array) -> Array:
    """4-bit integers as `neurons_int4` takes them.

    Args:
        machine: What for.
        weight: uint8 (F, K/2), low bits first.

    Returns:
        int32, see `int4.int4_shape`.
    """
    return pack_int4_rows(machine, weight) if has_dots(machine) else pack_int4(machine, weight)


@cache
def neurons_int4(machine: Machine, *, rows: int | None, k: int, f: int, scale: str, zeros: bool) -> Any:
    """Kernel `(gates (rows, F), places, counts (rows,), x (rows, K), u, scale (F, G), zero, y (rows, F))`, G = K / 32.

    As `neurons`, of 4-bit integers as `pack_neurons_int4` packs (F, K / 2).

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs, a multiple of 32.
        f: Neurons.
        scale: Type of the scales, float32 or float16.
        zeros: Zero points are (F, G); else there is a single one, (1,). Both uint8.
    """
    if has_dots(machine):
        return int4_dots(machine, rows=rows, k=k, f=f, scale=scale, zeros=zeros)
    lanes = machine.lanes
    columns, groups = int4_columns(machine), k // GROUP
    vectors = int4_shape(machine, f, k)[1]
    m = tirx.Var("rows", "int64") if rows is None else rows
    own, of_group, floats = columns // GROUP, GROUP // lanes, f"float32x{lanes}"

    def lane(index):
        return T.ramp(index * lanes, 1, lanes)

    @T.prim_func
    def kernel(
        g_: T.handle, p_: T.handle, c_: T.handle, x_: T.handle, u_: T.handle, s_: T.handle, z_: T.handle, y_: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        gates = T.match_buffer(g_, (m, f), "float32")
        places = T.match_buffer(p_, (m, f), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        x = T.match_buffer(x_, (m, k), "float32")
        up = T.match_buffer(u_, (f, vectors, lanes), "int32")
        scale_ = T.match_buffer(s_, (f, groups), scale)
        zero = T.match_buffer(z_, (f, groups) if zeros else (1,), "uint8")
        y = T.match_buffer(y_, (m, f), "float32")
        wide = T.alloc_buffer((vectors * columns,), "float32")
        sums_of_x = T.alloc_buffer((vectors * own,), "float32")
        for row in T.serial(m):
            for j in T.serial(vectors * columns):
                wide[j] = T.if_then_else(j < k, x[row, j], T.float32(0))
            for g in T.serial(vectors * own):
                sums_of_x[g] = T.float32(0)
                for j in T.serial(GROUP):
                    sums_of_x[g] = sums_of_x[g] + wide[g * GROUP + j]
            for i in T.parallel(counts[row]):
                at = T.alloc_buffer((2,), "int64")
                sums = T.alloc_buffer((own * lanes,), "float32")
                group = T.alloc_buffer((own * lanes,), "float32")
                words = T.alloc_buffer((lanes,), "int32")
                factor = T.alloc_buffer((groups,), "float32")
                rest = T.alloc_buffer((1,), "float32")
                at[0] = T.Cast("int64", places[row, i])
                at[1] = T.Cast("int64", places[row, T.min(i + _AHEAD, counts[row] - 1)])
                for g in T.serial(groups):
                    factor[g] = T.Cast("float32", scale_[at[0], g])
                for g in T.unroll(own):
                    sums[lane(g)] = T.broadcast(T.float32(0), lanes)
                for j in T.serial(vectors):
                    fetch(up[at[1], j, 0])
                    words[lane(0)] = up[at[0], j, T.ramp(0, 1, lanes)]
                    for g in T.unroll(own):
                        group[lane(g)] = T.broadcast(T.float32(0), lanes)
                        for s in T.unroll(of_group):
                            nibble = T.meta_var(g * of_group + s)
                            group[lane(g)] = group[lane(g)] + wide[
                                T.ramp(j * columns + nibble * lanes, 1, lanes)
                            ] * sixteen_plus(words[lane(0)], nibble, lanes)
                        each: T.let = factor[T.min(j * own + g, groups - 1)]
                        sums[lane(g)] = sums[lane(g)] + T.broadcast(each, lanes) * group[lane(g)]
                # What 16 and the zero points have added, of a vector of groups at a time.
                for v in T.serial(groups // lanes):
                    g = T.meta_var(T.ramp(v * lanes, 1, lanes))
                    offset = T.meta_var(
                        T.Cast(floats, zero[at[0], g]) if zeros else T.broadcast(T.Cast("float32", zero[0]), lanes)
                    )
                    sums[lane(0)] = sums[lane(0)] - factor[g] * sums_of_x[g] * (
                        offset + T.broadcast(T.float32(16), lanes)
                    )
                rest[0] = T.float32(0)
                for g in T.unroll(own):
                    rest[0] = rest[0] + vm.total(sums[lane(g)])
                for i_ in T.serial(groups % lanes):
                    g = T.meta_var(groups // lanes * lanes + i_)
                    offset = T.meta_var(T.Cast("float32", zero[at[0], g] if zeros else zero[0]))
                    rest[0] = rest[0] - factor[g] * sums_of_x[g] * (offset + T.float32(16))
                y[row, i] = gates[row, i] * rest[0]

    return kernel
