"""Puts constants into the order that was found."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, constant, redirect, users
from onnxcomp.passes._disk_weights import Spool
from onnxcomp.passes._permutation_flow import Flow, is_weight, value_of
from onnxcomp.passes._permutation_labels import labelled, sources
from onnxcomp.target import Array


def fold(editor: Editor, spool: Spool, flow: Flow, order: Array) -> None:
    """Reorders all constants of a flow, one at a time, and renames what no longer holds what it did.

    Args:
        editor: Of the main graph.
        spool: Takes weights that were on disk.
        flow: What moves.
        order: For each label the one whose content it gets.
    """
    shared: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for place in flow.places:
        if not isinstance(place, ir.Value):
            shared.setdefault(value_of(place), []).append(place)
        elif is_weight(place):
            array = constant(place)
            assert array is not None
            new = _ordered(flow, place, array, order)
            if new is not None:
                _write(editor, spool, place, new)
        elif place.uses() and any(_moves(flow.labels.find(c), order) for c in flow.strands(place)):
            editor.rename(place, "permuted")
    for value, uses in shared.items():
        _copy(editor, flow, value, uses, order)


def _moves(codes: Array, order: Array) -> bool:
    held = codes[codes >= 0]
    return bool((order[held] != held).any())


def _ordered(flow: Flow, place: ir.Value | tuple[ir.Node, int], array: Array, order: Array) -> Array | None:
    """An array in the new order; None if that is the old one."""
    moved = False
    for codes in flow.strands(place):
        found = flow.labels.find(codes)
        if not _moves(found, order):
            continue
        moved = True
        axes = labelled(codes)
        front = np.moveaxis(array, axes, range(len(axes)))
        rows = front.reshape(codes.size, -1)[sources(found, order).reshape(-1)]
        array = np.moveaxis(rows.reshape(front.shape), range(len(axes)), axes)
    return np.ascontiguousarray(array) if moved else None


def _write(editor: Editor, spool: Spool, value: ir.Value, array: Array) -> None:
    tensor = value.const_value
    if value.producer() is not None or tensor is None:
        redirect(value, editor.weight(value.name or "weight", array), users(value))
        return
    # In place, so that no second copy of all weights is in memory until unused ones are removed.
    value.const_value = ir.tensor(array, dtype=tensor.dtype, name=value.name)
    if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
        spool.take(value)


def _copy(editor: Editor, flow: Flow, value: ir.Value, uses: list[tuple[ir.Node, int]], order: Array) -> None:
    """A vector that is shared: one for each order in which it is read, unless all its entries are the same."""
    array = constant(value)
    assert array is not None
    copies: dict[bytes, ir.Value] = {}
    for node, index in uses:
        new = _ordered(flow, (node, index), array, order)
        if new is None or new.tobytes() == array.tobytes():
            continue
        key = new.tobytes()
        if key not in copies:
            copies[key] = editor.weight(f"{value.name}_permuted", new)
        node.replace_input_with(index, copies[key])
