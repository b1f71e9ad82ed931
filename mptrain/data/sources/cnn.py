"""Small convolutional networks in plain torch: a residual one that classifies pictures (He et al. 2016), and one whose
descriptors find pictures again.

    SPoC   the mean over places (Babenko and Lempitsky 2015)
    GeM    sign(m) |m|^(1/p), m the mean over places of x^p, p learned (Radenović et al. 2018)

Each is brought to length 1, and both are laid end to end (Jun et al. 2019, who write GeM so).
"""

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


class Features(nn.Sequential):
    """pixel_values [batch, 3, height, width] to [batch, 4 · width, height / 4, width / 4], ≥ 0."""

    def __init__(self, width: int, blocks: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for stage in range(3):
            for block in range(blocks):
                before = width if stage == 0 else width * 2 ** (stage - (block == 0))
                layers.append(Residual(before, width * 2**stage, 2 if stage and block == 0 else 1))
        super().__init__(*layers)


class Spoc(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Gem(nn.Module):
    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.clamp(min=1e-4).pow(self.power).mean((2, 3))
        return mean.sign() * mean.abs().pow(1 / self.power)


class Unit(nn.Module):
    """Rows of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).add(1e-12).sqrt()


class Descriptors(nn.Module):
    """pixel_values [batch, 3, height, width] to an embedding [batch, size] of length 1."""

    def __init__(self, width: int, blocks: int, size: int, power: float) -> None:
        super().__init__()
        self.features = Features(width, blocks)
        self.spoc, self.gem = Spoc(), Gem(power)
        self.spoc_to, self.gem_to = (nn.Linear(4 * width, size // 2) for _ in range(2))
        self.spoc_unit, self.gem_unit, self.unit = Unit(), Unit(), Unit()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.features(pixel_values)
        spoc, gem = self.spoc_unit(self.spoc_to(self.spoc(x))), self.gem_unit(self.gem_to(self.gem(x)))
        return self.unit(torch.cat([spoc, gem], dim=-1))


class ResNet(nn.Module):
    """pixel_values [batch, 3, height, width] to logits [batch, num_labels]."""

    def __init__(self, num_labels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.features = Features(width, blocks)
        self.classifier = nn.Linear(4 * width, num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.features(pixel_values).mean((2, 3)))


def resnet(num_labels: int, width: int = 16, blocks: int = 1) -> nn.Module:
    """Three stages of `blocks` residual blocks, of width, 2 · width and 4 · width channels."""
    return ResNet(num_labels, width, blocks)


def descriptors(width: int = 16, blocks: int = 1, size: int = 64, power: float = 3.0) -> nn.Module:
    """SPoC and GeM of three stages of residual blocks; power: of GeM, at first."""
    return Descriptors(width, blocks, size, power)
