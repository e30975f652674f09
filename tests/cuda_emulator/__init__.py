"""A CUDA device emulated on the CPU, for tests of kernels where there is no GPU: what they compute, never how fast.

Stand-ins for libcuda and libcudart are built by g++ and loaded under TVM's own CUDA runtime; the CUDA source that TVM
writes is compiled by g++ as C++. After `install()` the device "cuda" exists: `tvm.compile` for a CUDA target, tensors
on `tvm.cuda()`, `relax.VirtualMachine` and `load_module` work as with a GPU. For the test of one kernel:

    import cuda_emulator
    cuda_emulator.require()                 # skips the test (or the module) where it cannot run

    x, y, out = cuda_emulator.run_kernel(prim_func, x, y, np.zeros(n, "float32"))

`run_kernel` takes the arguments of the PrimFunc (arrays; Python numbers for scalars), runs it with the threads in
forward, then in reversed order, demands that both agree (`atol=` for float atomics) and returns all arrays as they are
after the run. `prim_func` has its threads bound (`T.thread_binding`, or `T.launch_thread`).

What is found beside wrong results, as a `RuntimeError` that names kernel, block and thread:

* accesses outside of an allocation of global memory or of an array in shared memory, and of local arrays;
* misaligned vector accesses, host addresses given to kernels, division of integers by zero;
* barriers that not all threads of a block reach, collectives (shuffles, votes) that not all lanes of the mask reach;
* more shared memory or threads than the device has;
* a missing barrier, as a difference between the two orders. Shared and fresh global memory is NaN (-1 for integers).

A virtual machine of Relax keeps memory in a pool, in which an overrun can go unseen:
`relax.VirtualMachine(built, tvm.cuda(), memory_cfg="naive")` asks for each tensor by itself.

Inline PTX cannot be run: no cp.async, no mma, no wmma. `__dp4a`, shuffles, votes, `__reduce_*_sync`, atomics, half and
bfloat16, vectors, dynamic shared memory can. Floats are contracted to FMA as by nvcc; `__expf` and the like are exact.

`order("reversed")` sets the order of threads for what is run by hand. Environment: `ONNXCOMP_EMULATOR_ARCH` (90),
`ONNXCOMP_EMULATOR_ORDER` (0 forward, 1 reversed, 2 shuffled), `ONNXCOMP_EMULATOR_CACHE` (a folder).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_emulator.building import build_libraries, compile_kernels, missing

ORDERS = ("forward", "reversed", "shuffled")


@cache
def install() -> ctypes.CDLL:
    """Makes the device "cuda" exist in this process; returns the emulated driver.

    Raises:
        RuntimeError: It cannot run here.
    """
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    import tvm
    from tvm.support import nvcc  # noqa: F401 its callback must not replace the emulator's

    if tvm.get_global_func("device_api.cuda", allow_missing=True) is not None:
        raise RuntimeError("a CUDA device is here already")
    driver, runtime = build_libraries()
    loaded = ctypes.CDLL(str(driver))
    ctypes.CDLL(str(runtime))
    # Never closed: TVM keeps what it registers.
    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    use_compiler()
    return loaded


def use_compiler() -> None:
    """Has TVM compile CUDA source for the emulated device, whatever it was told before."""
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_kernels, override=True)


def require() -> None:
    """Skips the test, or the module that calls it, where the emulator cannot run."""
    pytest.importorskip("tvm")
    try:
        install()
    except RuntimeError as error:
        pytest.skip(f"no emulated CUDA device: {error}", allow_module_level=True)


@contextmanager
def order(name: str, seed: int = 0) -> Iterator[None]:
    """Order that the threads of a block, and the blocks, run in: "forward", "reversed" or "shuffled"."""
    driver = install()
    driver.onnxcomp_emulator_order(ORDERS.index(name), seed)
    try:
        yield
    finally:
        driver.onnxcomp_emulator_order(0, 0)


def target(arch: str = "sm_87") -> Any:
    """A CUDA target, with LLVM for the host's part."""
    import tvm

    device = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
    return tvm.target.Target({"kind": "cuda", "arch": arch, **device}, host="llvm")


def compiled(function: Any, arch: str = "sm_87") -> Any:
    """A PrimFunc as a function of tensors on `tvm.cuda()`."""
    import tvm

    install()
    use_compiler()
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target(arch))["main"]


def run_kernel(
    function: Any, *arguments: Any, arch: str = "sm_87", atol: float = 0.0, orders: Sequence[str] = ORDERS[:2]
) -> list[np.ndarray]:
    """Arrays among the arguments as a kernel leaves them, in the order given.

    Args:
        function: A PrimFunc with its threads bound.
        *arguments: An array for each buffer, a number for each scalar.
        arch: CUDA architecture that it is compiled for.
        atol: By how much the results of two orders of the threads may differ.
        orders: Orders to run the threads in.

    Raises:
        AssertionError: Two orders disagree: a barrier is missing.
        RuntimeError: The kernel does what a device forbids.
    """
    import tvm

    run = compiled(function, arch)
    first: list[np.ndarray] = []
    for name in orders:
        given = [_on_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
        with order(name):
            run(*given)
        found = [g.numpy() for g in given if isinstance(g, tvm.runtime.Tensor)]
        first = first or found
        for at, (one, other) in enumerate(zip(first, found, strict=True)):
            message = f"array {at}: threads in {orders[0]} and in {name} order disagree"
            np.testing.assert_allclose(other, one, rtol=0, atol=atol, err_msg=message)
    return first


def _on_device(array: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda())
