"""Writes what is known of the sparsity of a model as an HTML page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from onnxcomp import plots, templates
from onnxcomp.errors import OnnxcompError
from onnxcomp.report import write_whole
from onnxcomp.verbs.sparsity import RATES, SHARES, SparsityProfile
from onnxcomp.workdir import check_writable

_ALL = 0.99
"""Natural density from which on a block has nothing to show, as with SiLU: its outputs are hardly ever zero."""


def write_sparsity_page(
    profile: SparsityProfile, path: str | os.PathLike[str], *, model: str = "model", data: str = ""
) -> None:
    """Writes one HTML page that loads nothing; it appears whole or not at all.

    Plots need matplotlib, without which there are tables only. The same profile gives the same bytes.

    Args:
        profile: As `sparsity` returns it.
        path: A file that ends in `.html`, in a folder that exists; replaced if it is there.
        model: What the model is called, in the title.
        data: What the profile was measured on, in words.

    Raises:
        OnnxcompError: If the page cannot be written there.
    """
    check_page(path)
    try:
        write_whole(Path(path), sparsity_page(profile, model=model, data=data))
    except OSError as error:
        raise OnnxcompError(f"cannot write {path}: {error.strerror or error}") from error


def check_page(path: str | os.PathLike[str]) -> None:
    """Fails before long work rather than after it.

    Raises:
        OnnxcompError: If no page can be written to `path`.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise OnnxcompError(f"{path}: the page is HTML; give a name that ends in .html")
    check_writable(path)


def sparsity_page(profile: SparsityProfile, *, model: str, data: str) -> str:
    """The page as text."""
    layers = profile.layers
    level = f"{profile.cett:g}"
    firing = {f"left at tail error {level}": [layer.effective.firing for layer in layers]}
    if any(layer.natural.mean < _ALL for layer in layers):
        firing = {"not zero": [layer.natural.firing for layer in layers], **firing}
    intervals = _intervals(RATES)
    view = {
        "profile": profile,
        "model": model,
        "data": data,
        "level": level,
        "mean": {kind: float(np.mean([getattr(x, kind).mean for x in layers])) for kind in ("natural", "effective")},
        "dead": sum(layer.dead for layer in layers),
        "neurons": sum(layer.neurons for layer in layers),
        "firing": firing,
        "intervals": intervals,
        "shares": SHARES,
        "shown": range(2, len(SHARES), 2),
        "plots": _plots(profile, firing, intervals),
    }
    return templates.page("sparsity.html.jinja", view)


def _plots(
    profile: SparsityProfile, firing: Mapping[str, Sequence[Sequence[int]]], intervals: Sequence[str]
) -> dict[str, str]:
    """Pictures as SVG, empty for what was not measured or cannot be drawn."""
    found = dict.fromkeys(("densities", "firing", "tails", "perplexities"), "")
    if not plots.available():
        return found
    found["densities"] = plots.densities(
        {
            title: [(density.mean, density.p5, density.p95) for density in densities]
            for title, densities in (
                ("not zero", [layer.natural for layer in profile.layers]),
                (f"left at tail error {profile.cett:g}", [layer.effective for layer in profile.layers]),
            )
        }
    )
    found["firing"] = plots.firing_rates(firing, intervals)
    found["tails"] = plots.tail_errors(SHARES, [layer.tail_errors for layer in profile.layers], profile.cett)
    points = [(p.sparsity, p.perplexity) for p in profile.perplexity]
    if points and math.isfinite(points[0][1]):
        found["perplexities"] = plots.perplexities(points, 1.01 * points[0][1], profile.one_percent)
    return found


def _intervals(rates: Sequence[float]) -> list[str]:
    """What the counts of `Density.firing` are of."""
    return ["no token", *(f"{100 * low:g} - {100 * high:g} %" for low, high in pairwise(rates))]
