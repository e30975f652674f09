"""Groups of layers that belong together by name."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.select import module_paths


def groups(nodes: Sequence[ir.Node]) -> dict[str, list[ir.Node]]:
    """Blocks of a model: nodes by the outermost scopes of their names that tell some of them apart.

    A scope is a module of PyTorch, if the exporter recorded it, else a part of the node's name between slashes or
    dots. A number goes with the name before it, so `blocks.0` and `blocks.1` are groups and `blocks` is none. Nodes
    without scopes are grouped by op type, so that names given by a counter do not pass for blocks.
    """
    paths = [_path(node) for node in nodes]
    depth = 1
    while depth < max(map(len, paths), default=0) and len({path[:depth] for path in paths}) < 2:
        depth += 1
    found: dict[str, list[ir.Node]] = {}
    for node, path in zip(nodes, paths, strict=True):
        found.setdefault(".".join(path[:depth]) or node.op_type, []).append(node)
    return found


def _path(node: ir.Node) -> tuple[str, ...]:
    name = (node.name or "").replace("/", ".").strip(".")
    modules = module_paths(node) or (name.rpartition(".")[0],)  # the last part names the op itself
    path: list[str] = []
    for part in filter(None, modules[-1].split(".")):
        if part.isdigit() and path:
            path[-1] += f".{part}"
        else:
            path.append(part)
    return tuple(path)
