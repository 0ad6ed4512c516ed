"""What judges drawn digits: a classifier of real ones, and the Fréchet distance of its features."""

from __future__ import annotations

import numpy
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.flow import Course, scaled
from superlora.demo.data import Images
from superlora.demo.train import rate_share


class Judge(nn.Module):
    """A convolutional network for digits, whose last hidden layer gives the features."""

    def __init__(self, side: int = 28, classes: int = 10, features: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        # Without weights of its own: every feature of the digits has mean 0 and variance 1.
        self.features = nn.Sequential(
            nn.Linear(32 * (side // 4) ** 2, features), nn.BatchNorm1d(features, affine=False)
        )
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 1, side, side) in [-1, 1] to a number for each class."""
        out: Tensor = self.head(F.relu(self.embed(images)))
        return out

    def embed(self, images: Tensor) -> Tensor:
        """Map images to features (n, features), before the last rectifier."""
        out: Tensor = self.features(self.convolutions(images))
        return out


def train_judge(judge: Judge, digits: Images, course: Course, *, seed: int) -> None:
    """Train a judge on real digits that are turned, sized and moved a little, and freeze it."""
    generator = torch.Generator().manual_seed(seed)
    images = scaled(digits.pixels)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=course.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: rate_share(done, course.steps)
    )
    judge.train()
    for _ in range(course.steps):
        chosen = torch.randint(len(images), (course.batch_size,), generator=generator)
        batch = varied(images[chosen], generator)
        loss = F.cross_entropy(judge(batch), digits.labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    judge.requires_grad_(False).eval()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images under random affine maps that are near the identity."""
    change = 0.1 * torch.randn(len(images), 2, 3, generator=generator)
    change = change.clamp(-0.2, 0.2) + torch.eye(2, 3)
    grid = F.affine_grid(change, list(images.shape), align_corners=False)
    # The paper is -1: moved to 0 and back, since what lies outside an image is taken to be 0.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def features_of(judge: Judge, pixels: Tensor) -> numpy.ndarray:
    """Return the features of pixels of uint8, in double precision."""
    return judge.embed(scaled(pixels)).double().numpy()


@torch.no_grad()
def recognised(judge: Judge, digits: Images) -> float:
    """Return the share of the images that a judge takes for their labels."""
    found = judge(scaled(digits.pixels)).argmax(1)
    return float((found == digits.labels).float().mean())


def frechet_distance(first: numpy.ndarray, second: numpy.ndarray) -> float:
    """Return the squared Fréchet distance of the Gaussians with two samples' means and covariances.

    |m₁ - m₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), as in Heusel et al. (2017); the samples are (n, d).
    """
    gap = first.mean(0) - second.mean(0)
    covariances = [numpy.cov(own, rowvar=False).reshape(len(gap), -1) for own in (first, second)]
    # The eigenvalues of a product of covariances are real and not negative, up to rounding.
    values = scipy.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    traces = sum(float(numpy.trace(own)) for own in covariances)
    return float(gap @ gap) + traces - 2 * float(numpy.sqrt(values).sum())
