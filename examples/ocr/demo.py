"""Quantizes a real text recogniser to int8 and shows what that cost and what it gained on this machine.

python -m examples.ocr.demo [output folder]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from examples.assets import ocr_model
from examples.ocr.words import HEIGHT, WIDTH, calibration, evaluation, exact_words
from onnxcomp import api


def steps() -> Callable[[str, int, int | None], None]:
    """Says on stderr what is being done, a line a step."""
    last = ""

    def say(step: str, done: int, total: int | None) -> None:
        nonlocal last
        if step != last:
            print(f"  {step} ...", file=sys.stderr, flush=True)
        last = step

    return say


def main() -> None:
    """Runs the demo."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")
    model = ocr_model()
    print("PP-OCRv4 text recogniser, PaddlePaddle export, to int8 for ONNX Runtime on this CPU.")
    print("Calibrated on 100 rendered words, judged on 300 others, timed against the original in one process.\n")
    report = api.compress(
        model,
        out,
        recipe="int8",
        data=calibration,
        eval_data=evaluation,
        metric=exact_words,
        eval_samples=None,
        shapes={"x": (1, 3, HEIGHT, WIDTH)},
        seconds=20.0,
        progress=steps(),
    )
    print(report.summary())
    print(f"\nreport: {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
