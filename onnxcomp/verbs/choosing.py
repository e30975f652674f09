"""Chooses the recipe for a kind of model, and says what a recipe costs that measured badly on that kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from onnxcomp.errors import CalibrationError
from onnxcomp.kind import Kind, KindName, classify
from onnxcomp.model import all_nodes
from onnxcomp.recipe import AUTO, Recipe
from onnxcomp.rewrite import Pass
from onnxcomp.verbs.resolve import RecipeLike, as_recipe

Notice: TypeAlias = Callable[[str], None]
"""Told, before long work begins, what the reader has to know."""

_INTEGER = "its linear layers have integer kernels"
_DYNAMIC = "LSTM has integer kernels for dynamic ranges only; GRU stays in float"
_RECIPES: Mapping[KindName, tuple[str, str]] = {
    "cnn": ("int8", "int8 with a weight scale a channel takes half the time of float and keeps 19 dB SQNR"),
    "transformer-encoder": ("int8_smooth", f"{_INTEGER}, and outlier channels are scaled into the weights"),
    "decoder-lm": (
        "weight_only8",
        "static int8 of a decoder costs its language (perplexity 3.4 -> 40,335), 8-bit weights next to nothing (3.49)",
    ),
    "recurrent": ("dynamic_int8", _DYNAMIC),
    "recurrent-streaming": ("dynamic_int8", _DYNAMIC),
    "mixed": ("int8", _INTEGER),
    "other": ("int8", _INTEGER),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A recipe for a model.

    Attributes:
        recipe: The recipe.
        kind: Kind of the model.
        reason: Why this recipe; empty if the caller named it.
        warnings: What it is known to cost on this kind of model.
    """

    recipe: Recipe
    kind: Kind
    reason: str
    warnings: tuple[str, ...]

    def metadata(self) -> dict[str, str]:
        """For the report."""
        return {"kind of model": str(self.kind), **({"why this recipe": self.reason} if self.reason else {})}

    def tell(self, notice: Notice | None, *, warn: bool = False) -> None:
        """Tells the reason, if it was a choice, and the warnings where no report will hold them."""
        if notice is None:
            return
        if self.reason:
            notice(f"kind: {self.kind} -> recipe {self.recipe.name}: {self.reason}")
        for warning in self.warnings if warn else ():
            notice(f"warning: {warning}")


def choose(recipe: RecipeLike, model: ir.Model, *, data: bool) -> Choice:
    """The recipe that was asked for, or for `auto` the one for the kind of model.

    Args:
        recipe: Name, path, `Recipe`, passes, or `auto`.
        model: The model, which stays as it is.
        data: Whether there is calibration data.

    Raises:
        RecipeError: If the recipe does not exist or is not valid.
        CalibrationError: If the recipe was chosen and calibrates, and there is no data.
    """
    kind = classify(model)
    if recipe != AUTO:
        found = as_recipe(recipe)
        return Choice(recipe=found, kind=kind, reason="", warnings=tuple(_concerns(found, kind, model)))
    name, reason = _RECIPES[kind.name]
    found = as_recipe(name)
    if not data and any(type(step).observers is not Pass.observers for step in found.passes):
        raise CalibrationError(
            f"recipe {name!r}, chosen for a model of kind {kind.name}, calibrates: it needs calibration data; give "
            "some with --data, or name a recipe that needs none"
        )
    return Choice(recipe=found, kind=kind, reason=reason, warnings=tuple(_concerns(found, kind, model)))


def _concerns(recipe: Recipe, kind: Kind, model: ir.Model) -> Iterator[str]:
    """What is known to go wrong; the figures are of EfficientNet-Lite0 and SmolLM2-135M on a CPU with VNNI."""
    names = {step.name for step in recipe.passes}
    per_tensor = any(step.name == "quantize" and not getattr(step, "per_channel", True) for step in recipe.passes)
    if kind.name == "cnn" and per_tensor:
        yield "one weight scale for a whole tensor ruins a CNN: 7 dB SQNR was measured, 19 dB with per_channel = true"
    if kind.name == "decoder-lm" and "quantize" in names:
        yield (
            "static int8 of a decoder costs its language: perplexity 3.4 -> 40,335 was measured, 3.49 with the recipe "
            "weight_only8"
        )
    if kind.name == "decoder-lm" and "nm_mask" in names:
        yield (
            "N:M sparsity without training costs a small decoder its language: perplexity 20 -> 54 was measured for "
            "2:4, in the best way there is here"
        )
    if kind.name == "cnn" and "dynamic_quantize" in names:
        yield (
            "dynamic_quantize leaves convolutions in float: as ConvInteger, 8 times the time of float was measured; "
            "half of it with the recipe int8, which needs data"
        )
    if dynamic := sum(node.op_type == "ConvInteger" for node in all_nodes(model)):
        yield (
            f"{dynamic} convolutions of the model are ConvInteger, for which 8 times the time of float was measured; "
            "start from the float model"
        )
