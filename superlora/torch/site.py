"""`Site`: what stands in for one adapted layer's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.costs import FORMED
from superlora.torch.formed import FormedLinear, Pull, autocasts, run
from superlora.torch.layers import (
    bias_of,
    computes_plainly,
    input_name,
    is_transposed,
    parameter_of,
    weight_of,
)
from superlora.torch.row_wise import rows_of
from superlora.torch.sources import again
from superlora.torch.sums import add_rounded_once, is_finite

if TYPE_CHECKING:
    from superlora.torch.adapter import Adapter


@dataclass(eq=False)
class Link:
    """An adapter of a layer, and what it calls the layer.

    Attributes
    ----------
    adapter : Adapter
        The adapter.
    name : str
        The layer's dotted name in the adapter's own model.
    before : torch.Tensor or None
        The weight's bits before the adapter was merged into it, while it is.
    """

    adapter: Adapter
    name: str
    before: Tensor | None = None


class Site:
    """A picklable callable that a layer holds as its instance attribute ``forward``.

    The layer's class, parameters and state-dict keys stay as they were; taking
    the attribute away gives the layer back.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.

    Attributes
    ----------
    links : list of Link
        All adapters of the layer, in the order of attachment.
    merged : list of Link
        Those whose update the weight holds, in the order of merging.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.links: list[Link] = []
        self.merged: list[Link] = []
        # Another library's wrapper, put back on removal.
        self._previous: Callable[..., Tensor] | None = module.__dict__.get("forward")

    @classmethod
    def of(cls, module: nn.Module) -> Site | None:
        """Return the site that `module` has, if any."""
        found = module.__dict__.get("forward")
        return found if isinstance(found, Site) else None

    @classmethod
    def add(cls, module: nn.Module, name: str, adapter: Adapter) -> Site:
        """Let `adapter`, which calls it `name`, take part in the forward of `module`."""
        site = cls.of(module) or cls(module)
        site.links.append(Link(adapter, name))
        module.forward = site
        return site

    def remove(self, adapter: Adapter) -> None:
        """Take `adapter` away; with the last one the layer is as it was.

        What it merged stays: the adapters merged later kept the weight with it.
        """
        self.links = [link for link in self.links if link.adapter is not adapter]
        self.merged = [link for link in self.merged if link.adapter is not adapter]
        if self.links:
            return
        if self._previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the updates of its active adapters."""
        x = args[0] if args else kwargs.get(input_name(self.module))
        if x is None:
            return self._base(*args, **kwargs)  # says what is wrong, in the layer's own words
        divided = rows_of(self.module)
        if divided is not None:
            return divided.output(self, x, *args, **kwargs)
        active = [link for link in self.links if link.adapter.active]
        alone = len(args) + len(kwargs) == 1 and self._previous is None
        fused = alone and self._can_fuse(active)
        ways = [link.adapter.way(link.name, x, fused) for link in active]
        formed = [link for link, way in zip(active, ways, strict=True) if way == FORMED]
        rest = [(link, way) for link, way in zip(active, ways, strict=True) if way != FORMED]
        if formed and fused:
            y = self._linear(formed, x, fused=True)
        elif rest and fused and rest[0][1] == "low_rank" and not autocasts(x.device):
            link, way = rest.pop(0)
            y = link.adapter.update(link.name, x, way, weight_of(self.module), bias_of(self.module))
        else:
            y = self._base(*args, **kwargs)
            if formed:
                y = y + self._linear(formed, x, fused=False).to(y.dtype)
        for link, way in rest:
            y = y + link.adapter.update(link.name, x, way).to(y.dtype)
        return y

    def update(self, link: Link, x: Tensor) -> Tensor:
        """Return one adapter's part of the layer's output.

        Parameters
        ----------
        link : Link
            The adapter.
        x : torch.Tensor, (..., input width)
            Inputs.

        Returns
        -------
        torch.Tensor, (..., output width)
            ``x @ ΔWᵀ``.
        """
        way = link.adapter.way(link.name, x, fused=False)
        if way == FORMED:
            return self._linear([link], x, fused=False)
        return link.adapter.update(link.name, x, way)

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return y

    def _can_fuse(self, links: Sequence[Link]) -> bool:
        # One product with W₀ + ΔW replaces two, unless the sum would round a small
        # update away in half precision, or the layer's forward is not its own.
        dtype = weight_of(self.module).dtype
        return (
            computes_plainly(self.module)
            and dtype in (torch.float32, torch.float64)
            and all(link.adapter.dtype == dtype for link in links)
        )

    def _linear(self, links: Sequence[Link], x: Tensor, fused: bool) -> Tensor:
        blocks = [link.adapter.blocks(link.name, x.device) for link in links]
        form = _Form(links, blocks)
        factors = [factor for found in blocks for factor in found.values()]
        weight = weight_of(self.module) if fused else None
        bias = bias_of(self.module) if fused else None
        # Flat, since what a Function returns must be no view to be changed in place afterwards.
        flat = x.reshape(-1, x.shape[-1])
        y = run(FormedLinear, flat, weight, bias, form, *factors)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def link_of(self, adapter: Adapter) -> Link:
        """Return the link of one of the layer's adapters."""
        return next(link for link in self.links if link.adapter is adapter)

    def below(self, adapter: Adapter) -> list[Link]:
        """Return those that were merged before an adapter, if it is merged here."""
        if not self.merged:
            return []
        link = self.link_of(adapter)
        return self.merged[: self.merged.index(link)] if link in self.merged else []

    def merge(self, adapter: Adapter) -> None:
        """Add the adapter's update to the weight, in place, and keep the bits it had.

        Parameters
        ----------
        adapter : Adapter
            An adapter of the layer.

        Raises
        ------
        ValueError
            If the sum is not finite everywhere; the weight is as it was then.
        """
        link = self.link_of(adapter)
        self._add(link)
        if not is_finite(parameter_of(self.module)):
            self.unmerge(adapter)
            raise ValueError(f"weight + update of {link.name!r} must be finite to be merged")

    def unmerge(self, adapter: Adapter) -> None:
        """Give the weight the bits it had before the adapter was merged, if it is.

        What was merged after it is added again.
        """
        link = self.link_of(adapter)
        if link not in self.merged:
            return
        place = self.merged.index(link)
        above = self.merged[place + 1 :]
        with torch.no_grad():
            parameter_of(self.module).copy_(link.before)  # type: ignore[arg-type]
        del self.merged[place:]
        link.before = None
        for other in above:
            self._add(other)

    @torch.no_grad()
    def _add(self, link: Link) -> None:
        weight = parameter_of(self.module)
        delta = link.adapter.delta(link.name).to(weight.device)
        link.before = weight.detach().clone()
        self.merged.append(link)
        add_rounded_once(weight, delta.t() if is_transposed(self.module) else delta)


class _Form:
    """Form the sum of some adapters' updates of one weight; holds no factor."""

    def __init__(self, links: Sequence[Link], blocks: Sequence[dict[str, Tensor]]) -> None:
        self.links = links
        # As they are, but for the tensors: what kind of mapping it is says what they are.
        self.kinds = [(again(found), tuple(found)) for found in blocks]
        rows = [link.adapter.rows_at_once(link.name) for link in links]
        on_cpu = all(block.is_cpu for found in blocks for block in found.values())
        self.rows = min(rows) if on_cpu else 0

    def __call__(self, factors: Sequence[Tensor], rows: tuple[int, int] | None) -> Tensor:
        parts = zip(self.links, self._given(factors), strict=True)
        return _sum([link.adapter.form(link.name, blocks, rows) for link, blocks in parts])

    def linearized(
        self, factors: Sequence[Tensor], rows: tuple[int, int] | None, wanted: Sequence[bool]
    ) -> tuple[Tensor, Pull]:
        """Return the sum of the updates, and what takes its gradient back to the factors."""
        deltas, pulls, first = [], [], 0
        for link, blocks in zip(self.links, self._given(factors), strict=True):
            own = wanted[first : first + len(blocks)]
            delta, pull = link.adapter.form_linearized(link.name, blocks, rows, own)
            deltas.append(delta)
            pulls.append(pull)
            first += len(blocks)
        return _sum(deltas), lambda gradient: [found for pull in pulls for found in pull(gradient)]

    def _given(self, factors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        rest = iter(factors)
        return [kind((name, next(rest)) for name in names) for kind, names in self.kinds]


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    return total
