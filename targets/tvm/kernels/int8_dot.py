"""Sums of products of 8-bit integers, four at a time: how each CPU does it, and how operands lie for that.

A *word* is an int32 that holds four activations, the first in its lowest byte. Every dot product takes a vector of
words and, for each of its lanes, four weights; activations are of the kind that the CPU multiplies (`unsigned`), and
those of the other kind become it by a flip of their highest bit, which moves the zero point by 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.machine import Machine

GROUP = 4
"""Products that are summed at once."""

_FLIP = -(2**31) + 0x00808080


Way = Literal["vnni", "madd", "sdot", "mull", "dp4a", "plain"]
"""How the products are summed: VPDPBUSD, VPMADDWD or PMADDWD of 16-bit pairs, SDOT, SMULL and SADALP, DP4A of a GPU, or
plain code."""


def way(machine: Machine) -> Way:
    """The fastest way of a machine."""
    match machine.dot:
        case "vnni512" | "vnni256":
            return "vnni"
        case "sdot" | "dp4a":
            return machine.dot
        case "avx2":
            return "madd"
    if machine.triple.startswith("x86_64"):
        return "madd"
    return "mull" if machine.triple.startswith("aarch64") else "plain"


def lanes(machine: Machine) -> int:
    """Sums in a vector; on a GPU, in a warp."""
    return {"vnni512": 16, "vnni256": 8, "avx2": 8, "sdot": 4, "dp4a": 32, "none": 4}[machine.dot]


def unsigned(machine: Machine) -> bool:
    """Whether activations have to be uint8; else int8."""
    return way(machine) not in ("sdot", "mull", "dp4a")


def flipped(machine: Machine, dtype: str) -> bool:
    """Whether activations of type `dtype` are of the other kind than the one that is multiplied."""
    return (dtype == "uint8") != unsigned(machine)


def zero_point(machine: Machine, dtype: str, zero: int) -> int:
    """Zero point of activations as they are multiplied."""
    return zero + (0 if not flipped(machine, dtype) else 128 if dtype == "int8" else -128)


def flip(words: Any) -> Any:
    """Words with the highest bit of every byte turned."""
    return words ^ tirx.const(_FLIP, words.ty.dtype)


def pack(machine: Machine, weight: Array) -> Array:
    """Integers of shape (K, N), K whole groups and N whole vectors, as (K / 4, N / lanes, 4 * lanes) int8."""
    k, n = weight.shape
    wide = lanes(machine)
    split = weight.astype(np.int8).reshape(k // GROUP, GROUP, n // wide, wide)
    match way(machine):
        case "mull":  # the first two of all lanes, then the other two
            split = split.reshape(k // GROUP, 2, 2, n // wide, wide).transpose(0, 3, 1, 4, 2)
        case "madd":  # the even ones of all lanes in pairs, then the odd ones
            split = split.reshape(k // GROUP, 2, 2, n // wide, wide).transpose(0, 3, 2, 4, 1)
        case "plain":
            split = split.transpose(0, 2, 1, 3)
        case _:
            split = split.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(split).reshape(k // GROUP, n // wide, GROUP * wide)


def dot(machine: Machine, sums: Any, words: Any, weights: Callable[[int, int], Any]) -> Any:
    """`sums` plus four products a lane, on a CPU.

    Args:
        machine: What it is for.
        sums: Vector of int32.
        words: Vector of words.
        weights: Reads a part of the packed vector of weights: from where, and how many.
    """
    wide = lanes(machine)
    size = GROUP * wide
    match way(machine):
        case "vnni":
            intrinsic = f"llvm.x86.avx512.vpdpbusd.{32 * wide}"
            bytes_ = T.reinterpret(f"int8x{size}", words)
            return T.call_llvm_pure_intrin(f"int32x{wide}", intrinsic, sums, bytes_, weights(0, size))
        case "sdot":
            bytes_ = T.reinterpret(f"int8x{size}", words)
            return T.call_llvm_pure_intrin(
                f"int32x{wide}", "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, bytes_, weights(0, size)
            )
        case "mull":
            for i in range(2):
                pair = T.Cast(f"int16x{wide}", T.shift_right(words, tirx.const(16 * i, f"int32x{wide}")))
                bytes_ = T.Cast("int16x8", T.reinterpret("int8x8", pair))
                product = bytes_ * T.Cast("int16x8", weights(i * 8, 8))
                paired = T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", product)
                sums = sums + paired
            return sums
        case "madd":
            half = size // 2
            name = "llvm.x86.avx2.pmadd.wd" if wide == 8 else "llvm.x86.sse2.pmadd.wd"
            mask = tirx.const(0x00FF00FF, f"int32x{wide}")
            short = T.reinterpret(f"uint16x{half}", words)
            odd = T.shift_right(short, tirx.const(8, f"uint16x{half}"))
            for part, offset in ((words & mask, 0), (odd, half)):
                values = T.Cast(f"int16x{half}", weights(offset, half))
                pairs = T.reinterpret(f"int16x{half}", part)
                sums = sums + T.call_llvm_pure_intrin(f"int32x{wide}", name, pairs, values)
            return sums
    for i in range(GROUP):
        value = T.shift_right(words, tirx.const(8 * i, f"int32x{wide}")) & tirx.const(255, f"int32x{wide}")
        sums = sums + value * T.Cast(f"int32x{wide}", weights(i * wide, wide))
    return sums
