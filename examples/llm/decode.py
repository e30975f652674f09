"""Answers a prompt with a decoder and says how long a token takes.

python -m examples.llm.decode MODEL.onnx [--prompt TEXT] [--tokens 100] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.session import Decoder
from examples.llm.tokenizer import Tokenizer


def chat(text: str) -> str:
    """A question in the form that the model was trained on."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    """Prints the answer and the times."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.decode", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="Name three planets and say one fact about each.")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to write at most")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    tokenizer = Tokenizer(GgufFile(smollm2_weights()))
    decoder = Decoder(options.model, threads=options.threads)
    prompt = tokenizer.encode(chat(options.prompt))
    decoder.run(prompt)  # the first run allocates
    stamps, answer = [time.perf_counter()], []
    for token in decoder.greedy(prompt, tokenizer.end, options.tokens):
        answer.append(token)
        stamps.append(time.perf_counter())
    print(tokenizer.decode(answer))
    steps = np.diff(stamps) * 1e3
    print(f"\n{options.threads} thread(s): prompt of {len(prompt)} tokens {steps[0]:.1f} ms")
    if len(steps) > 1:
        low, middle, high = np.percentile(steps[1:], [25, 50, 75])
        print(f"{len(steps) - 1} further tokens: {middle:.2f} ms each (p25 {low:.2f}, p75 {high:.2f})")


if __name__ == "__main__":
    main()
