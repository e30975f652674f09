"""Frames of video clips, as networks take them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from examples.efficientnet.images import preprocess

_ROOT = Path(__file__).resolve().parents[2]
FIXED = ("intel_one-by-one-person-detection.mp4", "intel_bottle-detection.mp4")
"""Clips of a camera that does not move (intel-iot-devkit/sample-videos, CC BY 4.0)."""


def clip(name: str) -> Path:
    """A clip in the folder of clips (`$ONNXCOMP_CLIPS`, else shared/data beside the project)."""
    folder = os.environ.get("ONNXCOMP_CLIPS")
    return (Path(folder) if folder else _ROOT.parent / "shared" / "data") / name


def pictures(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Image.Image]:
    """Frames of a video, in RGB."""
    with av.open(str(path)) as container:
        for frame in islice(container.decode(video=0), start, stop):
            yield frame.to_image()


def feeds(path: Path, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The central square of every frame, 224 x 224, scaled as EfficientNet-Lite0 was trained."""
    for picture in pictures(path, start, stop):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        yield {"image": preprocess(picture.crop((left, top, left + side, top + side)))}
