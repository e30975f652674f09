"""Writes text with a decoder and says how long a token of the prompt and of the answer takes.

    python -m examples.llm.generate MODEL.onnx [--decode ONE_TOKEN.onnx] [--core FOLDER] [--prompt TEXT]
        [--tokens 100] [--temperature 0] [--threads 1]

The cache stays in the memory of onnxruntime: what one run puts out is bound as the input of the next, whichever session
runs it. With `--decode`, another file with the same inputs and outputs writes the answer, one of few bits for example.
With `--core`, a folder that `examples.llm.core_infer --out` wrote, the answer is computed with the neurons that the
prompt uses most; MODEL is not needed then.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from examples.llm.decode import chat
from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.tokenizer import Tokenizer
from onnxcomp import native
from onnxcomp.targets.ort.runtime import make_session, onnxruntime, session_options

Values = Mapping[str, Any]
"""OrtValues by name of a graph input or output."""

STAGES: tuple[Literal["prefill"], Literal["gather"], Literal["decode"]] = ("prefill", "gather", "decode")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_CHECKS = 3  # single tokens differ by much
_HELD = 4  # sets of weights that are kept for prompts of the same clusters


class BoundModel:
    """A decoder, or another graph, whose inputs and outputs are bound and not copied.

    Args:
        path: The model; it may use native ops of onnxcomp.
        threads: Threads of one run.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        domains = (native.DOMAIN,) if native.available() else ()
        self._session = make_session(path, session_options(threads=threads, domains=domains))
        self._binding = self._session.io_binding()
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._pasts = {i.name: i for i in self._session.get_inputs() if i.name.startswith("past_")}

    def empty_cache(self) -> Values:
        """A cache of no tokens: the open dimension of its shape is their number."""
        shapes = {name: [d if isinstance(d, int) else 0 for d in past.shape] for name, past in self._pasts.items()}
        return {n: ort_value(np.zeros(s, _DTYPES[self._pasts[n].type])) for n, s in shapes.items()}

    def bind(self, values: Values) -> None:
        """Binds inputs, which stay until others of the same names take their place."""
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)

    def run(self, values: Values) -> dict[str, Any]:
        """Binds inputs and runs; the outputs are new values, which nothing writes to any more."""
        self.bind(values)
        self._binding.clear_binding_outputs()
        for name in self._outputs:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        return dict(zip(self._outputs, self._binding.get_outputs(), strict=True))

    def read(self, tokens: Sequence[int], cache: Values) -> tuple[dict[str, Any], Values]:
        """Runs tokens that follow on those of the cache; all outputs, and the cache with the new tokens."""
        ids = ort_value(np.asarray(tokens, np.int64)[None])
        outputs = self.run({"input_ids": ids, **cache})
        return outputs, {name: outputs[name.replace("past_", "present_")] for name in self._pasts}


def ort_value(array: np.ndarray) -> Any:
    """An array as a value of onnxruntime."""
    return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


class Writer(Protocol):
    """What continues a prompt token by token."""

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        """Forgets everything, reads a prompt, and returns the logits behind it."""

    def step(self, token: int) -> np.ndarray:
        """Takes one more token and returns the logits behind it."""


class Dense:
    """Reads the prompt with one model and writes with another, or with the same.

    Args:
        prefill: Reads the prompt.
        decode: Takes the tokens of the answer.
    """

    def __init__(self, prefill: BoundModel, decode: BoundModel | None = None) -> None:
        self._prefill = prefill
        self._decode = prefill if decode is None else decode
        self._cache: Values = {}

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        outputs, self._cache = self._prefill.read(prompt, self._prefill.empty_cache())
        return last_logits(outputs)

    def step(self, token: int) -> np.ndarray:
        outputs, self._cache = self._decode.read([token], self._cache)
        return last_logits(outputs)


@dataclass
class CoreInfer:
    """Writes with the neurons that the prompt uses most, and chooses others when the answer drifts off.

    Every `check`th token goes through the dense model, which tells what share of its core neurons is in use. That is
    put in relation to tokens of the prompt: 1 if it is as large as theirs, 0 if it is that of neurons drawn at random.
    Where the mean of the last three checks is below `least`, the last `window` tokens are read again by the dense
    model, which renews their cache as well, and the neurons are those that they use most.

    Attributes:
        prefill, gather, decode: The graphs of the pass `core_neurons`.
        check: Tokens from one check to the next; 0 for none.
        least: Smallest mean overlap with which the neurons stay.
        window: Tokens that neurons are chosen anew by.
        overlaps: What the checks found since the start.
        chosen: How often neurons were chosen since the start.
        seconds: What the choice took since the start: taking the weights and binding them.
    """

    prefill: BoundModel
    gather: BoundModel
    decode: BoundModel
    check: int = 0
    least: float = 0.6
    window: int = 64
    overlaps: list[float] = field(default_factory=list)
    chosen: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._tokens: list[int] = []
        self._cache: Values = {}
        self._index: dict[str, np.ndarray] = {}
        self._of_cluster: dict[int | None, Values] = {}
        self._usual, self._since = 1.0, 0
        self._recent: deque[float] = deque(maxlen=_CHECKS)

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1, **options: Any) -> CoreInfer:
        """From `prefill.onnx`, `gather.onnx` and `decode.onnx` in a folder."""
        prefill, gather, decode = (BoundModel(folder / f"{name}.onnx", threads=threads) for name in STAGES)
        return cls(prefill, gather, decode, **options)

    def start(self, prompt: Sequence[int]) -> np.ndarray:
        self._tokens, self.overlaps, self.chosen, self.seconds = list(prompt), [], 0, 0.0
        outputs, self._cache = self.prefill.read(prompt, self.prefill.empty_cache())
        self._choose(outputs)
        return last_logits(outputs)

    def step(self, token: int) -> np.ndarray:
        self._tokens.append(token)
        self._since += 1
        dense = bool(self.check) and self._since % self.check == 0
        outputs, self._cache = (self.prefill if dense else self.decode).read([token], self._cache)
        if not dense:
            return last_logits(outputs)
        self.overlaps.append(self._overlap(outputs))
        self._recent.append(self.overlaps[-1])
        return last_logits(outputs) if np.mean(self._recent) >= self.least else self._choose_anew()

    def _choose(self, outputs: Values) -> None:
        started = time.perf_counter()
        index = {name: value for name, value in outputs.items() if name.startswith("core_index.")}
        cluster = int(outputs["core_cluster"].numpy()) if "core_cluster" in outputs else None
        weights = self._of_cluster.pop(cluster, None) or self.gather.run(index)
        self.decode.bind(weights)
        if cluster is not None:  # the latest come last
            self._of_cluster[cluster] = weights
            if len(self._of_cluster) > _HELD:
                del self._of_cluster[next(iter(self._of_cluster))]
        self._index = {name.removeprefix("core_index."): value.numpy() for name, value in index.items()}
        self._usual = self._share(outputs)
        self._recent.clear()
        self._since, self.chosen = 0, self.chosen + 1
        self.seconds += time.perf_counter() - started

    def _choose_anew(self) -> np.ndarray:
        recent = self._tokens[-self.window :]
        keep = len(self._tokens) - len(recent)
        earlier = {name: ort_value(value.numpy()[:, :, :keep]) for name, value in self._cache.items()}
        outputs, self._cache = self.prefill.read(recent, earlier)
        self._choose(outputs)
        return last_logits(outputs)

    def _overlap(self, outputs: Values) -> float:
        """How well the neurons in use fit the tokens of a run: 1 as for those that chose them, 0 as by chance."""
        chance = float(np.mean([len(i) / outputs[f"core_count.{n}"].shape()[0] for n, i in self._index.items()]))
        gain = self._usual - chance
        return (self._share(outputs) - chance) / gain if gain > 0 else 1.0

    def _share(self, outputs: Values) -> float:
        """Of the neurons that are core for a token of a run, those in use: mean of tokens and layers."""
        counts = {layer: outputs[f"core_count.{layer}"].numpy() for layer in self._index}
        return float(np.mean([counts[n][index].sum() / max(counts[n].sum(), 1) for n, index in self._index.items()]))


def last_logits(outputs: Values) -> np.ndarray:
    """Logits behind the last token of a run: float32 (vocabulary,)."""
    return np.asarray(outputs["logits"].numpy()[0, -1], np.float32)


def sampler(temperature: float, seed: int = 0) -> Callable[[np.ndarray], int]:
    """Takes the likeliest token at temperature 0, else draws one with the probabilities at this temperature."""
    random = np.random.default_rng(seed)

    def pick(logits: np.ndarray) -> int:
        if not temperature:
            return int(logits.argmax())
        likely = np.exp((logits - logits.max()).astype(np.float64) / temperature)
        return int(random.choice(len(logits), p=likely / likely.sum()))

    return pick


@dataclass(frozen=True)
class Answer:
    """What was written, and how long it took.

    Attributes:
        tokens: Without the one that ends the text.
        prefill: Seconds for the prompt, choice of neurons included.
        steps: Seconds for each run with one token.
    """

    tokens: list[int]
    prefill: float
    steps: list[float]


def write(writer: Writer, prompt: Sequence[int], end: int, most: int, pick: Callable[[np.ndarray], int]) -> Answer:
    """Continues a prompt by at most `most` tokens, up to the token `end`."""
    started = time.perf_counter()
    logits = writer.start(prompt)
    prefill = time.perf_counter() - started
    tokens: list[int] = []
    steps: list[float] = []
    while len(tokens) < most and (token := pick(logits)) != end:
        tokens.append(token)
        if len(tokens) < most:
            started = time.perf_counter()
            logits = writer.step(token)
            steps.append(time.perf_counter() - started)
    return Answer(tokens, prefill, steps)


def main() -> None:
    """Prints the answer and the times."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.generate", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--decode", type=Path, help="model that takes the tokens of the answer")
    parser.add_argument("--core", type=Path, help="folder with the graphs of core_neurons")
    parser.add_argument("--check", type=int, default=64, help="tokens from one check for drift to the next; 0: none")
    parser.add_argument("--prompt", default="Name three planets and say one fact about each.")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.model is None) == (options.core is None):
        parser.error("give either a model or --core")
    tokenizer, threads = Tokenizer(GgufFile(smollm2_weights())), options.threads
    writer: Writer
    if options.core is not None:
        writer = CoreInfer.load(options.core, threads=threads, check=options.check)
    else:
        other = None if options.decode is None else BoundModel(options.decode, threads=threads)
        writer = Dense(BoundModel(options.model, threads=threads), other)
    prompt = tokenizer.encode(chat(options.prompt))
    writer.start(prompt)  # the first run allocates
    answer = write(writer, prompt, tokenizer.end, options.tokens, sampler(options.temperature, options.seed))
    print(tokenizer.decode(answer.tokens))
    print(f"\n{threads} thread(s): prompt of {len(prompt)} tokens, {len(prompt) / answer.prefill:.1f} tokens/s")
    if answer.steps:
        rate, (low, middle, high) = 1 / np.mean(answer.steps), np.percentile(answer.steps, [25, 50, 75]) * 1e3
        print(f"answer: {rate:.1f} tokens/s; {middle:.2f} ms each (p25 {low:.2f}, p75 {high:.2f})")
    if isinstance(writer, CoreInfer):
        shares = ", ".join(f"{share:.2f}" for share in writer.overlaps) or "none"
        print(
            f"neurons chosen {writer.chosen} times in {writer.seconds * 1e3:.1f} ms; share in use at checks: {shares}"
        )


if __name__ == "__main__":
    main()
