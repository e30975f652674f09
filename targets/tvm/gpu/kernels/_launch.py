"""What a launch tells the compiler of itself."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def resident(blocks: int) -> Any:
    """A scope, inside of a kernel's threads: so many blocks have to fit on a multiprocessor, and no more.

    Without it ptxas takes it for better to fit more, and spares registers: it then starts loads one after another that
    were to be on their way together.
    """
    return T.attr(T.int32(0), "tirx.launch_bounds_min_blocks_per_sm", blocks)
