"""The emulated CUDA device: it computes what a GPU would, and finds what a GPU would not tell."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
from cuda_emulator import run_kernel  # noqa: E402
from cuda_emulator.building import compile_kernels, missing  # noqa: E402
from tvm import relax, tirx  # noqa: E402
from tvm.script import relax as R  # noqa: E402, N812
from tvm.script import tirx as T  # noqa: E402, N812

cuda_emulator.require()

TYPES = {"float32": "float", "int32": "int", "uint32": "unsigned", "float16": "half", "uint16": "unsigned short"}


def run_source(body, *arrays, threads=32, blocks=1, shared=0, order="forward"):
    """Arrays as a kernel in CUDA C++ leaves them; it calls them a, b, c, ... and its thread t."""
    parameters = ", ".join(f"{TYPES[str(x.dtype)]}* {name}" for x, name in zip(arrays, "abcdef", strict=False))
    head = f'extern "C" __global__ void k({parameters}) {{ int t = threadIdx.x;'
    payload = compile_kernels(f"{head}\n{body}\n}}\n")
    driver = cuda_emulator.install()
    module, function, text = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_char_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), payload) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"k") == 0
    tensors = [tvm.runtime.tensor(x, tvm.cuda()) for x in arrays]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    arguments = (ctypes.c_void_p * len(pointers))(*map(ctypes.addressof, pointers))
    with cuda_emulator.order(order):
        code = driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, None, arguments, None)
    driver.cuGetErrorName(code, ctypes.byref(text))
    driver.cuModuleUnload(module)
    if code:
        raise RuntimeError(text.value.decode())
    return [x.numpy() for x in tensors]


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_nothing_is_installed_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert missing.__wrapped__() == "g++ is missing"


def test_device_is_there(monkeypatch):
    device = tvm.cuda()
    assert device.exist
    assert device.compute_version == "9.0"
    assert device.warp_size == 32
    assert device.max_threads_per_block == 1024
    assert device.max_shared_memory_per_block == 48 << 10
    monkeypatch.setenv("ONNXCOMP_EMULATOR_ARCH", "87")
    assert device.compute_version == "8.7"


@pytest.mark.parametrize("n", [1, 255, 1000])
def test_vectors_of_any_length_are_added(n):
    m = tirx.Var("m", "int64")

    @T.prim_func
    def add(x: T.handle, y: T.handle, z: T.handle):
        X = T.match_buffer(x, (m,), "float32")
        Y = T.match_buffer(y, (m,), "float32")
        Z = T.match_buffer(z, (m,), "float32")
        for b in T.thread_binding((m + 127) // 128, "blockIdx.x"):
            for t in T.thread_binding(128, "threadIdx.x"):
                if b * 128 + t < m:
                    Z[b * 128 + t] = X[b * 128 + t] + Y[b * 128 + t]

    x, y = floats(n), floats(n, seed=1)
    np.testing.assert_array_equal(run_kernel(add, x, y, np.zeros_like(x))[2], x + y)


def test_tiled_gemm():
    m, n, k, tile = 32, 48, 40, 8

    @T.prim_func
    def gemm(A: T.Buffer((m, k), "float32"), B: T.Buffer((k, n), "float32"), C: T.Buffer((m, n), "float32")):
        for by in T.thread_binding(m // tile, "blockIdx.y"):
            for bx in T.thread_binding(n // tile, "blockIdx.x"):
                for ty in T.thread_binding(tile, "threadIdx.y"):
                    for tx in T.thread_binding(tile, "threadIdx.x"):
                        a = T.alloc_buffer((tile, tile), "float32", scope="shared")
                        b = T.alloc_buffer((tile, tile), "float32", scope="shared")
                        c = T.alloc_buffer((1,), "float32", scope="local")
                        c[0] = 0.0
                        for step in range(k // tile):
                            a[ty, tx] = A[by * tile + ty, step * tile + tx]
                            b[ty, tx] = B[step * tile + ty, bx * tile + tx]
                            T.tvm_storage_sync("shared")
                            for i in range(tile):
                                c[0] = c[0] + a[ty, i] * b[i, tx]
                            T.tvm_storage_sync("shared")
                        C[by * tile + ty, bx * tile + tx] = c[0]

    a, b = floats(m, k), floats(k, n, seed=1)
    got = run_kernel(gemm, a, b, np.zeros((m, n), np.float32))[2]
    np.testing.assert_allclose(got, a @ b, rtol=1e-5, atol=1e-5)


def test_rows_are_summed_by_shuffles():
    @T.prim_func
    def sums(X: T.Buffer((4, 32), "float32"), Y: T.Buffer((4,), "float32")):
        for b in T.thread_binding(2, "blockIdx.x"):
            for ty in T.thread_binding(2, "threadIdx.y"):
                for tx in T.thread_binding(32, "threadIdx.x"):
                    s = T.alloc_buffer((1,), "float32", scope="local")
                    s[0] = X[b * 2 + ty, tx]
                    for i in T.unroll(5):
                        s[0] = s[0] + T.tvm_warp_shuffle_down(T.uint32(0xFFFFFFFF), s[0], 16 >> i, 32, 32)
                    if tx == 0:
                        Y[b * 2 + ty] = s[0]

    x = floats(4, 32)
    np.testing.assert_allclose(run_kernel(sums, x, np.zeros(4, np.float32))[1], x.sum(1), rtol=1e-5)


def block_sums(threads):
    @T.prim_func
    def sums(X: T.Buffer((3, threads), "float32"), Y: T.Buffer((3,), "float32")):
        for b in T.thread_binding(3, "blockIdx.x"):
            for t in T.thread_binding(threads, "threadIdx.x"):
                with T.attr(
                    T.comm_reducer(lambda x, y: x + y, [T.float32(0)]),
                    "reduce_scope",
                    T.reinterpret("handle", T.uint64(0)),
                ):
                    s = T.alloc_buffer((1,), "float32", scope="local")
                    v = T.alloc_buffer((1,), "float32", scope="local")
                    v[0] = X[b, t]
                    T.tvm_thread_allreduce(T.uint32(1), v[0], T.bool(True), s[0], t)
                    Y[b] = s[0]

    return sums


@pytest.mark.parametrize("threads", [16, 32, 256])
def test_block_is_summed_as_tvm_does_it(threads):
    x = floats(3, threads)
    got = run_kernel(block_sums(threads), x, np.zeros(3, np.float32))[1]
    np.testing.assert_allclose(got, x.sum(1), rtol=1e-4, atol=1e-5)


def test_race_in_a_sum_by_tvm_is_seen():
    # Its last steps rely on the lanes of a warp to keep step, which no GPU since Volta promises.
    with pytest.raises(AssertionError, match="disagree"):
        run_kernel(block_sums(100), floats(3, 100), np.zeros(3, np.float32))


def test_histogram_by_atomic_additions():
    @T.prim_func
    def histogram(X: T.Buffer((1024,), "int32"), Y: T.Buffer((16,), "int32")):
        for b in T.thread_binding(4, "blockIdx.x"):
            for t in T.thread_binding(256, "threadIdx.x"):
                T.evaluate(T.call_extern("int32", "atomicAdd", T.address_of(Y[X[b * 256 + t]]), 1))

    x = np.random.default_rng(0).integers(0, 16, 1024).astype(np.int32)
    got = run_kernel(histogram, x, np.zeros(16, np.int32))[1]
    np.testing.assert_array_equal(got, np.bincount(x, minlength=16))


def test_dynamic_shared_memory_beyond_48_kb():
    n, threads = 20000, 100

    @T.prim_func
    def turned(X: T.Buffer((n,), "float32"), Y: T.Buffer((n,), "float32")):
        for _ in T.thread_binding(1, "blockIdx.x"):
            for t in T.thread_binding(threads, "threadIdx.x"):
                s = T.alloc_buffer((n,), "float32", scope="shared.dyn")
                for i in range(n // threads):
                    s[i * threads + t] = X[i * threads + t]
                T.tvm_storage_sync("shared")
                for i in range(n // threads):
                    Y[i * threads + t] = s[n - 1 - i * threads - t]

    x = floats(n)
    np.testing.assert_array_equal(run_kernel(turned, x, np.zeros_like(x))[1], x[::-1])


def test_dot_product_of_four_bytes():
    @T.prim_func
    def dot(X: T.Buffer((64, 4), "int8"), W: T.Buffer((64, 4), "int8"), Y: T.Buffer((64,), "int32")):
        for _ in T.thread_binding(1, "blockIdx.x"):
            for t in T.thread_binding(64, "threadIdx.x"):
                Y[t] = T.call_pure_extern(
                    "int32",
                    "__dp4a",
                    T.reinterpret("int32", X[t, T.ramp(0, 1, 4)]),
                    T.reinterpret("int32", W[t, T.ramp(0, 1, 4)]),
                    7,
                )

    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, (64, 4)).astype(np.int8) for _ in range(2))
    got = run_kernel(dot, x, w, np.zeros(64, np.int32))[2]
    np.testing.assert_array_equal(got, (x.astype(np.int32) * w).sum(1) + 7)


def test_dot_products_of_unsigned_bytes():
    rng = np.random.default_rng(0)
    x, w = (rng.integers(0, 256, (32, 4)).astype(np.uint8) for _ in range(2))
    body = "c[t] = __dp4a(a[t], b[t], 0u); d[t] = __dp4a(a[t], int(b[t]), 5);"
    zeros = np.zeros(32, np.uint32)
    _, _, plain, mixed = run_source(body, x.view(np.uint32)[:, 0], w.view(np.uint32)[:, 0], zeros, zeros.view(np.int32))
    np.testing.assert_array_equal(plain, (x.astype(np.int32) * w).sum(1))
    np.testing.assert_array_equal(mixed, (x.astype(np.int32) * w.view(np.int8)).sum(1) + 5)


def test_half_vectors():
    @T.prim_func
    def halves(
        X: T.Buffer((256,), "float16"),
        Y: T.Buffer((256,), "float16"),
        Z: T.Buffer((256,), "float16"),
        W: T.Buffer((256,), "float32"),
    ):
        for _ in T.thread_binding(1, "blockIdx.x"):
            for t in T.thread_binding(32, "threadIdx.x"):
                for i in T.vectorized(8):
                    Z[t * 8 + i] = X[t * 8 + i] * Y[t * 8 + i] + X[t * 8 + i]
                for i in T.vectorized(8):
                    W[t * 8 + i] = T.Cast("float32", T.max(X[t * 8 + i], Y[t * 8 + i]))

    x, y = floats(256).astype(np.float16), floats(256, seed=1).astype(np.float16)
    found = run_kernel(halves, x, y, np.zeros_like(x), np.zeros(256, np.float32))
    np.testing.assert_array_equal(found[2], x * y + x)
    np.testing.assert_array_equal(found[3], np.maximum(x, y).astype(np.float32))


def test_half_is_rounded_to_the_nearest_even():
    near = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (near[:-1] + near[1:]) / 2
    values = np.concatenate([near, between, between * np.float32(1.0001), [7e4, 65519.99, np.inf]])
    values = np.concatenate([values, -values]).astype(np.float32)
    body = f"for (int i = t; i < {values.size}; i += 32) {{ b[i] = half(a[i]); c[i] = float(b[i]); }}"
    _, rounded, back = run_source(body, values, np.zeros(values.size, np.float16), np.zeros_like(values))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded.view(np.uint16), values.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(back, rounded.astype(np.float32))


def test_lanes_of_a_warp_vote_and_reduce():
    body = """
    unsigned mask = t < 8 ? 0xff : 0xffffff00;
    a[t] = __ballot_sync(mask, t % 3 == 0);
    b[t] = __reduce_add_sync(mask, t);
    c[t] = __any_sync(0xffffffff, t == 31) * 2 + __all_sync(0xffffffff, t < 31);
    if (t % 2) d[t] = __activemask();
    __syncwarp();
    e[t] = __match_any_sync(0xffffffff, t / 16);
    f[t] = __shfl_xor_sync(0xffffffff, t, 5) * 100 + __shfl_up_sync(0xffffffff, t, 3, 8);
    """
    a, b, c, d, e, f = run_source(body, *[np.zeros(32, np.uint32) for _ in range(6)], order="shuffled")
    lanes = np.arange(32)
    every_third = sum(1 << i for i in range(0, 32, 3))
    np.testing.assert_array_equal(a, np.where(lanes < 8, every_third & 0xFF, every_third & 0xFFFFFF00))
    np.testing.assert_array_equal(b, np.where(lanes < 8, 28, 468))
    np.testing.assert_array_equal(c, 2)
    np.testing.assert_array_equal(d, np.where(lanes % 2, 0xAAAAAAAA, 0))
    np.testing.assert_array_equal(e, np.where(lanes < 16, 0xFFFF, 0xFFFF0000))
    np.testing.assert_array_equal(f, (lanes ^ 5) * 100 + np.where(lanes % 8 >= 3, lanes - 3, lanes))


def test_lane_that_is_not_there_gives_no_number():
    (got,) = run_source("a[t] = __shfl_down_sync(0xffffffff, a[t], 4);", np.ones(16, np.float32), threads=16)
    np.testing.assert_array_equal(np.isnan(got), np.arange(16) >= 12)


def test_relax_module_with_several_kernels(tmp_path):
    from tvm.s_tir import dlight

    weight = floats(24, 10)
    x = floats(6, 24, seed=1)
    builder = relax.BlockBuilder()
    given = relax.Var("x", R.Tensor((6, 24), "float32"))
    with builder.function("main", [given]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.relu(relax.op.matmul(given, relax.const(weight))))
            out = builder.emit_output(relax.op.nn.softmax(y, axis=-1))
        builder.emit_func_output(out)
    target = cuda_emulator.target()
    with target:
        rules = (dlight.gpu.Matmul(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
        module = dlight.ApplyDefaultSchedule(*rules)(relax.transform.LegalizeOps()(builder.get()))
    built = tvm.compile(module, target=target)
    built.export_library(str(tmp_path / "model.so"))
    e = np.exp(np.maximum(x @ weight, 0))
    for one in (built, tvm.runtime.load_module(str(tmp_path / "model.so"))):
        machine = relax.VirtualMachine(one, tvm.cuda(), memory_cfg="naive")
        got = machine["main"](tvm.runtime.tensor(x, tvm.cuda())).numpy()
        np.testing.assert_allclose(got, e / e.sum(-1, keepdims=True), rtol=1e-4)


def test_missing_barrier_is_seen_in_another_order():
    @T.prim_func
    def turned(X: T.Buffer((64,), "float32"), Y: T.Buffer((64,), "float32"), Z: T.Buffer((64,), "float32")):
        for _ in T.thread_binding(1, "blockIdx.x"):
            for t in T.thread_binding(64, "threadIdx.x"):
                Y[t] = X[t]
                Z[t] = Y[63 - t]

    x = floats(64)
    with pytest.raises(AssertionError, match="forward and in reversed order disagree"):
        run_kernel(turned, x, np.zeros_like(x), np.zeros_like(x))


def test_shared_memory_that_was_not_written_is_nan():
    body = "__shared__ float s[64];\n s[t] = a[t];%s b[t] = s[63 - t];"
    x = floats(64)
    _, got = run_source(body % "", x, np.zeros_like(x), threads=64)
    assert np.isnan(got[:32]).all()
    _, got = run_source(body % " __syncthreads();", x, np.zeros_like(x), threads=64)
    np.testing.assert_array_equal(got, x[::-1])


def test_write_behind_the_end_is_caught():
    @T.prim_func
    def shifted(X: T.Buffer((64,), "float32"), Y: T.Buffer((64,), "float32")):
        for _ in T.thread_binding(1, "blockIdx.x"):
            for t in T.thread_binding(64, "threadIdx.x"):
                Y[t + 1] = X[t]

    with pytest.raises(RuntimeError, match=r"0 bytes behind the end of 256 bytes of global.*thread \(63, 0, 0\)"):
        run_kernel(shifted, floats(64), floats(64))


ONE = np.ones(63, np.float32)
FAULTS = {
    "read far behind": ("a[t] = a[t + 2000];", "access out of bounds.*line 2: a"),
    "write close behind": ("a[t + 32] = 1.0f;", "write out of bounds, 0 bytes behind the end of 252 bytes"),
    "write before": ("a[t - 1] = 1.0f;", "write out of bounds, 1 bytes before the begin"),
    "shared memory": ("extern __shared__ float s[];\n s[t * 33] = 1.0f;", "behind the end of 128 bytes of dynamic"),
    "fixed shared memory": ("__shared__ float s[32];\n *(s + t + 1) = 1.0f;", "behind the end of 128 bytes of s"),
    "local array": ("float s[4]; s[t % 4] = a[t]; a[t] = s[t % 4 + (t == 7)];", "index 4 is out of an array's bounds"),
    "misaligned": ("*(float4*)(a + t) = make_float4(0, 0, 0, 0);", "MISALIGNED.*line 2"),
    "division": ("a[t] = 7 / (int(a[t]) - 1);", "division of an integer by zero"),
    "barrier in a branch": ("if (t < 7) __syncthreads();", "divergent barrier: 7 threads wait.*25 have ended.*line 2"),
    "two barriers": ("if (t < 7) {\n __syncthreads(); } else\n __syncthreads();", "divergent barrier: .* line 4"),
    "shuffle in a branch": ("if (t) a[t] = __shfl_sync(~0u, a[t], 1);\n __syncthreads();", "a warp never meets"),
    "mask without oneself": ("a[t] = __shfl_sync(0xff, a[t], 1);", "is without lane 8"),
    "too much shared memory": ("__shared__ float s[13000]; s[t] = a[t]; a[t] = s[t];", "52000 bytes of shared memory"),
    "stop": ("if (t == 3) __trap();", r"ASSERT.*thread \(3, 0, 0\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(name):
    body, message = FAULTS[name]
    with pytest.raises(RuntimeError, match=message):
        run_source(body, ONE, shared=128)


def test_device_goes_on_after_a_fault():
    with pytest.raises(RuntimeError, match="divergent"):
        run_source("if (t < 7) __syncthreads();", ONE)
    (got,) = run_source("__syncthreads(); a[t] = 2.0f;", ONE)
    np.testing.assert_array_equal(got, np.where(np.arange(63) < 32, 2, 1))


def test_limits_of_a_launch():
    for setting in ({"threads": 1025}, {"shared": 49 << 10}, {"blocks": 0}):
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            run_source("a[t] = 1.0f;", ONE, **setting)


def test_address_of_the_host_is_refused():
    driver = cuda_emulator.install()
    module, function, text = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_char_p()
    driver.cuModuleLoadData(ctypes.byref(module), compile_kernels('extern "C" __global__ void k(float* a) {}\n'))
    driver.cuModuleGetFunction(ctypes.byref(function), module, b"k")
    pointer = ctypes.c_void_p(ONE.ctypes.data)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))
    code = driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, arguments, None)
    driver.cuGetErrorName(code, ctypes.byref(text))
    assert b"argument 0 is the address" in text.value


def test_inline_ptx_is_refused():
    with pytest.raises(RuntimeError, match="cannot compile this for the emulated device"):
        run_source('asm volatile("bar.sync 0;");', ONE)
