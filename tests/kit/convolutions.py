"""A small network of convolutions of every kind that weights are compressed of, with batch norms behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE = 12


class Block(nn.Module):
    """x + a depthwise convolution of stride 1 and a pointwise one, as of a MobileNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norms[1](self.point(torch.relu(self.norms[0](self.depth(x))))))


class Mixed(nn.Module):
    """pixel_values [batch, 3, 12, 12] to logits [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.block = Block(32)
        self.grouped = nn.Conv2d(32, 64, 3, groups=2)
        self.along = nn.Conv1d(64, 32, 3, padding="same", padding_mode="reflect")
        self.classifier = nn.Linear(32, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.grouped(self.block(self.stem(pixel_values))))
        return self.classifier(torch.relu(self.along(x.flatten(2))).mean(2))


def mixed() -> nn.Module:
    """In eval mode, with batch norms that scale and shift."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        for _ in range(5):
            model(2 * torch.randn(8, 3, SIDE, SIDE) + 1)
    return model.eval()


def pictures(rows: int = 3, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": 2 * torch.randn(rows, 3, SIDE, SIDE, generator=generator) + 1}
