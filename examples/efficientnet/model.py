"""EfficientNet-Lite0 in plain PyTorch, with the published ImageNet weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.assets import efficientnet_lite0_weights

SIZE = 224

# Repeats, kernel, stride of the first, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
_EPSILON = 1e-3


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's `SAME` padding for an even input: with stride 2, one more right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        total = kernel - stride
        before = total // 2
        symmetric = total == 2 * before
        super().__init__(inputs, outputs, kernel, stride, padding=before if symmetric else 0, groups=groups, bias=False)
        self._pads = None if symmetric else (before, total - before, before, total - before)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self._pads is None else functional.pad(x, self._pads))


class ConvNorm(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = SameConv(inputs, outputs, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(outputs, eps=_EPSILON)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return functional.relu6(y) if self.act else y


class MBConv(nn.Module):
    """Inverted bottleneck without squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNorm(inputs, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs, 1, act=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _STEM, 3, stride=2)
        blocks, channels = [], _STEM
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(MBConv(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(channels, _HEAD, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_HEAD, _CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(image)))).flatten(1))


_PLACES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier",
}
_PLACES_IN_BLOCK = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the weights of the published checkpoint the names they have here."""
    renamed = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            block, place, kind = match.groups()
            renamed[f"blocks.{block}.{_PLACES_IN_BLOCK[place]}.{kind}"] = tensor
        else:
            place, kind = name.split(".")
            renamed[f"{_PLACES[place]}.{kind}"] = tensor
    return renamed


def load(path: Path) -> EfficientNetLite0:
    """The network with the weights of a checkpoint file."""
    network = EfficientNetLite0()
    network.load_state_dict(rename(torch.load(path, map_location="cpu", weights_only=True)))
    return network.eval()


def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network and an example input, for `onnxcomp export`."""
    return load(efficientnet_lite0_weights()), (torch.zeros(1, 3, SIZE, SIZE),)
