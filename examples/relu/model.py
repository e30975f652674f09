"""A small transformer whose feed-forward layers are gated by ReLU, trained on the spot and exported to ONNX.

`l1` adds ProSparse's penalty on what the last products read (Song et al., arXiv 2402.13516): nothing up to a quarter of
the training, then more and more along a sine up to three quarters, then `l1` times the sum over neurons, mean over
tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.relu.text import Text
from onnxcomp import api


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train and how long.

    Attributes:
        width: Channels between layers.
        hidden: Neurons of a feed-forward block.
        layers: Blocks.
        heads: Heads of attention.
        context: Characters of a window.
        steps: Steps of training.
        batch: Windows of a step.
        rate: Learning rate at its highest.
        l1: Weight of the penalty at its highest.
        seed: Of weights and batches.
        threads: To train with; what small models take is not worth two.
    """

    width: int = 128
    hidden: int = 768
    layers: int = 4
    heads: int = 4
    context: int = 128
    steps: int = 1200
    batch: int = 12
    rate: float = 2e-3
    l1: float = 0.0
    seed: int = 0
    threads: int = 2

    def penalty(self, step: int) -> float:
        """Weight of the penalty at a step."""
        done = min(max(2.0 * step / self.steps - 0.5, 0.0), 1.0)
        return self.l1 * 0.5 * (math.sin(math.pi * (done - 0.5)) + 1.0)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for f in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention, self.mlp = Attention(config), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Numbers of characters `(N, T)` to logits `(N, T, vocabulary)`."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        for block in self.blocks:
            for last in (block.attention.out, block.mlp.down):
                nn.init.zeros_(last.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.characters(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class OneText(nn.Module):
    """The decoder for one text: `(T,)` to `(T, vocabulary)`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens[None])[0]


def train(config: Config, text: Text) -> Decoder:
    """Trains a decoder from scratch; says now and then on stderr how far it is."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = Decoder(config, len(text.characters))
    read: list[Tensor] = []
    hooks = [b.mlp.down.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for b in model.blocks]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    started, mean = time.perf_counter(), 0.0
    for step, windows in enumerate(_batches(config, text)):
        warm, done = min(1.0, (step + 1) / (0.05 * config.steps)), step / config.steps
        for group in optimizer.param_groups:
            group["lr"] = config.rate * warm * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)))
        # Half the time where the processor has instructions for bfloat16; the weights stay float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            logits = model(windows[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        mean += (float(loss.detach()) - mean) * max(1.0 / (step + 1), 0.02)
        if penalty := config.penalty(step):
            loss = loss + penalty * sum(neurons.abs().float().sum(-1).mean() for neurons in read)
        read.clear()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, config.steps // 12) == 0:
            seconds = time.perf_counter() - started
            print(f"  step {step + 1}: loss {mean:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    for hook in hooks:
        hook.remove()
    return model.eval()


def _batches(config: Config, text: Text) -> Iterator[Tensor]:
    """Windows of one character more than the context, from anywhere in the text."""
    random, training = np.random.default_rng(config.seed), torch.from_numpy(text.training)
    for _ in range(config.steps):
        starts = random.integers(0, len(training) - config.context, config.batch)
        yield torch.stack([training[s : s + config.context + 1] for s in starts])


def model(config: Config, text: Text) -> Path:
    """The exported model: trained once, then kept in the cache (`$ONNXCOMP_CACHE`, else `~/.cache/onnxcomp`).

    Its one open dimension is the number of characters.
    """
    key = hashlib.sha256(repr(astuple(config)).encode() + text.training.tobytes()).hexdigest()[:16]
    cache = Path(os.environ.get("ONNXCOMP_CACHE") or Path.home() / ".cache" / "onnxcomp")
    path = cache / f"relu-{key}.onnx"
    if not path.is_file():
        print(f"training for {path.name} ...", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        example = (torch.zeros(config.context // 2, dtype=torch.int64),)
        partial = path.with_suffix(".partial.onnx")
        # The dimension that the export leaves open is the first one: here that of the characters.
        api.export(
            OneText(train(config, text)), partial, example_inputs=example, dynamic_batch=True,
            input_names=["tokens"], output_names=["logits"],
        )  # fmt: skip
        os.replace(partial, path)
    return path
