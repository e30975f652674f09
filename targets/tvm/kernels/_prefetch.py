"""Asking for memory before it is read, where a processor does not see by itself what comes next."""

from __future__ import annotations

from tvm.script import tirx as T

LINE = 64
"""Bytes that come from memory at once."""


@T.inline
def fetch(element):
    """Asks for the line of an element, into the second-level cache so that sums stay in the first."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(element), 0, 2, 1))
