"""A small U-Net with attention, conditioned on a time and a label."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = ("conv1", "conv2", "down", "up", "query", "key", "value", "proj")
"""Names of the layers that are adapted: all convolutions of the blocks, and all of attention."""


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the condition scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(condition, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(condition)[..., None, None].chunk(2, dim=1)
        hidden = self.norm2(hidden) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(F.silu(hidden))
        return out


class Attention(nn.Module):
    """Self-attention over the places of an image, beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = x + self.proj(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class UNet(nn.Module):
    """Maps noisy images (n, 1, side, side), times in [0, 1] and labels to velocities.

    Its two levels have a half and a quarter of the side; attention is at the lower one.
    """

    def __init__(
        self,
        side: int = 28,
        labels: int = 5,
        widths: tuple[int, int] = (32, 96),
        heads: int = 4,
        condition: int = 128,
    ) -> None:
        super().__init__()
        self.side = side
        upper, lower = widths
        self.time = nn.Sequential(
            nn.Linear(64, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        self.label = nn.Embedding(labels, condition)
        self.first = nn.Conv2d(4, upper, 3, padding=1)
        self.upper1 = ResBlock(upper, upper, condition)
        self.down = nn.Conv2d(upper, lower, 3, stride=2, padding=1)
        self.lower1 = ResBlock(lower, lower, condition)
        self.attention1 = Attention(lower, heads)
        self.lower2 = ResBlock(lower, lower, condition)
        self.attention2 = Attention(lower, heads)
        self.up = nn.Conv2d(lower, 4 * upper, 1)
        self.upper2 = ResBlock(2 * upper, upper, condition)
        self.norm = nn.GroupNorm(8, upper)
        self.last = nn.Conv2d(upper, 4, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        condition = F.silu(self.time(waves(times)) + self.label(labels))
        first = self.upper1(self.first(F.pixel_unshuffle(images, 2)), condition)
        lower = self.attention1(self.lower1(self.down(first), condition))
        lower = self.attention2(self.lower2(lower, condition))
        joined = torch.cat([F.pixel_shuffle(self.up(lower), 2), first], dim=1)
        hidden = self.norm(self.upper2(joined, condition))
        return F.pixel_shuffle(self.last(F.silu(hidden)), 2)


def waves(times: Tensor) -> Tensor:
    """Return cosines and sines of times (n,) at 32 frequencies, (n, 64)."""
    frequencies = torch.exp(-math.log(1000) * torch.arange(32, device=times.device) / 31)
    angles = 1000 * times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
