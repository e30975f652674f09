"""Times decoding with a large decoder of random weights, dense and with sparsity set by construction.

    python -m examples.llm.synthetic [--layers 22] [--method teal] [--sparsity 0.5 0.7 0.9] [--weights int8 int4]
        [--patterns 2:4 1:4] [--context 128] [--repeat 30] [--threads 1]

The decoder has the sizes of TinyLlama-1.1B, so that its weights come from memory: 1.0 GB in 8 bits with 22 layers. What
it writes is noise; how much of each activation is dropped is what its thresholds were calibrated to, and is measured
again. With `--patterns`, models with N:M weights in 8 bits as well: all but the output layer.
Times are medians of interleaved runs, of the CPU with one thread; ratios are medians of ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from examples.llm.generate import BoundModel
from examples.llm.model import Config, build
from onnxcomp import api, native
from onnxcomp.model import load, save
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.passes.threshold import Threshold
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.rewrite import Pass
from onnxcomp.targets.ort import reference_runner
from onnxcomp.targets.ort.break_even_trials import clock

HIDDEN, VOCABULARY = 5632, 32000
TINY_LLAMA = Config(layers=22, width=2048, heads=32, kv_heads=4, head_size=64, theta=10000.0, epsilon=1e-5)
CALIBRATION = 64  # tokens


class RandomWeights:
    """Normal weights under the names that a GGUF file of a Llama has, each drawn when it is asked for."""

    def __init__(self, config: Config) -> None:
        keys = config.kv_heads * config.head_size
        self.metadata = {
            "llama.block_count": config.layers,
            "llama.embedding_length": config.width,
            "llama.attention.head_count": config.heads,
            "llama.attention.head_count_kv": config.kv_heads,
            "llama.rope.freq_base": config.theta,
            "llama.attention.layer_norm_rms_epsilon": config.epsilon,
        }
        self._shapes: Mapping[str, tuple[int, ...]] = {
            "token_embd": (VOCABULARY, config.width),
            "attn_q": (config.width, config.width),
            "attn_k": (keys, config.width),
            "attn_v": (keys, config.width),
            "attn_output": (config.width, config.width),
            "ffn_gate": (HIDDEN, config.width),
            "ffn_up": (HIDDEN, config.width),
            "ffn_down": (config.width, HIDDEN),
        }
        self._width = config.width
        self._rng = np.random.default_rng(0)

    def tensor(self, name: str) -> np.ndarray:
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind.endswith("norm"):
            return np.ones(self._width, np.float32)
        shape = self._shapes[kind]
        return self._rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))


def rewritten(source: Path, passes: list[Pass], feeds: list[dict[str, Any]], folder: Path) -> Path:
    """The model of the artifact of what the passes make, which stays in `portable.onnx` until the next one comes."""
    portable = folder / "portable.onnx"
    api.rewrite(source, portable, recipe=passes, data=feeds, check="none")
    artifact = api.compile(portable, Path(tempfile.mkdtemp(dir=folder)))
    return artifact.path / "model.onnx"


def dropped(model: ir.Model, feed: dict[str, Any]) -> float:
    """Share of the inputs of native sparse products that a feed of one token drops."""
    calls = [n for n in model.graph if n.domain == native.DOMAIN]
    names = [str(n.inputs[0].name) for n in calls]
    values = reference_runner(model, names)(feed)
    shares = []
    for node, name in zip(calls, names, strict=True):
        limit = node.inputs[-1].const_value.numpy()
        shares.append(float((np.abs(values[name]) <= limit).mean()))
    return float(np.mean(shares))


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.synthetic", description=__doc__)
    parser.add_argument("--layers", type=int, default=TINY_LLAMA.layers)
    parser.add_argument("--method", default="teal", choices=("teal", "cats"), help="cats: feed-forward blocks only")
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--patterns", nargs="*", default=[], help="N:M weights, such as 1:4")
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"], choices=("int8", "int4"))
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="synthetic.", dir=options.folder) as name:
        run(options, Path(name))


def run(options: argparse.Namespace, folder: Path) -> None:
    config = Config(**{**vars(TINY_LLAMA), "layers": options.layers})
    save(build(RandomWeights(config)), folder / "float.onnx", external=True)
    rng = np.random.default_rng(1)
    shape = (1, config.kv_heads, 0, config.head_size)
    empty = {f"past_{k}.{i}": np.zeros(shape, np.float32) for i in range(config.layers) for k in ("key", "value")}
    feeds = [{"input_ids": rng.integers(0, VOCABULARY, (1, CALIBRATION)), **empty}]
    token = {"input_ids": rng.integers(0, VOCABULARY, (1, 1)), **empty}
    paths: dict[str, Path] = {}
    for weights in options.weights:
        rest = WeightOnly(bits=int(weights[3:]), block_size=64 if weights == "int8" else 32, method="rtn")
        paths[f"dense {weights}"] = rewritten(folder / "float.onnx", [rest], feeds, folder)
        for share in options.sparsity:
            step = Threshold(method=options.method, sparsity=share, weights=weights)
            name = f"{options.method} {share:.0%} {weights}"
            paths[name] = rewritten(folder / "float.onnx", [step, rest], feeds, folder)
            print(f"{name}: a new token drops {dropped(load(paths[name]), token):.1%}", flush=True)
    for pattern in options.patterns:
        steps = [NmMask(pattern=pattern, method="magnitude"), NmPack(values="int8"), WeightOnly(bits=8, method="rtn")]
        paths[f"{pattern} int8"] = rewritten(folder / "float.onnx", steps, feeds, folder)
    (folder / "float.onnx").unlink()
    times(paths, options, rng)


def times(paths: Mapping[str, Path], options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Prints times of one token, against the dense models."""
    models = {name: BoundModel(path, threads=options.threads) for name, path in paths.items()}
    caches = {}
    prompt = rng.integers(0, VOCABULARY, options.context).tolist()
    for name, model in models.items():
        _, caches[name] = model.read(prompt, model.empty_cache())
    taken: dict[str, list[float]] = {name: [] for name in models}
    for token in rng.integers(0, VOCABULARY, options.repeat + 2).tolist():
        for name, model in models.items():
            start = clock(options.threads)
            model.read([token], caches[name])
            taken[name].append(clock(options.threads) - start)
    seconds = {name: np.array(found[2:]) for name, found in taken.items()}
    dense = [name for name in models if name.startswith("dense")]
    print(f"\n{options.threads} thread(s), {options.context} tokens in the cache")
    print(f"{'model':18} {'MB':>6} {'ms/token':>9} " + " ".join(f"{'x ' + name:>13}" for name in dense))
    for name, found in seconds.items():
        size = sum(f.stat().st_size for f in paths[name].parent.iterdir()) / 1e6
        ratios = " ".join(f"{np.median(seconds[d] / found):13.2f}" for d in dense)
        print(f"{name:18} {size:6.0f} {np.median(found) * 1e3:9.1f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
