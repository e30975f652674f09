"""Boards: kinds of CPU that models are compiled for, each a file of data beside this one or of the user's."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxcomp.errors import RecipeError, TargetError
from onnxcomp.registry import unknown
from onnxcomp.targets.tvm.machine import Dot, Machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOST = "host"
"""The CPU of this machine."""


class Board(BaseModel):
    """Content of a board's file.

    Attributes:
        summary: What it is.
        triple: LLVM's target triple.
        cpu: LLVM's name of the CPU.
        features: LLVM's names of what it has beyond that, each with `+` or `-` before it.
        lanes: Float32 values in a vector.
        registers: Vectors that fit in registers.
        dot: How integers are multiplied; see `machine.Dot`.
        memory_mib: Memory of a common board of that kind.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    summary: str
    triple: str = Field(pattern=r"^[a-z0-9_]+(-[a-z0-9_]+){1,3}$")
    cpu: str = Field(pattern=r"^[a-z0-9_.-]+$")
    features: list[str] = Field(default_factory=list)
    lanes: int = Field(ge=1, le=16)
    registers: int = Field(ge=8, le=32)
    dot: Dot
    memory_mib: int = Field(ge=1)

    def machine(self, name: str) -> Machine:
        """What kernels have to know of it."""
        return Machine(
            name=name,
            triple=self.triple,
            cpu=self.cpu,
            features=tuple(self.features),
            lanes=self.lanes,
            registers=self.registers,
            dot=self.dot,
        )


def boards(architecture: str) -> dict[str, Board]:
    """Those that come with onnxcomp, by name, of an architecture as triples name it."""
    return {name: board for name, board in _all().items() if board.triple.startswith(f"{architecture}-")}


def cpu_machine(name: str, flags: frozenset[str]) -> Machine:
    """The machine of any architecture that a name stands for.

    Args:
        name: A name that comes with onnxcomp, or `host`.
        flags: Instruction sets of this machine, for `host`.

    Raises:
        RecipeError: If there is no such board.
    """
    known = _all()
    if name == HOST:
        name = _host("aarch64" if platform.machine() in ("aarch64", "arm64") else "x86_64", flags)
    if name not in known:
        raise RecipeError(unknown("board", name, sorted(known)))
    return known[name].machine(name)


def machine(name: str, architecture: str, flags: frozenset[str]) -> Machine:
    """The machine that a board's name or file stands for.

    Args:
        name: `host`, a name that comes with onnxcomp, or the path of a `.toml` file.
        architecture: What the target compiles for, as triples name it.
        flags: Instruction sets of this machine, for `host`.

    Raises:
        RecipeError: If there is no such board.
        TargetError: If the file is not valid, or of another architecture.
    """
    if name.endswith(".toml"):
        board = read(Path(name), Board)
        if not board.triple.startswith(f"{architecture}-"):
            raise TargetError(f"{name} is a board of {board.triple}; this target compiles for {architecture}")
        return board.machine(Path(name).stem)
    known = boards(architecture)
    if name == HOST:
        name = _host(architecture, flags)
    if name not in known:
        raise RecipeError(unknown("board", name, sorted(known)))
    return known[name].machine(name)


def _host(architecture: str, flags: frozenset[str]) -> str:
    """The board whose code this machine runs best."""
    if architecture == "aarch64":
        return "cortex-a76" if "asimddp" in flags else "cortex-a72"
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= flags:
        return "x86-64-v4"
    if {"avx2", "fma", "avx_vnni"} <= flags:
        return "avx-vnni"
    return "x86-64-v3" if {"avx2", "fma"} <= flags else "x86-64"


def _all() -> dict[str, Board]:
    return {path.stem: read(path, Board) for path in sorted(Path(__file__).parent.glob("*.toml"))}


_B = TypeVar("_B", bound=BaseModel)


def read(path: Path, kind: type[_B]) -> _B:
    """Reads a board's file.

    Args:
        path: The file.
        kind: Model of its content.

    Raises:
        TargetError: If it cannot be read, or is not such a board.
    """
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise TargetError(f"{path} is not a board: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read as a board: {error}") from error
