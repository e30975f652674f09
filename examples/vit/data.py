"""CIFAR-10 pictures for the ViT: training pictures to calibrate, test pictures to evaluate.

`ONNXCOMP_CIFAR` names an `.npz` file with `train_images`, `test_images` (uint8, NHWC) and `test_labels`;
`ONNXCOMP_LIMIT` is the number of test pictures to take, by default all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 224
CALIBRATION = 128

_ROOT = Path(__file__).resolve().parents[2]
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def archive() -> Path:
    """The `.npz` file: `ONNXCOMP_CIFAR`, or where the project keeps it during development."""
    return Path(os.environ.get("ONNXCOMP_CIFAR") or _ROOT.parent / "shared" / "data" / "cifar10_subset.npz")


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Feeds of training pictures."""
    for image in _array("train_images")[:CALIBRATION]:
        yield {"image": preprocess(image)}


def draw(count: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of training pictures drawn at random, no picture twice."""
    images = _array("train_images")
    for index in np.random.default_rng(seed).permutation(len(images))[:count]:
        yield {"image": preprocess(images[index])}


def test_pictures(count: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of the first test pictures, or of all."""
    for image in _array("test_images")[:count]:
        yield {"image": preprocess(image)}


def labels() -> np.ndarray:
    """Classes of the test pictures, `(pictures,)`."""
    return _array("test_labels")


def evaluation() -> Iterator[dict[str, np.ndarray]]:
    """Feeds of test pictures."""
    yield from test_pictures(_limit())


def top1(run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Share of test pictures that are classified correctly."""
    hits = [
        int(np.argmax(next(iter(run(feed).values())))) == label
        for feed, label in zip(evaluation(), labels()[: _limit()], strict=True)
    ]
    return {"top1": float(np.mean(hits))}


def preprocess(image: np.ndarray) -> np.ndarray:
    """Enlarges a picture (bicubic, as floating point) and normalises it as ImageNet pictures are."""
    # Of 8-bit pixels Pillow would cut off what overshoots between the two directions.
    channels = [
        Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for c in image.astype(np.float32).transpose(2, 0, 1)
    ]
    pixels = np.stack([np.asarray(c) for c in channels], axis=-1).clip(0, 255) / 255
    return np.ascontiguousarray(((pixels - _MEAN) / _STD).transpose(2, 0, 1)[None])


def _array(name: str) -> np.ndarray:
    with np.load(archive(), allow_pickle=False) as arrays:
        return np.asarray(arrays[name])


def _limit() -> int | None:
    text = os.environ.get("ONNXCOMP_LIMIT")
    return int(text) if text else None
