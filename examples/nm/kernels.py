"""Times the N:M kernels against ONNX Runtime's dense products, weights coming from memory.

    python -m examples.nm.kernels [--threads 1] [--shapes 4096x4096 ...] [--rows 1 128]

Each time is the 25th percentile of interleaved runs: CPU time with one thread, which a busy machine disturbs less, else
time that passed. Columns on the right: how many times as fast as dense fp32, as dynamic int8, and as 8- and 4-bit
`MatMulNBits`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np

from examples.sparse_gemv.__main__ import session
from onnxcomp.targets.ort import trials
from onnxcomp.targets.ort.break_even_trials import beyond_cache, clock

SIZES: dict[trials.NmWeights, int] = {"fp32": 4, "fp16": 2, "int8": 1}
MANY = 8  # rows from which on arithmetic takes the time, not memory

DENSE: dict[str, tuple[Callable[..., bytes], float]] = {
    "dense fp32": (partial(trials.dense_matmul, trials.KINDS["fp32"]), 4),
    "dynamic int8": (partial(trials.dense_matmul, trials.KINDS["int8"]), 1),
    "8-bit MatMulNBits": (partial(trials.dense_matmul, trials.KINDS["int8"], equal="int8"), 1),
    "4-bit MatMulNBits": (partial(trials.dense_matmul, trials.KINDS["int4"]), 0.625),
}
OURS: dict[str, tuple[Callable[..., bytes], float]] = {
    f"{kept}:4 {name}": (partial(trials.nm_matmul, name, kept), kept / 4 * (size + 0.25))
    for name, size in SIZES.items()
    for kept in (2, 1)
}


def measure(k: int, n: int, rows: int, threads: int, repeat: int) -> dict[str, float]:
    """Seconds of one product with each form of weight."""
    rng = np.random.default_rng(0)
    least = beyond_cache() if rows <= MANY else 0.0
    made = {}
    for name, (make, size) in {**DENSE, **OURS}.items():
        copies = max(2, round(least / (k * n * size)))
        feed = {"x": rng.standard_normal((copies * rows, k), np.float32), "threshold": np.zeros((), np.float32)}
        made[name] = (session(make(k, n, copies, any_rows=True), threads), feed, copies)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeat + 1):
        for name, (model, feed, copies) in made.items():
            start = clock(threads)
            model.run(None, feed)
            if turn:
                times[name].append((clock(threads) - start) / copies)
    return {name: float(np.percentile(found, 25)) for name, found in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096", "576x1536"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    print(f"{'weight':20} {'shape':>11} {'rows':>5} {'ms':>9}  " + "".join(f"{'x ' + name:>20}" for name in DENSE))
    for shape in args.shapes:
        k, n = (int(part) for part in shape.split("x"))
        for rows in args.rows:
            found = measure(k, n, rows, args.threads, args.repeat)
            for name, seconds in found.items():
                ratios = "".join(f"{found[dense] / seconds:20.2f}" for dense in DENSE)
                print(f"{name:20} {shape:>11} {rows:5} {seconds * 1e3:9.3f}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
