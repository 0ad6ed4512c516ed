"""`Fit`: train factors and a head, one epoch at a time, so that a killed run can go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superlora.demo.data import Images, prepare
from superlora.demo.train import EVALUATION_BATCH, LARGEST_GRADIENT, rate_share


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Parameters
    ----------
    epochs : int
        Passes over the images.
    batch_size : int
        Images a step.
    rate, head_rate : float
        Largest learning rates of the factors and of the head.
    weight_decay : float
        Of AdamW.
    seed : int
        Of the order of the images.
    """

    epochs: int
    batch_size: int
    rate: float
    head_rate: float
    weight_decay: float = 0.0
    seed: int = 0


class Fit:
    """A training run of AdamW with warm-up and cosine, as the demo has it.

    Parameters
    ----------
    model : torch.nn.Module
        Images to features; frozen but for the factors.
    head : torch.nn.Linear
        Features to classes; trained.
    factors : iterable of torch.nn.Parameter, or mapping of float to such iterables
        Trained; may be none. Keys are learning rates, in place of the schedule's.
    images : Images
        The training images.
    resolution : int
        Their side, in pixels.
    schedule : Schedule
        How long and how fast.
    choose : callable, optional
        Called with the number of a step before it, as `superlora.search.Supernet.draw` is.

    Attributes
    ----------
    epoch : int
        How many are done.
    losses : list of float
        Of every step.

    Notes
    -----
    The order of the images and the learning rate follow from seed and epoch alone: a run that
    goes on from the state of any epoch gives the same numbers as one without a stop.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        factors: Iterable[nn.Parameter] | Mapping[float, Iterable[nn.Parameter]],
        images: Images,
        resolution: int,
        schedule: Schedule,
        choose: Callable[[int], Any] | None = None,
    ) -> None:
        self.model, self.head, self.images = model, head, images
        by_rate = dict(factors) if isinstance(factors, Mapping) else {schedule.rate: factors}
        groups = {rate: list(own) for rate, own in by_rate.items()}
        self.factors = [factor for own in groups.values() for factor in own]
        self.resolution, self.schedule, self.choose = resolution, schedule, choose
        self.epoch = 0
        self.losses: list[float] = []
        rated = [*groups.items(), (schedule.head_rate, list(head.parameters()))]
        self._optimiser = torch.optim.AdamW(
            [{"params": own, "lr": rate, "largest": rate} for rate, own in rated if own],
            weight_decay=schedule.weight_decay,
        )

    @property
    def done(self) -> bool:
        """Whether all epochs are."""
        return self.epoch >= self.schedule.epochs

    @property
    def steps_an_epoch(self) -> int:
        """How many steps an epoch has."""
        return math.ceil(len(self.images) / self.schedule.batch_size)

    def run_epoch(self, step: Callable[[], None] = lambda: None) -> float:
        """Train one epoch more.

        Parameters
        ----------
        step : callable
            Called after every step.

        Returns
        -------
        float
            The mean loss over its images.
        """
        order = numpy.random.default_rng((self.schedule.seed, self.epoch)).permutation(
            len(self.images)
        )
        batches = torch.from_numpy(order).split(self.schedule.batch_size)
        first = self.epoch * self.steps_an_epoch
        total = 0.0
        for number, index in enumerate(batches, start=first):
            self.losses.append(self._step(number, self.images[index]))
            total += self.losses[-1] * len(index)
            step()
        self.epoch += 1
        return total / len(self.images)

    def _step(self, number: int, batch: Images) -> float:
        if self.choose is not None:
            self.choose(number)
        share = rate_share(number, self.schedule.epochs * self.steps_an_epoch)
        for group in self._optimiser.param_groups:
            group["lr"] = share * group["largest"]
        pixels = prepare(batch.pixels, self.resolution)
        loss = F.cross_entropy(self.head(self.model(pixels)), batch.labels)
        self._optimiser.zero_grad()
        loss.backward()
        if self.factors:
            nn.utils.clip_grad_norm_(self.factors, LARGEST_GRADIENT)
        self._optimiser.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Return all that the next epoch depends on.

        Returns
        -------
        dict
            Tensors and numbers, for `torch.save`.
        """
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "factors": [factor.detach() for factor in self.factors],
            "head": self.head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Parameters
        ----------
        state : dict
            What `state` returned, of a run with the same arguments.
        """
        with torch.no_grad():
            for factor, value in zip(self.factors, state["factors"], strict=True):
                factor.copy_(value)
        self.head.load_state_dict(state["head"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.epoch, self.losses = state["epoch"], list(state["losses"])


def evaluator(
    model: nn.Module, head: nn.Linear, images: Images, resolution: int
) -> Callable[[], float]:
    """Return a function that measures the accuracy on images that are prepared once.

    Parameters
    ----------
    model, head : nn.Module
        Images to features, and features to classes.
    images : Images
        What to classify.
    resolution : int
        Their side, in pixels.

    Returns
    -------
    callable
        Takes nothing and returns the share classified right by the model as it is then.
    """
    batches = [prepare(part, resolution) for part in images.pixels.split(EVALUATION_BATCH)]

    @torch.no_grad()
    def accuracy() -> float:
        found: list[Tensor] = [head(model(batch)).argmax(1) for batch in batches]
        return int((torch.cat(found) == images.labels).sum()) / len(images)

    return accuracy
