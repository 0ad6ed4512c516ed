"""Flow matching: images are moved along straight lines from noise, and sampled by Euler's method.

At time t an image is (1 - t) image + t noise, and the model learns its velocity, noise - image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from superlora.demo.data import Images
from superlora.demo.train import LARGEST_GRADIENT, rate_share

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps noisy images, times and labels to velocities; a model."""


SAMPLING_BATCH = 100  # images
MEMORY = 0.995  # of the running mean of weights, about 200 steps


def scaled(pixels: Tensor) -> Tensor:
    """Return pixels of uint8 (n, side, side) as images in [-1, 1] (n, 1, side, side)."""
    return pixels.unsqueeze(1).float() / 127.5 - 1


def loss_of(
    model: Velocity, images: Tensor, labels: Tensor, times: Tensor, noise: Tensor
) -> Tensor:
    """Return the mean squared error of the velocities."""
    share = times[:, None, None, None]
    noisy = (1 - share) * images + share * noise
    return F.mse_loss(model(noisy, times, labels), noise - images)


@dataclass(frozen=True)
class Course:
    """How long and in which batches to train."""

    steps: int
    batch_size: int
    rate: float


def train(
    model: Velocity,
    parameters: Sequence[nn.Parameter],
    digits: Images,
    course: Course,
    *,
    seed: int,
    after_step: Callable[[int, float], object] = lambda step, loss: None,
) -> list[float]:
    """Train parameters with the flow-matching loss, and return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(parameters, lr=course.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: rate_share(done, course.steps)
    )
    images = scaled(digits.pixels)
    losses: list[float] = []
    for step in range(course.steps):
        chosen = torch.randint(len(images), (course.batch_size,), generator=generator)
        # One time in each of as many equal parts of [0, 1]: uniform, with less variance.
        places = torch.rand(course.batch_size, generator=generator)
        times = (torch.arange(course.batch_size) + places) / course.batch_size
        noise = torch.randn(course.batch_size, *images.shape[1:], generator=generator)
        loss = loss_of(model, images[chosen], digits.labels[chosen], times, noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        after_step(step, losses[-1])
    return losses


@torch.no_grad()
def held_out_loss(model: Velocity, digits: Images, *, times: int, seed: int) -> float:
    """Return the loss of digits, each at so many times, with the noise of a seed."""
    generator = torch.Generator().manual_seed(seed)
    images = scaled(digits.pixels)
    total = 0.0
    for place in range(times):
        at = (place + torch.rand(len(images), generator=generator)) / times
        noise = torch.randn(images.shape, generator=generator)
        total += float(loss_of(model, images, digits.labels, at, noise))
    return total / times


@torch.no_grad()
def sample(model: Velocity, labels: Tensor, *, side: int, steps: int, seed: int) -> Tensor:
    """Return an image for each label, pixels of uint8 (n, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(labels), 1, side, side, generator=generator)
    for step in range(steps, 0, -1):
        times = torch.full((len(labels),), step / steps)
        parts = [part.split(SAMPLING_BATCH) for part in (images, times, labels)]
        velocities = [model(*own) for own in zip(*parts, strict=True)]
        images = images - torch.cat(velocities) / steps
    images = images.nan_to_num()  # of a model that diverged
    return ((images.squeeze(1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pretrain(model: nn.Module, digits: Images, course: Course, *, seed: int) -> None:
    """Train a model, and leave it with the running mean of its weights."""
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MEMORY))
    with tqdm(total=course.steps, desc="pre-training", disable=None) as bar:

        def after(step: int, loss: float) -> None:
            mean.update_parameters(model)
            bar.update()

        train(model, list(model.parameters()), digits, course, seed=seed, after_step=after)
    model.load_state_dict(mean.module.state_dict())
