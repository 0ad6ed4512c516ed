"""`Site`: what stands in for one adapted layer's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.torch.formed import FormedLinear
from superlora.torch.layers import (
    computes_plainly,
    input_name,
    is_transposed,
    parameter_of,
    weight_of,
)

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
        active = [link for link in self.links if link.adapter.active]
        formed = [link for link in active if not link.adapter.applies_factored(link.name)]
        if formed and len(args) + len(kwargs) == 1 and self._can_fuse(formed):
            y = self._linear(formed, x, fused=True)
        else:
            y = self._base(*args, **kwargs)
            if formed:
                y = y + self._linear(formed, x, fused=False).to(y.dtype)
        for link in active:
            if link not in formed:
                y = y + link.adapter.apply_factored(link.name, x).to(y.dtype)
        return y

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return y

    def _can_fuse(self, formed: Sequence[Link]) -> bool:
        # One product with W₀ + ΔW replaces two, unless the sum would round a small
        # update away in half precision, or the layer's forward is not its own.
        dtype = weight_of(self.module).dtype
        return (
            self._previous is None
            and computes_plainly(self.module)
            and dtype in (torch.float32, torch.float64)
            and all(link.adapter.dtype == dtype for link in formed)
        )

    def _linear(self, links: Sequence[Link], x: Tensor, fused: bool) -> Tensor:
        blocks = [link.adapter.blocks(link.name, x.device) for link in links]
        form = _Form(links, [tuple(found) for found in blocks])
        factors = [factor for found in blocks for factor in found.values()]
        weight = weight_of(self.module) if fused else None
        bias = self.module.bias if fused else None
        y: Tensor = FormedLinear.apply(x, weight, bias, form, *factors)  # type: ignore[no-untyped-call]
        return y

    def link_of(self, adapter: Adapter) -> Link:
        """Return the link of one of the layer's adapters."""
        return next(link for link in self.links if link.adapter is adapter)

    def below(self, adapter: Adapter) -> list[Link]:
        """Return those that were merged before an adapter, if it is merged here."""
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
        total = self._sum(link)
        if not torch.isfinite(total).all():
            raise ValueError(f"weight + update of {link.name!r} must be finite to be merged")
        self._put(link, total)

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
            self._put(other, self._sum(other))

    @torch.no_grad()
    def _sum(self, link: Link) -> Tensor:
        weight = parameter_of(self.module)
        delta = link.adapter.delta(link.name).to(weight.device)
        stored = delta.t() if is_transposed(self.module) else delta
        return (weight.to(torch.promote_types(weight.dtype, stored.dtype)) + stored).to(
            weight.dtype
        )

    @torch.no_grad()
    def _put(self, link: Link, total: Tensor) -> None:
        weight = parameter_of(self.module)
        link.before = weight.detach().clone()
        self.merged.append(link)
        weight.copy_(total)


class _Form:
    """Form the sum of some adapters' updates of one weight; holds no factor."""

    def __init__(self, links: Sequence[Link], blocks: Sequence[tuple[str, ...]]) -> None:
        self.links, self.blocks = links, blocks

    def __call__(self, factors: Sequence[Tensor]) -> Tensor:
        rest = iter(factors)
        total: Tensor | None = None
        for link, names in zip(self.links, self.blocks, strict=True):
            delta = link.adapter.form(link.name, {block: next(rest) for block in names})
            total = delta if total is None else total + delta
        assert total is not None
        return total
