"""Break-even sparsities of kernels in TIR for machines that were not measured: Xeon (Emerald Rapids), one thread."""

from __future__ import annotations

from onnxcomp.break_even import BreakEven

DEFAULT: tuple[BreakEven, ...] = ()
