from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quick_macros() -> Iterator[None]:
    """Parsing of kernels takes longer than everything else here."""
    pytest.importorskip("tvm")
    from onnxcomp.targets.tvm.importing import _quick_macros

    with _quick_macros():
        yield
