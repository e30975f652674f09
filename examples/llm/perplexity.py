"""Perplexity of a decoder on the first tokens of WikiText-2.

python -m examples.llm.perplexity MODEL.onnx [--tokens 20000] [--window 512] [--stride 512] [--threads 2]

The text is taken as it is, with its marks for tokenisation (` @-@ `, `<unk>`), which the model has seldom seen: compare
the figures with each other and not with those of papers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.session import Decoder, wikitext
from examples.llm.tokenizer import Tokenizer


def perplexity(decoder: Decoder, tokens: list[int], window: int = 512, stride: int = 512) -> float:
    """Perplexity of all tokens but the first; says on stderr how far it is."""
    total, count = 0.0, 0
    for part in decoder.log_likelihoods(tokens, window, stride):
        total, count = total + float(part.sum()), count + len(part)
        print(f"\r{count} tokens: {np.exp(-total / count):.3f}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return float(np.exp(-total / count))


def main() -> None:
    """Prints the perplexity."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.perplexity", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--window", type=int, default=512, help="tokens that a prediction is made from at most")
    parser.add_argument("--stride", type=int, default=512, help="tokens from one window to the next")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, default=wikitext())
    options = parser.parse_args()
    if not 1 <= options.stride <= options.window:
        parser.error("the stride has to be from 1 to the window, or tokens are left out")
    tokens = Tokenizer(GgufFile(smollm2_weights())).encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    found = perplexity(Decoder(options.model, threads=options.threads), tokens, options.window, options.stride)
    print(f"{options.model}: perplexity {found:.3f} over {len(tokens) - 1} tokens, window {options.window}")


if __name__ == "__main__":
    main()
