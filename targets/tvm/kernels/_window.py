"""What a window slides over: the sizes that convolution and pooling have in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window over images of shape (H, W, C); a sequence is an image of height 1.

    Attributes:
        height: Of the image.
        width: Of the image.
        channels: Of the image.
        kernel: Height and width of the window.
        strides: Down and across.
        pads: Top, left, bottom, right.
        dilations: Down and across.
    """

    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def out_height(self) -> int:
        """Height of the output."""
        reach = (self.kernel[0] - 1) * self.dilations[0] + 1
        return (self.height + self.pads[0] + self.pads[2] - reach) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Width of the output."""
        reach = (self.kernel[1] - 1) * self.dilations[1] + 1
        return (self.width + self.pads[1] + self.pads[3] - reach) // self.strides[1] + 1

    @property
    def is_point(self) -> bool:
        """Whether each output is of one input at the same place."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.pads)

    def inside(self, column: int) -> bool:
        """Whether the window of output `column` lies inside the image, left to right."""
        first = column * self.strides[1] - self.pads[1]
        return first >= 0 and first + (self.kernel[1] - 1) * self.dilations[1] < self.width


def blocks(length: int, most: int) -> tuple[int, int, int]:
    """Cuts a row into blocks of equal size, or one less: size, blocks of it, blocks of one less."""
    count = -(-length // most)
    size = -(-length // count)
    less = count * size - length
    return size, count - less, less
