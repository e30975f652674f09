"""Kernels for older processors, in processes of their own: a variable set here would not reach C's `getenv`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcomp import native

FILES = ["test_threshold_matmul.py", "test_sparse_ops.py", "test_nm_lowering.py"]
SELECTION = (
    "test_kernel_equals_reference and (131-2049-2 or 67-40-0 or 259-576-0) "
    "or test_kernel_equals_the_dense_product or test_nan_and_infinity_reach_the_output and inf or test_all_kept"
)


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *files],
        env={**os.environ, "ONNXCOMP_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
