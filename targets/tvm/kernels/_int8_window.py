"""Sizes of a convolution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Window:
    """A convolution's window over an image.

    Attributes:
        size: Height and width of the image.
        kernel: Height and width of the window.
        strides: Down and across.
        pads: Above, left, below, right.
        dilations: Down and across.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width with padding."""
        return self.size[0] + self.pads[0] + self.pads[2], self.size[1] + self.pads[1] + self.pads[3]

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of what it makes."""
        down, across = (
            (self.padded[i] - self.dilations[i] * (self.kernel[i] - 1) - 1) // self.strides[i] + 1 for i in (0, 1)
        )
        return down, across

    @property
    def pointwise(self) -> bool:
        """Whether it sees each pixel by itself."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.pads)
