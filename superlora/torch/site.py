"""`Site`: what stands in for one adapted layer's forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.design.supports import OPERATIONS
from superlora.torch import row_wise
from superlora.torch.layers import (
    bias_of,
    computes_plainly,
    input_name,
    is_transposed,
    parameter_of,
)
from superlora.torch.operations import Operations, merged_changes
from superlora.torch.sums import add_rounded_once, is_finite
from superlora.torch.support import Support, sum_output

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
    supports : tuple of Support
        Its support tensors here, in the order of the operations.
    before : tuple of (torch.Tensor or None), or None
        The bits of weight and bias before the adapter was merged into them, while it is; None
        for one that it leaves alone.
    bare : bool
        Whether the layer had no bias, and has one meanwhile.
    """

    adapter: Adapter
    name: str
    supports: tuple[Support, ...] = field(init=False)
    before: tuple[Tensor | None, Tensor | None] | None = None
    bare: bool = False

    def __post_init__(self) -> None:
        own = self.adapter.plan.layout.supports[self.name]
        found = (own[operation] for operation in OPERATIONS if operation in own)
        self.supports = tuple(self.adapter.supports[name] for name in found)


class Site:
    """What a layer's instance attribute ``forward``, a method of this, belongs to.

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
        self._input = input_name(module)
        self._transposed = is_transposed(module)
        # Whether the sum of weight and updates can be multiplied instead.
        self._plainly = computes_plainly(module)

    @classmethod
    def of(cls, module: nn.Module) -> Site | None:
        """Return the site that `module` has, if any."""
        found = getattr(module.__dict__.get("forward"), "__self__", None)
        return found if isinstance(found, Site) else None

    @classmethod
    def add(cls, module: nn.Module, name: str, adapter: Adapter) -> Site:
        """Let `adapter`, which calls it `name`, take part in the forward of `module`."""
        site = cls.of(module) or cls(module)
        site.links.append(Link(adapter, name))
        module.forward = site.forward
        return site

    def remove(self, adapter: Adapter) -> None:
        """Take `adapter` away; with the last one the layer is as it was."""
        self.links = [link for link in self.links if link.adapter is not adapter]
        self.merged = [link for link in self.merged if link.adapter is not adapter]
        if self.links:
            return
        if self._previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._previous

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the updates of its active adapters."""
        x = args[0] if args else kwargs.get(self._input)
        if x is None:
            return self._base(*args, **kwargs)  # says what is wrong, in the layer's own words
        if row_wise.OPEN:
            divided = row_wise.rows_of(self.module)
            if divided is not None:
                return divided.output(self, x, *args, **kwargs)
        supports: list[Support] = []
        plain = True
        module = self.module
        dtype = module.weight.dtype
        # In half precision the sum with the weight would round a small update away.
        wide = dtype in (torch.float32, torch.float64)
        for link in self.links:
            if link.adapter.merged or link.adapter._disabled:
                continue
            owner, leaf = link.adapter._first
            factor = owner._parameters[leaf]
            wide = wide and factor is not None and factor.dtype == dtype
            for support in link.supports:
                supports.append(support)
                plain = plain and support.plain
        if not supports:
            return self._base(*args, **kwargs)
        fused = self._plainly and len(args) + len(kwargs) == 1 and self._previous is None
        fused = fused and wide
        if plain:
            weight = self.weight if fused else None
            return sum_output(supports, x, weight, self.bias, lambda: self._base(*args, **kwargs))

        def base(moved: Tensor) -> Tensor:
            if args:
                return self._base(moved, *args[1:], **kwargs)
            return self._base(**{**kwargs, self._input: moved})

        return Operations(self, supports, x).output(fused, base)

    def update(self, link: Link, x: Tensor) -> Tensor:
        """Return one adapter's part of the layer's output."""
        return Operations(self, link.supports, x).added()

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return y

    @property
    def weight(self) -> Tensor:
        """The layer's weight, (output width, input width)."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t() if self._transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, if it has one."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    @property
    def wrapped(self) -> bool:
        """Whether another library's forward stands in for the layer's own."""
        return self._previous is not None

    @property
    def own_weight(self) -> Tensor:
        """The weight without any adapter, (output width, input width)."""
        for link in self.merged:
            if link.before is not None and link.before[0] is not None:
                return link.before[0].t() if self._transposed else link.before[0]
        return self.weight

    @property
    def own_bias(self) -> Tensor | None:
        """The bias without any adapter."""
        for link in self.merged:
            if link.bare or (link.before is not None and link.before[1] is not None):
                return None if link.before is None else link.before[1]
        return self.bias

    @classmethod
    def bias_below(cls, module: nn.Module) -> Tensor | None:
        """Return the bias of a layer without any adapter, if it has one."""
        site = cls.of(module)
        return bias_of(module) if site is None else site.own_bias

    def link_of(self, adapter: Adapter) -> Link:
        """Return the link of one of the layer's adapters."""
        return next(link for link in self.links if link.adapter is adapter)

    def below(self, adapter: Adapter) -> list[Link]:
        """Return those that were merged before an adapter, if it is merged here."""
        if not self.merged:
            return []
        link = self.link_of(adapter)
        return self.merged[: self.merged.index(link)] if link in self.merged else []

    def holders(self, key: str) -> list[str]:
        """Return the names of the adapters whose changes the weight or the bias holds."""
        index = {"weight": 0, "bias": 1}.get(key)
        return [
            link.adapter.name
            for link in self.merged
            if index is not None and link.before is not None and link.before[index] is not None
        ]

    def merge(self, adapter: Adapter) -> None:
        """Add the adapter's update to weight and bias, in place, and keep the bits they had."""
        link = self.link_of(adapter)
        self._add(link)
        changed = [parameter_of(self.module), bias_of(self.module)]
        if not all(is_finite(each) for each in changed if each is not None and each.numel()):
            self.unmerge(adapter)
            raise ValueError(f"weight + update of {link.name!r} must be finite to be merged")

    def unmerge(self, adapter: Adapter) -> None:
        """Give weight and bias the bits they had before the adapter was merged, if it is."""
        link = self.link_of(adapter)
        if link not in self.merged:
            return
        place = self.merged.index(link)
        undone, above = self.merged[place:], self.merged[place + 1 :]
        with torch.no_grad():
            # Those that were merged later may have been the first to change one of the two.
            for own, index in ((parameter_of(self.module), 0), (bias_of(self.module), 1)):
                kept = [each.before[index] for each in undone if each.before is not None]
                first = next((bits for bits in kept if bits is not None), None)
                if own is not None and first is not None:
                    own.copy_(first)
        if any(each.bare for each in undone):
            self.module.register_parameter("bias", None)
        del self.merged[place:]
        for each in undone:
            each.before, each.bare = None, False
        for other in above:
            self._add(other)

    @torch.no_grad()
    def _add(self, link: Link) -> None:
        weight, bias = parameter_of(self.module), bias_of(self.module)
        of_weight, of_bias = merged_changes(self, link.supports)
        kept = (
            None if of_weight is None else weight.detach().clone(),
            None if of_bias is None or bias is None else bias.detach().clone(),
        )
        link.before, link.bare = kept, bias is None and of_bias is not None
        self.merged.append(link)
        if of_weight is not None:
            turned = of_weight.t() if self._transposed else of_weight
            add_rounded_once(weight, turned)
        if of_bias is not None and bias is None:
            gained = nn.Parameter(of_bias.to(weight), requires_grad=False)
            self.module.register_parameter("bias", gained)
        elif of_bias is not None:
            add_rounded_once(bias[:, None], of_bias[:, None])  # type: ignore[index]
