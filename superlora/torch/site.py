"""`Site`: what stands in for one adapted layer's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.torch.formed import FormedLinear
from superlora.torch.layers import computes_plainly, is_transposed, parameter_of, weight_of

if TYPE_CHECKING:
    from superlora.torch.adapter import Adapter


class Site:
    """A picklable callable that a layer holds as its instance attribute ``forward``.

    The layer's class, parameters and state-dict keys stay as they were; taking
    the attribute away gives the layer back.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    name : str
        Its dotted name in the model, the weight's name in the adapters' plans.

    Attributes
    ----------
    adapters : list of Adapter
        All adapters of the layer, in the order of attachment.
    merged : list of Adapter
        Those whose update the weight holds.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.adapters: list[Adapter] = []
        self.merged: list[Adapter] = []
        self._original: Tensor | None = None
        # Another library's wrapper, put back on removal.
        self._previous: Callable[..., Tensor] | None = module.__dict__.get("forward")

    @classmethod
    def of(cls, module: nn.Module) -> Site | None:
        """Return the site that `module` has, if any."""
        found = module.__dict__.get("forward")
        return found if isinstance(found, Site) else None

    @classmethod
    def add(cls, module: nn.Module, name: str, adapter: Adapter) -> Site:
        """Let `adapter` take part in the forward of `module`."""
        site = cls.of(module) or cls(module, name)
        site.adapters.append(adapter)
        module.forward = site
        return site

    def remove(self, adapter: Adapter) -> None:
        """Take `adapter` away; with the last one the layer is as it was."""
        self.adapters = [other for other in self.adapters if other is not adapter]
        if adapter in self.merged:
            # What it merged stays; it becomes part of the base.
            self.merged = [other for other in self.merged if other is not adapter]
            self._original = None
        if self.adapters:
            return
        if self._previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the updates of its active adapters."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        active = [adapter for adapter in self.adapters if adapter.active]
        formed = [adapter for adapter in active if not adapter.applies_factored(self.name)]
        if formed and self._can_fuse(formed):
            y = self._linear(formed, x, fused=True)
        else:
            y = self._base(*args, **kwargs)
            if formed:
                y = y + self._linear(formed, x, fused=False).to(y.dtype)
        for adapter in active:
            if adapter not in formed:
                y = y + adapter.apply_factored(self.name, x).to(y.dtype)
        return y

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return y

    def _can_fuse(self, formed: Sequence[Adapter]) -> bool:
        # One product with W₀ + ΔW replaces two, unless the sum would round a small
        # update away in half precision, or the layer's forward is not its own.
        dtype = weight_of(self.module).dtype
        return (
            self._previous is None
            and computes_plainly(self.module)
            and dtype in (torch.float32, torch.float64)
            and all(adapter.dtype == dtype for adapter in formed)
        )

    def _linear(self, adapters: Sequence[Adapter], x: Tensor, fused: bool) -> Tensor:
        blocks = [adapter.blocks(self.name, x.device) for adapter in adapters]
        form = _Form(self.name, adapters, [tuple(found) for found in blocks])
        factors = [factor for found in blocks for factor in found.values()]
        weight = weight_of(self.module) if fused else None
        bias = self.module.bias if fused else None
        y: Tensor = FormedLinear.apply(x, weight, bias, form, *factors)  # type: ignore[no-untyped-call]
        return y

    def merge(self, adapter: Adapter) -> None:
        """Add the adapter's update to the weight, in place.

        Parameters
        ----------
        adapter : Adapter
            One of `adapters`.

        Raises
        ------
        ValueError
            If the update is not finite everywhere.
        """
        if self._original is None:
            self._original = parameter_of(self.module).detach().clone()
        self._write([*self.merged, adapter])

    def unmerge(self, adapter: Adapter) -> None:
        """Take the adapter's update out again; with the last one, bit for bit."""
        if self._original is not None:
            self._write([other for other in self.merged if other is not adapter])

    @torch.no_grad()
    def _write(self, merged: list[Adapter]) -> None:
        assert self._original is not None
        weight = parameter_of(self.module)
        total = self._original
        for adapter in merged:
            delta = adapter.delta(self.name).to(weight.device)
            if not torch.isfinite(delta).all():
                raise ValueError(f"the update of {self.name!r} must be finite to be merged")
            stored = delta.t() if is_transposed(self.module) else delta
            total = total.to(torch.promote_types(total.dtype, stored.dtype)) + stored
        weight.copy_(total)
        self.merged = merged
        if not merged:
            self._original = None


class _Form:
    """Form the sum of some adapters' updates of one weight; picklable, holds no factor."""

    def __init__(
        self, name: str, adapters: Sequence[Adapter], blocks: Sequence[tuple[str, ...]]
    ) -> None:
        self.name, self.adapters, self.blocks = name, adapters, blocks

    def __call__(self, factors: Sequence[Tensor]) -> Tensor:
        rest = iter(factors)
        total: Tensor | None = None
        for adapter, names in zip(self.adapters, self.blocks, strict=True):
            found = {block: next(rest) for block in names}
            delta = adapter.form(self.name, found)
            total = delta if total is None else total + delta
        assert total is not None
        return total
