"""Rendered words with exact labels, made on the spot: calibration data, evaluation data and the task metric.

    onnxcomp compress model.onnx -o out --data examples.ocr.words:calibration \
        --eval-data examples.ocr.words:evaluation --metric examples.ocr.words:exact_words --input x=1x3x48x320
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from examples.assets import ocr_model

Feed: TypeAlias = dict[str, npt.NDArray[np.float32]]

HEIGHT, WIDTH = 48, 320
INPUT = "x"
_EVALUATION = 300
_CALIBRATION = 100


def calibration() -> Iterator[Feed]:
    """100 images of words that `evaluation` does not have."""
    return (_feed(image) for image, _ in samples(_CALIBRATION, seed=1, part=1))


def evaluation() -> Iterator[Feed]:
    """300 images of words that `calibration` does not have."""
    return (_feed(image) for image, _ in samples(_EVALUATION, seed=0, part=0))


def exact_words(run: Callable[[Feed], Mapping[str, npt.NDArray[Any]]]) -> dict[str, float]:
    """Share of the evaluation words that are read without any error.

    Args:
        run: Runs a feed and returns the outputs by name.
    """
    right = 0
    for image, word in samples(_EVALUATION, seed=0, part=0):
        (scores,) = run(_feed(image)).values()
        right += decode(scores[0]) == word
    return {"exact_words": right / _EVALUATION}


def samples(count: int, *, seed: int, part: int) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of words with random case, font, colours, rotation, blur and noise.

    Args:
        count: How many.
        seed: The same seed gives the same pictures.
        part: 0 draws from three quarters of the word list, 1 from the rest.
    """
    choose = random.Random(seed)
    noise = np.random.default_rng(seed)
    words = [w for i, w in enumerate(_words()) if (i % 4 == 3) == bool(part)]
    for _ in range(count):
        word = choose.choice(words)
        word = choose.choice([word, word.upper(), word.capitalize()])
        font = _font(choose.randrange(len(_fonts())), choose.randint(26, 40))
        left, top, right, bottom = (int(v) for v in font.getbbox(word))
        paper = tuple(choose.randint(150, 255) for _ in range(3))
        ink = tuple(choose.randint(0, 110) for _ in range(3))
        picture = Image.new("RGB", (right - left + 24, bottom - top + 20), paper)
        ImageDraw.Draw(picture).text((12 - left, 10 - top), word, font=font, fill=ink)
        picture = picture.rotate(choose.uniform(-3, 3), fillcolor=paper)
        picture = picture.filter(ImageFilter.GaussianBlur(choose.uniform(0, 1)))
        grain = noise.normal(0, 18, (picture.height, picture.width, 1))
        yield Image.fromarray(np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8)), word


def decode(scores: npt.NDArray[Any]) -> str:
    """Greedy CTC decoding.

    Args:
        scores: `(steps, characters)`; character 0 is the blank.
    """
    best = scores.argmax(axis=-1)
    keep = (best != 0) & (best != np.concatenate([[0], best[:-1]]))
    return "".join(_characters()[i - 1] for i in best[keep]).strip()


def _feed(image: Image.Image) -> Feed:
    """Height 48, at most 320 wide, filled up with zeros on the right; channels blue, green, red in [-1, 1]."""
    width = min(WIDTH, max(16, round(image.width * HEIGHT / image.height)))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)[..., ::-1]
    x = np.zeros((1, 3, HEIGHT, WIDTH), np.float32)
    x[0, :, :, :width] = (pixels / 127.5 - 1.0).transpose(2, 0, 1)
    return {INPUT: x}


@cache
def _characters() -> list[str]:
    metadata = onnx.load(ocr_model(), load_external_data=False).metadata_props
    return [*next(p.value for p in metadata if p.key == "character").split("\n"), " "]


@cache
def _words() -> list[str]:
    return Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()


@cache
def _fonts() -> list[str]:
    """DejaVu faces that come with matplotlib; without it one empty name, which stands for Pillow's own font."""
    try:
        import matplotlib
    except ImportError:
        return [""]
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return sorted(str(f) for f in folder.glob("DejaVu*.ttf") if "Display" not in f.name) or [""]


@cache
def _font(index: int, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    name = _fonts()[index]
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
