"""Small convolutional networks in plain torch: a residual one that classifies pictures (He et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """relu(x' + conv(relu(conv(x)))), x' a 1 x 1 convolution of x where sizes differ."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))
        self.second = nn.Sequential(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))
        self.short: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.second(torch.relu(self.first(x))))


class ResNet(nn.Module):
    """pixel_values [batch, 3, height, width] to logits [batch, num_labels]."""

    def __init__(self, num_labels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        layers: list[nn.Module] = []
        for stage in range(3):
            for block in range(blocks):
                before = width if stage == 0 else width * 2 ** (stage - (block == 0))
                layers.append(Residual(before, width * 2**stage, 2 if stage and block == 0 else 1))
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(4 * width, num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.layers(torch.relu(self.stem(pixel_values))).mean((2, 3)))


def resnet(num_labels: int, width: int = 16, blocks: int = 1) -> nn.Module:
    """Three stages of `blocks` residual blocks, of width, 2 · width and 4 · width channels."""
    return ResNet(num_labels, width, blocks)
