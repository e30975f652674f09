"""Times the sparse kernels against ONNX Runtime's dense ops of the same weight type, weights coming from memory.

python -m examples.sparse_gemv [--threads 1] [--kinds fp32 int8 int4] [--shapes 4096x4096 ...] [--zeros 50 70 90]

Each time is the 25th percentile of interleaved runs: CPU time with one thread, which a busy machine disturbs less, else
time that passed. GB/s counts the weights that had to be read.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp import native
from onnxcomp.targets.ort import trials as models
from onnxcomp.targets.ort.break_even_trials import clock
from onnxcomp.targets.ort.runtime import make_session, session_options

MATMULS = ("4096x4096", "4096x11008", "11008x4096", "1536x576", "576x1536")
MLPS = ("2048x5632",)
INPUTS = 5  # different sets of inputs, in turn


@dataclass
class Case:
    """A model under test: `bytes` of weights read by one op at `zeros`, None for a dense one."""

    name: str
    session: Any
    copies: int
    zeros: float | None = None
    bytes: float = 0


def read_bandwidth(threads: int, size: int = 1 << 30) -> float:
    """Bytes a second that `threads` threads read, each from memory of its own, in the best of two ways.

    Servers have caches of hundreds of megabytes, which `size` has to exceed by far.
    """
    search = ctypes.CDLL(None).memchr
    search.restype, search.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    blocks = [np.ones(size // threads // 4, np.float32) for _ in range(threads)]

    def find(block: np.ndarray) -> None:
        search(block.ctypes.data, 2, block.nbytes)

    ways: list[Callable[[np.ndarray], object]] = [find, np.max]
    times: list[list[float]] = [[] for _ in ways]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            for way, taken in zip(ways, times, strict=True):
                start = clock(threads)
                if threads == 1:
                    way(blocks[0])
                else:
                    list(pool.map(way, blocks))
                taken.append(clock(threads) - start)
    return size / float(min(np.percentile(taken, 25) for taken in times))


def session(model: bytes, threads: int) -> Any:
    return make_session(model, session_options(threads=threads, domains=[native.DOMAIN]))


def feeds(case: Case, rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Normal inputs and gates, and the threshold that drops the wanted share of them."""
    shapes = {i.name: i.shape for i in case.session.get_inputs()}
    compared = "gates" if "gates" in shapes else "x"
    for _ in range(INPUTS):
        feed = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items() if shape}
        share = case.zeros or 0.0
        limit = np.quantile(np.abs(feed[compared]), share) if share > 0 else -1.0
        yield {**feed, "threshold": np.asarray(limit, np.float32)}


def measure(cases: list[Case], repeat: int, threads: int) -> list[float]:
    """Seconds of one op of each case."""
    rng = np.random.default_rng(0)
    inputs = [list(feeds(case, rng)) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for turn in range(repeat + 1):
        for case, given, found in zip(cases, inputs, times, strict=True):
            start = clock(threads)
            case.session.run(None, given[turn % INPUTS])
            if turn:
                found.append((clock(threads) - start) / case.copies)
    return [float(np.percentile(found, 25)) for found in times]


def matmul_cases(kind: models.Kind, k: int, n: int, args: argparse.Namespace) -> list[Case]:
    copies = max(2, round(args.megabytes * 1e6 / (k * n * kind.size)))
    ours = session(models.threshold_matmul(kind, k, n, copies), args.threads)
    cases = [Case(f"dense {kind.name}", session(models.dense_matmul(kind, k, n, copies), args.threads), copies)]
    for percent in args.zeros:
        kept = 1 - percent / 100
        cases.append(Case(f"threshold {kind.name}", ours, copies, percent / 100, kept * k * n * kind.size))
        if args.topk:
            model = models.topk_matmul(kind, k, n, copies, max(1, round(kept * k)))
            cases.append(
                Case(f"topk {kind.name}", session(model, args.threads), copies, percent / 100, cases[-1].bytes)
            )
    return cases


def mlp_cases(kind: models.Kind, k: int, f: int, args: argparse.Namespace) -> list[Case]:
    copies = max(2, round(args.megabytes * 1e6 / (2 * k * f * kind.size)))
    ours = session(models.gated_mlp(kind, k, f, copies), args.threads)
    cases = [Case(f"dense up+down {kind.name}", session(models.dense_mlp(kind, k, f, copies), args.threads), copies)]
    for percent in args.zeros:
        read = (1 - percent / 100) * 2 * k * f * kind.size
        cases.append(Case(f"gated mlp {kind.name}", ours, copies, percent / 100, read))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=models.KINDS, default=list(models.KINDS))
    parser.add_argument("--shapes", nargs="+", default=MATMULS, help="K x N of the products")
    parser.add_argument("--mlps", nargs="*", default=MLPS, help="K x F of the gated MLPs")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0, 45, 50, 70, 90], help="percent of inputs dropped")
    parser.add_argument("--topk", action="store_true", help="TopKMatMul as well")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--megabytes", type=float, default=200, help="weights of one type")
    args = parser.parse_args()

    bandwidth = read_bandwidth(args.threads)
    print(f"{args.threads} thread(s); memory is read at {bandwidth / 1e9:.1f} GB/s")
    header = ("kernel", "shape", "zeros", "ms", "x dense", "x dense 4-bit", "GB/s", "of memory")
    print("{:24} {:>11} {:>6} {:>8} {:>8} {:>13} {:>6} {:>9}".format(*header))
    for shapes, make in ((args.shapes, matmul_cases), (args.mlps, mlp_cases)):
        for shape in shapes:
            rows, columns = (int(part) for part in shape.split("x"))
            kinds = [models.KINDS[name] for name in dict.fromkeys(("int4", *args.kinds))]
            groups: list[list[Case]] = []  # frees the weights of the shape before
            groups = [make(kind, rows, columns, args) for kind in kinds]
            seconds = iter(measure([case for group in groups for case in group], args.repeat, args.threads))
            four_bit = 0.0
            for kind, group in zip(kinds, groups, strict=True):
                dense = next(seconds)
                four_bit = four_bit or dense
                if kind.name not in args.kinds:
                    for _ in group[1:]:
                        next(seconds)
                    continue
                print(f"{group[0].name:24} {shape:>11} {'':6} {dense * 1e3:8.3f} {1:8.2f} {four_bit / dense:13.2f}")
                for case in group[1:]:
                    taken = next(seconds)
                    speed = case.bytes / taken
                    print(
                        f"{case.name:24} {shape:>11} {case.zeros:6.0%} {taken * 1e3:8.3f} {dense / taken:8.2f} "
                        f"{four_bit / taken:13.2f} {speed / 1e9:6.1f} {speed / bandwidth:9.0%}"
                    )


if __name__ == "__main__":
    main()
