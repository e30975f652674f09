"""Byte-level BPE as SmolLM2 uses it, from the vocabulary in a GGUF file.

A text is cut into words by GPT-2's pattern, digits one by one; the UTF-8 bytes of a word are written as printable
characters, and pairs are merged in the order in which training found them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from examples.llm.gguf import GgufFile

# Letters are what is a word character, but neither number nor underscore.
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?(?:_|[^\s\w])+|\s+(?!\S)|\s+")
_DIGIT = re.compile(r"(\d)")


class Tokenizer:
    """Text to token numbers and back.

    Args:
        file: A GGUF file with a `gpt2` vocabulary.

    Raises:
        ValueError: If its vocabulary is of another kind.
    """

    def __init__(self, file: GgufFile) -> None:
        data = file.metadata
        if data.get("tokenizer.ggml.model") != "gpt2":
            raise ValueError(f"the vocabulary is {data.get('tokenizer.ggml.model')!r}, not byte-level BPE")
        self._tokens: list[str] = data["tokenizer.ggml.tokens"]
        self._numbers = {token: i for i, token in enumerate(self._tokens)}
        self._ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(data["tokenizer.ggml.merges"])}
        control = [t for t, kind in zip(self._tokens, data["tokenizer.ggml.token_type"], strict=True) if kind == 3]
        self._control = set(control)
        self._special = re.compile("(" + "|".join(map(re.escape, control)) + ")")
        self.end: int = data["tokenizer.ggml.eos_token_id"]
        self._characters = _printable_bytes()
        self._bytes = {c: b for b, c in enumerate(self._characters)}
        self._merged = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text; control tokens may be written out in it."""
        numbers: list[int] = []
        for part in self._special.split(text):
            if part in self._control:
                numbers.append(self._numbers[part])
                continue
            for piece in _DIGIT.split(part):
                for word in [piece] if _DIGIT.fullmatch(piece) else _WORDS.findall(piece):
                    numbers.extend(self._merged(word))
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """Text of token numbers; control tokens are written out."""
        data = bytearray()
        for number in numbers:
            token = self._tokens[number]
            data += token.encode() if token in self._control else bytes(self._bytes[c] for c in token)
        return data.decode("utf-8", errors="replace")

    def _merge(self, word: str) -> tuple[int, ...]:
        parts = [self._characters[b] for b in word.encode()]
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
            rank, at = min(zip(ranks, range(len(ranks)), strict=True))
            if rank == len(self._ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return tuple(self._numbers[p] for p in parts)


def _printable_bytes() -> list[str]:
    """The character that stands for each byte: itself where it prints, else the next one from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in prints else next(others)) for b in range(256)]
