"""The verb that measures how sparse activations are, what dropping small ones costs, and what pays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxcomp.calibrate import collect
from onnxcomp.data import Source, load_data
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.opset import raise_opset
from onnxcomp.passes._activations import RECTIFIED
from onnxcomp.passes._feed_forward import FeedForward, find_feed_forward
from onnxcomp.passes._site_rewrite import Rewriter
from onnxcomp.passes._sites import find_sites
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.threshold import Threshold
from onnxcomp.rewrite import Progress
from onnxcomp.select import Select
from onnxcomp.sparsity import Firing, TailError, firing_histogram
from onnxcomp.specs import input_specs
from onnxcomp.stats import Group, RowSample
from onnxcomp.target import Array, Feed
from onnxcomp.verbs.resolve import ModelLike, Shapes, load_model, make_target, pipeline_of, reference_runner
from onnxcomp.verbs.tokens import TokenInput, TokenSource, load_tokens, log_likelihoods, token_input

SHARES = tuple(i / 20 for i in range(20))
"""Shares of dropped neurons at which tail errors are measured."""
RATES = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0)
"""Ends of the intervals of firing rates."""
_LARGEST = 0.6  # tail error beyond which no perplexity is looked at


@dataclass(frozen=True, kw_only=True)
class Density:
    """Share of the neurons of a block that fire for a token.

    Attributes:
        mean: Over the tokens.
        p5: 5th percentile over the tokens.
        p95: 95th percentile.
        firing: Number of neurons that never fire, then of those with a firing rate in each interval of `RATES`.
    """

    mean: float
    p5: float
    p95: float
    firing: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerActivity:
    """Sparsity of one feed-forward block.

    Attributes:
        node: Name of its last product.
        activation: Its activation, e.g. `silu`.
        gated: Whether the activation gates another layer.
        neurons: Their number.
        dead: Neurons that put out zero for every token.
        natural: Neurons whose output is not exactly zero.
        effective: Neurons that are left at the tail error `Sparsity.cett`.
        tail_errors: Tail error (CETT) for each share of `SHARES` that is dropped.
    """

    node: str
    activation: str
    gated: bool
    neurons: int
    dead: int
    natural: Density
    effective: Density
    tail_errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PerplexityPoint:
    """Perplexity with the same tail error in every layer.

    Attributes:
        cett: The tail error.
        sparsity: Share of dropped neurons, mean over the layers.
        perplexity: Of the model on the tokens that thresholds were not calibrated on.
    """

    cett: float
    sparsity: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class SparsityProfile:
    """How sparse the feed-forward blocks of a model are.

    Attributes:
        samples: Feeds that were looked at.
        tokens: Tokens in them.
        cett: Tail error of `LayerActivity.effective`.
        layers: One row a block, in order.
        perplexity: Points by rising tail error, the first without any; empty if the model predicts no tokens.
        one_percent: The share of neurons that may be dropped for 1 % more perplexity (PPL-1%), interpolated; None if
            that is not known.
        advice: What to do, for people.
    """

    samples: int
    tokens: int
    cett: float
    layers: tuple[LayerActivity, ...]
    perplexity: tuple[PerplexityPoint, ...]
    one_percent: float | None
    advice: tuple[str, ...]


def sparsity(
    model: ModelLike,
    *,
    data: Source | None = None,
    tokens: TokenSource | None = None,
    window: int = 256,
    samples: int = 32,
    cett: float = 0.2,
    rows: int = 256,
    measure: bool = True,
    seed: int = 0,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> SparsityProfile:
    """Measures the activations of feed-forward blocks, and what dropping the smallest would cost.

    Tail errors and PPL-1% are those of the Sparsing Law (Luo et al., arXiv 2411.02335); densities and firing rates
    those of the lazy neuron phenomenon (Li et al., arXiv 2210.06313).

    Args:
        model: Path or model; a model in memory is left unchanged.
        data: Sample data.
        tokens: Or tokens, for a decoder; see `onnxcomp.verbs.tokens.load_tokens`.
        window: Tokens of a sample, where tokens are given.
        samples: Most samples to use. For a decoder, perplexity is measured on the second half of them.
        cett: Tail error at which neurons count as dropped.
        rows: Tokens of each block that tail errors are measured on.
        measure: Whether to measure perplexities, which takes a run over half of the data for each point.
        seed: Of everything random.
        shapes: Fixes dynamic input shapes.
        progress: Told about every feed and every point.

    Raises:
        OnnxcompError: If anything is wrong with what was given, or there is no feed-forward block.
    """
    if (data is None) == (tokens is None):
        raise DataError("give either sample data or tokens")
    loaded = load_model(model, shapes)
    working = loaded.clone() if isinstance(model, ir.Model) else loaded
    specs = input_specs(working)
    takes = token_input(working, specs)
    if tokens is not None:
        if takes is None:
            raise DataError("the model has no input that looks up tokens in a table; give sample data")
        data = list(_windows(load_tokens(tokens), takes, window, samples))
    assert data is not None
    feeds = load_data(data, specs, seed=seed).take(samples)
    target = make_target("ort-cpu")
    pipeline_of([Cleanup()], target, "graph", seed).run(working)
    raise_opset(working, Threshold.min_opset)
    blocks = _blocks(working)
    split = takes is not None and measure and len(feeds) > 1
    seen, held_out = feeds.split(None, None) if split else (feeds, None)
    found = _Measured(working, blocks, seen, rows, seed, progress)
    layers = found.layers(cett)
    points: tuple[PerplexityPoint, ...] = ()
    if takes is not None and held_out is not None:
        points = _perplexities(working, takes, list(held_out), found, progress)
    return SparsityProfile(
        samples=len(seen),
        tokens=found.tokens,
        cett=cett,
        layers=layers,
        perplexity=points,
        one_percent=(one := one_percent(points)),
        advice=advise(layers, cett, one),
    )


def _windows(numbers: Array, takes: TokenInput, window: int, samples: int) -> Iterator[Feed]:
    size = takes.length() or window
    count = len(numbers) // size
    if not count:
        raise DataError(f"{len(numbers)} tokens do not fill a window of {size}")
    for start in range(min(count, samples)):
        yield takes.feed(numbers[start * size : (start + 1) * size])


def _blocks(model: ir.Model) -> dict[str, FeedForward]:
    found = find_feed_forward(model)
    if not found.blocks:
        reasons = sorted(set(found.reasons.values()))[:3]
        raise OnnxcompError(f"the model has no feed-forward block ({'; '.join(reasons) or 'and no matrix product'})")
    return {block.down.node.name or "": block for block in found.blocks}


class _Measured:
    """Blocks with samples of what their last products read, and tail errors of these."""

    def __init__(
        self,
        model: ir.Model,
        blocks: Mapping[str, FeedForward],
        feeds: Iterable[Feed],
        rows: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._model, self._feeds, self._blocks = model, feeds, blocks
        self._told = None if progress is None else lambda done, total: progress("observe", done, total)
        values = {name: block.down.source.name or "" for name, block in blocks.items()}
        firing = {value: Firing() for value in values.values()}
        samples = {value: RowSample(rows, seed=seed) for value in values.values()}
        collect(model, {v: Group(firing[v], samples[v]) for v in firing}, feeds, reference_runner(), self._told)
        self._values = values
        self._natural = {name: firing[value] for name, value in values.items()}
        self.tokens = max(f.tokens for f in firing.values())
        self._norms: dict[str, Array] = {}
        self._curves: dict[str, tuple[float, ...]] = {}
        self._levels: dict[str, tuple[float, ...]] = {}
        for number, (name, block) in enumerate(blocks.items()):
            if progress:
                progress("tail errors", number, len(blocks))
            tail = TailError(samples[values[name]].sample, block.down.matrix())
            self._norms[name] = tail.norms
            self._curves[name] = tail.curve(SHARES)
            self._levels[name] = tuple(tail.at(share) for share in SHARES)

    def threshold(self, name: str, cett: float) -> Array:
        """Magnitude of each neuron up to which it is dropped at a tail error."""
        level = np.interp(self._share(name, cett), SHARES, self._levels[name])
        norms = self._norms[name]
        limit = np.where(norms > 0.0, level / np.maximum(norms, 1e-30), np.inf)
        return np.asarray(np.minimum(limit, np.finfo(np.float32).max), np.float32)

    def share(self, cett: float) -> float:
        """Share of neurons dropped at a tail error, mean over the layers."""
        return float(np.mean([self._share(name, cett) for name in self._blocks]))

    def layers(self, cett: float) -> tuple[LayerActivity, ...]:
        """What is known of every block; takes one more run over the data."""
        firing = {name: Firing(self.threshold(name, cett)) for name in self._blocks}
        parts = {self._values[name]: seen for name, seen in firing.items()}
        collect(self._model, parts, self._feeds, reference_runner(), self._told)
        return tuple(
            LayerActivity(
                node=name,
                activation=block.activation,
                gated=block.gate is not None,
                neurons=block.hidden,
                dead=int(np.count_nonzero(self._natural[name].fired == 0)),
                natural=_density(self._natural[name]),
                effective=_density(firing[name]),
                tail_errors=self._curves[name],
            )
            for name, block in self._blocks.items()
        )

    def _share(self, name: str, cett: float) -> float:
        curve = np.maximum.accumulate(self._curves[name])
        # Where several shares have the same error, as those below the natural sparsity, the largest counts.
        last = np.append(curve[1:] > curve[:-1], True)
        return float(np.interp(cett, curve[last], np.asarray(SHARES)[last]))


def _density(seen: Firing) -> Density:
    return Density(
        mean=seen.density,
        p5=seen.density_percentile(5),
        p95=seen.density_percentile(95),
        firing=firing_histogram(seen.rates, RATES),
    )


def _perplexities(
    model: ir.Model, takes: TokenInput, feeds: Sequence[Feed], found: _Measured, progress: Progress | None
) -> tuple[PerplexityPoint, ...]:
    """Points around 1 % more perplexity: tail errors by bisection, five runs at most besides the dense one."""

    def point(cett: float) -> PerplexityPoint:
        changed = model
        if cett:
            changed = model.clone()
            sites, _, _ = find_sites(changed, "cett", Select(), attention=False, column_norms=False)
            rewriter = Rewriter(changed, "cett")
            for site in sites:
                rewriter.drop(site, found.threshold(site.node.name or "", cett))
        share = found.share(cett) if cett else 0.0
        return PerplexityPoint(cett=cett, sparsity=share, perplexity=_perplexity(changed, takes, feeds))

    points = [point(0.0)]
    low, high = 0.0, _LARGEST
    for step in range(5):
        if progress:
            progress("perplexity", step, 5)
        middle = 0.2 if not step else (low + high) / 2
        points.append(point(middle))
        if points[-1].perplexity <= 1.01 * points[0].perplexity:
            low = middle
        else:
            high = middle
    return tuple(sorted(points, key=lambda p: p.cett))


def _perplexity(model: ir.Model, takes: TokenInput, feeds: Sequence[Feed]) -> float:
    names = [v.name or "" for v in model.graph.outputs]
    run = reference_runner()(model, names)
    total, count = 0.0, 0
    for feed in feeds:
        tokens = feed[takes.name].reshape(-1)
        logits = takes.logits(run(feed), len(tokens))
        total += float(log_likelihoods(logits[:-1], tokens[1:]).sum())
        count += len(tokens) - 1
    with np.errstate(over="ignore"):  # a ruined model
        return float(np.exp(-total / max(count, 1)))


def one_percent(points: Sequence[PerplexityPoint]) -> float | None:
    """Sparsity at 1 % more perplexity than the first point, between the points around it; None if there are none."""
    if not points:
        return None
    limit = 1.01 * points[0].perplexity
    for before, behind in pairwise(points):
        if before.perplexity <= limit < behind.perplexity:
            inside = (limit - before.perplexity) / (behind.perplexity - before.perplexity)
            return before.sparsity + inside * (behind.sparsity - before.sparsity)
    return None


def advise(layers: Sequence[LayerActivity], cett: float, ppl_share: float | None) -> tuple[str, ...]:
    """What to do about the activations of a model."""
    advice: list[str] = []
    dead = sum(layer.dead for layer in layers)
    if dead:
        neurons = sum(layer.neurons for layer in layers)
        advice.append(f"prune_dead removes {dead} of {neurons} neurons, which never fire; give it much data")
    if all(layer.activation in RECTIFIED for layer in layers):
        natural = 1.0 - float(np.mean([layer.natural.mean for layer in layers]))
        advice.append(f'threshold with method = "fatrelu", value = 0.01: {natural:.0%} of the values are zero as it is')
        return tuple(advice)
    share = ppl_share if ppl_share is not None else 1.0 - float(np.mean([layer.effective.mean for layer in layers]))
    source = "PPL-1%" if ppl_share is not None else f"tail error {cett:g}"
    if share < 0.15:
        advice.append(f"only {share:.0%} of the neurons can go ({source}): thresholds will not pay without training")
        return tuple(advice)
    method = "chess" if all(layer.gated for layer in layers) else "wina"
    low = 0.05 * int(0.5 * share / 0.05)
    advice.append(f'the last products may drop {share:.0%} of what they read ({source}): method = "cett"')
    advice.append(
        f'threshold with method = "{method}", column_norms = true, sparsity = {max(low, 0.05):.2f} to {share:.2f}, '
        "compared by perplexity or a task metric; it pays for one token at a time where the target has a kernel"
    )
    return tuple(advice)
