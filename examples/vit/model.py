"""ViT-S/14 with 4 registers (DINOv2) and a CIFAR-10 head in plain PyTorch; weights from an ONNX file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

SIZE, PATCH = 224, 14
WIDTH, HEADS, DEPTH, REGISTERS, CLASSES = 384, 6, 12, 4, 10

_ROOT = Path(__file__).resolve().parents[2]


def weights() -> Path:
    """The ONNX file with the weights: `ONNXCOMP_VIT`, or where the project keeps it during development."""
    default = _ROOT.parent / "shared" / "data" / "dinov2_vits14_reg4_cifar10_224.onnx"
    return Path(os.environ.get("ONNXCOMP_VIT") or default)


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Attention out of plain operations: Split, Reshape, Transpose, MatMul and Softmax in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (t.reshape(batch, tokens, HEADS, WIDTH // HEADS) for t in self.qkv(x).chunk(3, dim=-1))
        q = q.transpose(1, 2) * (WIDTH // HEADS) ** -0.5
        scores = (q @ k.permute(0, 2, 3, 1)).softmax(dim=-1)
        return self.proj((scores @ v.transpose(1, 2)).transpose(1, 2).reshape(batch, tokens, WIDTH))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.ls1 = LayerScale()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = Mlp()
        self.ls2 = LayerScale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.reg_token = nn.Parameter(torch.zeros(1, REGISTERS, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, WIDTH))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(image.shape[0], -1, -1)
        x = torch.cat([prefix, self.patch_embed(image) + self.pos_embed], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def load(path: Path) -> Vit:
    """The network with the weights of the ONNX file.

    The TorchScript exporter kept the names of all parameters but the matrices of linear layers, which it transposed;
    their place is in the name of the MatMul that reads them.
    """
    graph = ir.load(path).graph
    state = {}
    for name, value in graph.initializers.items():
        place = re.sub(r"^h\.", "head.", name).removeprefix("v.")
        matrix = name.startswith("onnx::MatMul")
        if matrix:
            (user, _), *_ = value.uses()
            match = re.fullmatch(r"/v/blocks/blocks\.(\d+)/(\w+)/(\w+)/MatMul", user.name or "")
            if match is None:
                raise ValueError(f"{path}: the weight {name} of node {user.name!r} has no place in the network")
            place = f"blocks.{'.'.join(match.groups())}.weight"
        tensor = torch.tensor(value.const_value.numpy())
        state[place] = tensor.T.contiguous() if matrix else tensor
    network = Vit()
    network.load_state_dict(state)
    return network.eval()


def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network and an example input, for `onnxcomp export`."""
    return load(weights()), (torch.zeros(1, 3, SIZE, SIZE),)
