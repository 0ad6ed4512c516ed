"""`Site`: what stands in for one adapted layer's forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.torch.blocks import Place
from superlora.torch.layers import (
    bias_of,
    computes_plainly,
    input_name,
    is_transposed,
    parameter_of,
)
from superlora.torch.merge_operations import Base, Operations, merged_changes
from superlora.torch.rounding import add_rounded_once, is_finite
from superlora.torch.support import Support, sum_output


@dataclass(eq=False)
class Link:
    """An adapter of a layer, and what it calls the layer.

    Attributes
    ----------
    adapter : torch.nn.Module
        The adapter.
    adapter_name : str
        What errors call it.
    name : str
        The layer's dotted name in the adapter's own model.
    supports : iterable of Support
        Its support tensors here, in the order of the operations. To iterate over them raises an
        error where there are none to choose, as in a supernet without a configuration.
    first : Place
        Its first factor, whose dtype all have.
    active : bool
        Whether the layer's forward adds them: the adapter is neither merged nor disabled.
    before : tuple of (torch.Tensor or None), or None
        The bits of weight and bias before the adapter was merged into them, while it is; None
        for one that it leaves alone.
    bare : bool
        Whether the layer had no bias, and has one meanwhile.
    """

    adapter: nn.Module
    adapter_name: str
    name: str
    supports: Iterable[Support]
    first: Place
    active: bool = True
    before: tuple[Tensor | None, Tensor | None] | None = None
    bare: bool = False


@dataclass(eq=False)
class Part:
    """Rows of a batch that use one adapter, and its links by the layer's identity."""

    places: list[int]
    links: Mapping[int, Link]
    _index: dict[torch.device, Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> Tensor:
        """Return the rows as a tensor of a device, made once."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.places, device=device)
        return self._index[device]


@dataclass(eq=False)
class Rows:
    """Which adapter each row of a batch uses, in the layers of one model.

    Attributes
    ----------
    count : int
        Rows of the batch.
    parts : list of Part
        The adapters in use.
    modules : set of int
        The identities of all modules of the model.
    thread : int
        Which opened the block.
    """

    count: int
    parts: list[Part]
    modules: set[int]
    thread: int = field(default_factory=threading.get_ident)


# Of the `with rows(...)` blocks that are open, the innermost last.
OPEN: list[Rows] = []


def rows_of(module: nn.Module) -> Rows | None:
    """Return the rows of the innermost open block whose model has a layer, if any."""
    found = [rows for rows in reversed(OPEN) if id(module) in rows.modules]
    if not found:
        return None
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
        found = [rows for rows in found if rows.thread == threading.get_ident()]
    elif len({rows.thread for rows in found}) > 1:
        raise AdapterError("rows() must be open in one thread alone to be compiled or recomputed")
    return found[0] if found else None


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
    links : dict of torch.nn.Module to Link
        All adapters of the layer, in the order of attachment.
    merged : list of Link
        Those whose update the weight holds, in the order of merging.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.links: dict[nn.Module, Link] = {}
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
    def add(cls, module: nn.Module, link: Link) -> Site:
        """Let an adapter take part in the forward of `module`."""
        site = cls.of(module) or cls(module)
        site.links[link.adapter] = link
        module.forward = site.forward
        return site

    def remove(self, adapter: nn.Module) -> None:
        """Take `adapter` away; with the last one the layer is as it was."""
        self.links.pop(adapter, None)
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
        if OPEN:
            rows = rows_of(self.module)
            if rows is not None:
                return self._divided(rows, x, *args, **kwargs)
        supports: list[Support] = []
        plain = True
        dtype = self.module.weight.dtype
        # In half precision the sum with the weight would round a small update away.
        wide = dtype in (torch.float32, torch.float64)
        for link in self.links.values():
            if not link.active:
                continue
            wide = wide and link.first.owner._parameters[link.first.leaf].dtype == dtype  # type: ignore[union-attr]
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

        return Operations(self.base, supports, x).output(fused, base)

    def _divided(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus every row's own update."""
        if self.merged:
            names = dict.fromkeys(link.adapter_name for link in self.merged)
            raise AdapterError(
                f"no adapter must be merged inside rows(): {some(map(repr, names))} are in the "
                "weights of a layer"
            )
        if x.dim() < 2 or x.shape[0] != rows.count:
            raise ValueError(
                f"names must have one entry for each row of the batch, the first axis of a layer's "
                f"input: got {rows.count} names and an input of shape {tuple(x.shape)} at "
                f"{next(iter(self.links.values())).name!r}"
            )
        y = self._base(*args, **kwargs)
        indices, updates = [], []
        for part in rows.parts:
            link = part.links.get(id(self.module))
            if link is None or not link.active or link.adapter not in self.links:
                continue
            index = part.index(x.device)
            own = x if len(part.places) == rows.count else x.index_select(0, index)
            indices.append(index)
            updates.append(Operations(self.base, [*link.supports], own).added().to(y.dtype))
        if not updates:
            return y
        # At once: out of place every call copies the output.
        return y.index_add(0, torch.cat(indices), torch.cat(updates))

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
    def base(self) -> Base:
        """What the layer's weight and bias hold, and held without any adapter."""
        weight, bias, wrapped = self.weight, self.bias, self._previous is not None
        if not self.merged:
            return Base(weight, bias, weight, bias, False, wrapped)
        return Base(weight, bias, self.own_weight, self.own_bias, True, wrapped)

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

    def below(self, adapter: nn.Module) -> list[Link]:
        """Return those that were merged before an adapter, if it is merged here."""
        if not self.merged:
            return []
        link = self.links[adapter]
        return self.merged[: self.merged.index(link)] if link in self.merged else []

    def holders(self, key: str) -> list[str]:
        """Return the names of the adapters whose changes the weight or the bias holds."""
        index = {"weight": 0, "bias": 1}.get(key)
        return [
            link.adapter_name
            for link in self.merged
            if index is not None and link.before is not None and link.before[index] is not None
        ]

    def merge(self, adapter: nn.Module) -> None:
        """Add the adapter's update to weight and bias, in place, and keep the bits they had."""
        link = self.links[adapter]
        self._add(link)
        changed = [parameter_of(self.module), bias_of(self.module)]
        if not all(is_finite(each) for each in changed if each is not None and each.numel()):
            self.unmerge(adapter)
            raise ValueError(f"weight + update of {link.name!r} must be finite to be merged")

    def unmerge(self, adapter: nn.Module) -> None:
        """Give weight and bias the bits they had before the adapter was merged, if it is."""
        link = self.links[adapter]
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
        of_weight, of_bias = merged_changes(self.base, [*link.supports])
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
