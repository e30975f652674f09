"""What is printed of sparsity and perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcomp.cli_render import print_json, say, table

if TYPE_CHECKING:
    from onnxcomp.api import Perplexity, SparsityProfile
    from onnxcomp.verbs.sparsity import Density


def sparsity(found: SparsityProfile, as_json: bool) -> None:
    """Prints how sparse each block is, what dropping more would cost, and what to do."""
    if as_json:
        print_json(found)
        return
    rows = [
        (x.node, x.activation, str(x.neurons), str(x.dead), *_spread(x.natural), *_spread(x.effective))
        for x in found.layers
    ]
    left = f"left at CETT {found.cett:g}"
    table(("block", "activation", "neurons", "dead", "not zero", "P5 - P95", left, "P5 - P95"), rows)
    if found.perplexity:
        points = [(f"{p.cett:.3f}", f"{p.sparsity:.1%}", f"{p.perplexity:.3f}") for p in found.perplexity]
        table(("CETT", "dropped", "perplexity"), points)
    if found.one_percent is not None:
        say(f"1 % more perplexity: {found.one_percent:.1%} of the neurons dropped")
    for line in found.advice:
        say(f"- {line}")
    say(f"{found.tokens} tokens in {found.samples} samples")


def perplexity(found: Perplexity, as_json: bool) -> None:
    """Prints a perplexity, and its rise over a baseline."""
    if as_json:
        print_json({**vars(found), "rise": found.rise})
        return
    say(
        f"perplexity {found.perplexity:.4f} ({found.tokens} tokens, window {found.window}, stride {found.stride}, "
        f"{found.target})"
    )
    if found.rise is not None:
        say(f"baseline {found.baseline:.4f}: {found.rise:+.2%}")


def _spread(density: Density) -> tuple[str, str]:
    return f"{density.mean:.1%}", f"{density.p5:.1%} - {density.p95:.1%}"
