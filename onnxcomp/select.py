"""Which nodes a pass may touch."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import onnx_ir as ir
from pydantic import BeforeValidator

from onnxcomp.errors import RecipeError

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which the dynamo exporter records module paths."""


def _tuple(value: Any) -> Any:
    """TOML has lists only, and one pattern may stand without brackets."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_tuple)]


@dataclass(frozen=True, kw_only=True)
class Select:
    """Selects nodes by op type, node name and PyTorch module path.

    A pattern is a glob (`/blocks/*/fc2/*`), or with the prefix `re:` a regular expression that has to match the whole
    text. A node is selected when it fits one pattern of every list that is not empty, and none of `skip`. An empty
    selector takes every node.

    Attributes:
        op: Op types, e.g. `MatMul`.
        name: Node names.
        module: PyTorch module paths as the dynamo exporter records them, e.g. `blocks.0.mlp.fc2`.
        skip: Names, op types or module paths to leave out.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    op: Patterns = ()
    name: Patterns = ()
    module: Patterns = ()
    skip: Patterns = ()

    def __post_init__(self) -> None:
        for name in ("op", "name", "module", "skip"):
            object.__setattr__(self, name, _tuple(getattr(self, name)))
        for pattern in (*self.op, *self.name, *self.module, *self.skip):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from error

    def __call__(self, node: ir.Node) -> bool:
        """Whether the selector takes `node`."""
        name, op, modules = node.name or "", node.op_type, module_paths(node)
        if self.op and not _any(self.op, (op,)):
            return False
        if self.name and not _any(self.name, (name,)):
            return False
        if self.module and not _any(self.module, modules):
            return False
        return not _any(self.skip, (name, op, *modules))


def _any(patterns: tuple[str, ...], texts: tuple[str, ...]) -> bool:
    return any(_fits(p, t) for p in patterns for t in texts)


def _fits(pattern: str, text: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], text) is not None
    return fnmatchcase(text, pattern)


def module_paths(node: ir.Node) -> tuple[str, ...]:
    """Paths of the PyTorch modules that a node comes from, outermost first; empty if the exporter left none."""
    text = node.metadata_props.get(SCOPES)
    if not text:
        return ()
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    if not isinstance(scopes, list):
        return ()
    # The last scope is the name of the operation inside the innermost module.
    return tuple(s for s in scopes[:-1] if isinstance(s, str) and s)
