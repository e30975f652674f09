"""Gates: limits on what a comparison finds; where one does not hold, the exit code is 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import typer

from onnxcomp.cli_options import MaxDrop, MinSqnr
from onnxcomp.errors import RecipeError

if TYPE_CHECKING:
    from onnxcomp.compare import Fidelity


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What has to hold for exit code 0, as a group of options."""

    max_drop: MaxDrop = None
    min_sqnr: MinSqnr = None

    def given(self) -> bool:
        """Whether there is a limit at all."""
        return self.max_drop is not None or self.min_sqnr is not None

    def hold(self, fidelity: Fidelity) -> None:
        """Ends the command with exit code 3 if a limit does not hold.

        Raises:
            RecipeError: If there is a limit on the drop and none could be told.
        """
        if self.max_drop is not None:
            drop = fidelity.drop()
            if drop is None:
                raise RecipeError("--max-drop needs --metric, or an output with class scores; use --min-sqnr instead")
            if fidelity.non_finite:
                fail(f"NaN or infinity in outputs where the original has none: {', '.join(fidelity.non_finite)}")
            if drop > self.max_drop:
                what = "the metric" if fidelity.metric else "top-1 agreement"
                fail(f"{what} fell by {drop:.4f}, more than --max-drop {self.max_drop}")
        if self.min_sqnr is not None and fidelity.worst_sqnr < self.min_sqnr:
            fail(f"SQNR is {fidelity.worst_sqnr:.1f} dB, below --min-sqnr {self.min_sqnr}")


def fail(reason: str) -> NoReturn:
    """Ends the command with exit code 3."""
    typer.echo(f"gate failed: {reason}", err=True)
    raise typer.Exit(3)
