"""`Site`: one adapted weight, and what stands in for its layer's forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from superlora.design.supports import ADD
from superlora.errors import AdapterError, some
from superlora.torch.autograd import without_autocast
from superlora.torch.layers import Weight, computes_plainly, input_name, is_input_first
from superlora.torch.link import OPEN, Link, Rows, rows_of
from superlora.torch.low_rank import (
    applies,
    low_rank,
    low_rank_output,
    pays,
    stack_rank,
    stacked_factors,
)
from superlora.torch.low_rank import (
    factors as low_rank_factors,
)
from superlora.torch.merge_operations import Base, Operations, changed_by
from superlora.torch.placed import FAST, INSIDE, Remake, Sums, call_inside, call_with, is_noted
from superlora.torch.rounding import add_rounded_once, is_finite
from superlora.torch.segments import Segments, low_rank_supports, stacked
from superlora.torch.sharded import agreed, is_distributed, local, replicated, spread, whole
from superlora.torch.support import Support, sum_output


class Site:
    """One adapted weight.

    A layer's instance attribute ``forward`` is a method of this, or of a `Reader` where the
    weight is put in place around the call of a module that reads it. The layer's class,
    parameters and state-dict keys stay as they were; taking the attribute away gives the layer
    back.

    Parameters
    ----------
    weight : Weight
        The weight.
    merged : list of Link, optional
        Of the site of the same parameter in another module, of which this one is a twin.

    Attributes
    ----------
    held : Weight
        As given.
    module : torch.nn.Module
        That has the weight.
    links : dict of torch.nn.Module to Link
        All adapters of the weight, in the order of attachment.
    merged : list of Link
        Those whose update the weight holds, in the order of attachment.
    readers : list of Reader
        What stands in for modules that read the weight themselves.
    reached : bool or None
        Whether the layer's forward or that of a reader ran, once the module that has the layer
        did; None while neither ran.
    missed : bool
        Whether the first pass of a model read the weight outside of these.
    seen : bool
        Whether there was such a pass.
    """

    def __init__(self, weight: Weight, merged: list[Link] | None = None) -> None:
        self.held, self.module, self.form = weight, weight.module, weight.form()
        self._shape = weight.parameter.shape
        self._bound: Callable[..., Any] | None = None  # what the layer has as its forward
        self.links: dict[nn.Module, Link] = {}
        self.merged: list[Link] = [] if merged is None else merged
        self.readers: list[Reader] = []
        self.reached: bool | None = None
        self.missed = False
        self.seen = False
        # Another library's wrapper, put back on removal.
        self._previous: Callable[..., Any] | None = self.module.__dict__.get("forward")
        self._input = input_name(self.module)
        self._turned = weight.kind == "Conv1D"
        # Whether the sum of weight and updates can be multiplied instead.
        self._plainly = weight.linear and computes_plainly(self.module) and not weight.complex
        # Else a forward of the class's own, or one put in its place, may use any function of the
        # weight; hooks of accelerate move it, and call the layer's own.
        wrapped = self._previous is not None
        moved = wrapped and hasattr(self.module, "_hf_hook")
        self._plainly = self._plainly and (moved or not wrapped)
        self._adds = self._plainly or (weight.linear and not weight.summable)
        self._applies = not (self._adds or wrapped or weight.complex) and applies(self.module)

    @classmethod
    def all_of(cls, module: nn.Module) -> list[Site]:
        """Return the sites of a module's own parameters."""
        found: list[Site] = []
        for holder in holders_of(module):
            own = [holder] if isinstance(holder, Site) else holder.sites
            found += [site for site in own if site.module is module and site not in found]
        return found

    @classmethod
    def of(cls, module: nn.Module, key: str = "weight") -> Site | None:
        """Return the site of one of a module's parameters, if it has any."""
        return next((site for site in cls.all_of(module) if site.held.key == key), None)

    @classmethod
    def add(
        cls,
        weight: Weight,
        link: Link,
        readers: Sequence[nn.Module] = (),
        twin: Site | None = None,
    ) -> Site:
        """Let an adapter take part in the forward of a layer, and of modules that read it."""
        site = cls.of(weight.module, weight.key)
        if site is None:
            site = cls(weight, None if twin is None else twin.merged)
            if weight.kind != "parameter":
                weight.module.forward = site._bound = site.forward
        site.links[link.adapter] = link
        for module in readers:
            Reader.add(module, site)
        return site

    def remove(self, adapter: nn.Module) -> None:
        """Take `adapter` away; with the last one the layer is as it was."""
        self.links.pop(adapter, None)
        self.merged[:] = [link for link in self.merged if link.adapter is not adapter]
        if self.links:
            return
        for reader in [*self.readers]:
            reader.remove(self)
        if self.held.kind != "parameter":
            _unwrap(self.module, self)

    @property
    def stands(self) -> bool:
        """Whether no other forward stands in for those that the updates are a part of."""
        own: list[Site | Reader] = [*self.readers]
        if self.held.kind != "parameter":
            own.append(self)
        return all(each in holders_of(each.module) for each in own)

    @property
    def is_intact(self) -> bool:
        """Whether nothing was done to the layer, at a glance."""
        weight = self.module._parameters.get(self.held.key)
        if weight is None or weight.shape != self._shape or self._bound is None:
            return False
        return self.module.__dict__.get("forward") is self._bound

    def changed_since(self) -> str:
        """Return what was done to the layer since the adapter was attached, if anything."""
        module, key = self.module, self.held.key
        weight = module._parameters.get(key) if self.held.summable else self.held.parameter
        if weight is None:
            return f"its {key} is computed now, as where it is pruned or parametrized"
        if self.held.summable and not (weight.is_floating_point() or weight.is_complex()):
            return f"its {key} is of {weight.dtype} now"
        if weight.shape != self._shape:
            return f"its {key} has shape {tuple(weight.shape)} now, {tuple(self._shape)} before"
        held = [*self.readers] if self.held.kind == "parameter" else [self]
        if any(is_lost(each.module, each) for each in held):
            return "its forward was put back, as where another library removes a hook of its own"
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output plus the updates of its active adapters."""
        if not torch.compiler.is_compiling():
            self.reached = True
        if INSIDE and not is_noted([self]):
            return call_inside([self], self.forward, args, kwargs)
        if self.held.key in self.module.__dict__:  # a reader has put the sum in place
            return self._base(*args, **kwargs)
        x = args[0] if args else kwargs.get(self._input)
        special = type(x) is not Tensor or x.is_nested
        if special and (is_distributed(x) or getattr(x, "is_nested", False)):
            return self._unlike(x, *args, **kwargs)
        if OPEN:
            rows = rows_of(self.module)
            if rows is not None:
                return self._divided(rows, x, *args, **kwargs)
        if not self._adds:
            return self._nonlinear(x, *args, **kwargs)
        if x is None:
            return self._base(*args, **kwargs)  # says what is wrong, in the layer's own words
        supports: list[Support] = []
        dropping: list[Link] = []
        plain = True
        fused = self._plainly and len(args) + len(kwargs) == 1 and self._previous is None
        if fused:
            weight = self.weight
            # In half precision the sum with the weight would round a small update away; a product
            # of inputs that are not contiguous has other bits once they are flat.
            fused = weight.dtype in (torch.float32, torch.float64)
            fused = fused and (x.dim() == 2 or x.is_contiguous())
        for link in self.links.values():
            if not link.active:
                continue
            if link.dropout.on and link.adapter.training:
                dropping.append(link)
                continue
            if fused:
                first = link.first.owner._parameters[link.first.leaf]
                fused = first.dtype == weight.dtype  # type: ignore[union-attr]
            for support in link.supports:
                supports.append(support)
                plain = plain and support.plain
        if dropping:
            return self._dropped(dropping, supports, x, *args, **kwargs)
        if not supports:
            return self._base(*args, **kwargs)
        if plain:
            own: Any = (weight, self.module.bias) if fused else (None, None)
            return sum_output(supports, x, own[0], own[1], lambda: self._base(*args, **kwargs))

        def base(moved: Tensor) -> Any:
            own, named = self._with_input(moved, *args, **kwargs)
            return self._base(*own, **named)

        return Operations(self.base, supports, x).output(fused, base)

    def _nonlinear(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a layer whose outputs an update cannot just be added to."""
        active = [link for link in self.links.values() if link.active]
        dropping = [link for link in active if link.dropout.on and link.adapter.training]
        if dropping:
            rest = [own for link in active if link not in dropping for own in link.supports]
            return self._dropped(dropping, rest, x, *args, **kwargs)
        supports = self.active_supports()
        if not supports:
            return self._base(*args, **kwargs)
        if len(args) + len(kwargs) == 1 and self._is_low_rank(supports, x):
            y = self._base(*args, **kwargs)
            for own in supports:
                y = low_rank_output(self.module, x, own, y)
            return y
        return call_with([self], self._base, args, kwargs)

    def _unlike(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output for inputs that processes share, or of rows of unequal lengths."""
        supports = self.active_supports()
        if not supports:
            return self._base(*args, **kwargs)
        if OPEN and rows_of(self.module) is not None:
            raise AdapterError(
                f"rows() must have plain tensors as inputs: got a {type(x).__name__}"
            )
        linear = self.held.linear
        if x.is_nested and linear and x.layout is torch.jagged and not x.lengths():
            args, kwargs = self._with_input(x.values(), *args, **kwargs)
            y = self.forward(*args, **kwargs)
            return torch.nested.nested_tensor_from_jagged(y, x.offsets())
        active = [link for link in self.links.values() if link.active]
        if any(link.dropout.on and link.adapter.training for link in active):
            raise AdapterError(
                f"dropout must have plain tensors as inputs: got a {type(x).__name__} at "
                f"{supports[0].name!r}"
            )
        if not self.held.summable:
            raise AdapterError(
                f"a quantised layer must have plain tensors as inputs to be adapted: got a "
                f"{type(x).__name__} at {supports[0].name!r}"
            )
        if x.is_nested or not (linear and all(own.plain and rank_of(own) for own in supports)):
            return call_with([self], self._base, args, kwargs)
        y = self._base(*args, **kwargs)
        for own in supports:
            # What the sharding of inputs and weight makes of it is torch's, gradients too.
            left, right = (replicated(each, x) for each in low_rank_factors(own))
            thin = nn.functional.linear(x.to(right.dtype), right)
            y = y + nn.functional.linear(thin, left).to(y.dtype)
        return y

    def _with_input(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return arguments of the layer with another input."""
        return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, self._input: x})

    def _is_low_rank(self, supports: Sequence[Support], x: Tensor) -> bool:
        """Return whether updates are products of two matrices and best applied unformed."""
        if not self._applies:
            return False
        rank = 0
        for own in supports:
            if own.rows is not None and isinstance(self.module, nn.Embedding):
                continue  # which are formed alone
            found = own.plain and own.blocks.scope.applied != "formed" and rank_of(own)
            if not found:
                return False
            rank += found
        forced = all(own.blocks.scope.applied == "factored" for own in supports)
        return forced or pays(self.module, x, self.form.size, rank)

    def active_supports(self) -> list[Support]:
        """Return what the adapters in force add."""
        return [own for link in self.links.values() if link.active for own in link.supports]

    def sums(self) -> tuple[Sums, Remake | None]:
        """Return weight and bias with the active updates, and what can make them again."""
        if self.held.key in self.module.__dict__:  # in place already
            return {}, dict
        supports = self.active_supports()
        if not supports:
            return {}, dict
        if OPEN and rows_of(self.module) is not None:
            self._refuse_rows()
        # The weight may lie elsewhere by the backward pass, or be one that processes share.
        if "_hf_hook" in self.module.__dict__ or is_distributed(self.held.parameter):
            return self._sums(supports), None
        versions = [] if torch.compiler.is_compiling() else self._versions(supports)

        def remake() -> Sums:
            if self._versions(supports) != versions:
                raise RuntimeError(
                    "factors, weights and scales must not be changed between a forward pass and "
                    "its backward pass"
                )
            return self._sums(supports)

        return self._sums(supports), remake

    def _sums(self, supports: Sequence[Support]) -> Sums:
        stored, bias = self.held.parameter, self.held.bias
        if is_distributed(stored):
            self._refuse_operations(supports)
        elif stored.dim() == 3 and all(self._is_stacked(own, stored) for own in supports):
            return {self.held.key: self._stacked_sum(supports)}
        device = stored.device
        with without_autocast(device):
            of_weight, of_bias = changed_by(self.base, supports, lambda own: own.form(device))
        found = {}
        if of_weight is not None:
            update = replicated(self.form.stored(of_weight), stored)
            found[self.held.key] = (stored + update).to(stored.dtype)
        if of_bias is not None:
            found["bias"] = of_bias.to(stored) if bias is None else (bias + of_bias).to(bias.dtype)
        return found

    def _is_stacked(self, own: Support, stored: Tensor) -> bool:
        """Return whether an update is a product of two factors for each matrix of a stack."""
        alike = own.blocks.dtype == stored.dtype and self.held.kind == "parameter"
        return alike and own.plain and bool(stack_rank(own.blocks.plan.layout, own.name))

    def _stacked_sum(self, supports: Sequence[Support]) -> Tensor:
        """Return a stack of matrices with such updates, each added in the product's own pass."""
        total = self.held.parameter
        turned = is_input_first(self.module)
        with without_autocast(total.device):
            for own in supports:
                left, right = (each.to(total.device) for each in stacked_factors(own))
                pair = (right.mT, left.mT) if turned else (left, right)
                total = torch.baddbmm(total, *pair)
        return total

    def _versions(self, supports: Sequence[Support]) -> list[float]:
        """Return numbers that differ once what the sums are made of is changed in place."""
        tensors = [self.held.parameter]
        scales = []
        for own in supports:
            blocks = own.blocks
            tensors += [blocks[name] for name in blocks.plan.layout.inputs_of(own.name)]
            scales.append(own.scale.value)
        return [*scales, *(-1 if each.is_inference() else each._version for each in tensors)]

    def _refuse_operations(self, supports: Sequence[Support]) -> None:
        """Refuse what is more than an update of a weight that processes share."""
        more = sorted({own.operation for own in supports} - {ADD})
        if more:
            raise AdapterError(
                f"a tensor parallel layer must have no other operation than {ADD!r}: got {more} "
                f"for {next(iter(self.links.values())).name!r}; they would need its whole weight"
            )

    def _refuse_rows(self) -> None:
        name = next(iter(self.links.values())).name
        raise AdapterError(
            f"rows() and dropout must have layers that can add an update to their outputs: "
            f"{name!r}, a {type(self.module).__name__}, is computed with the sum of weight and "
            "update"
        )

    def _divided(self, rows: Rows, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output plus every row's own update."""
        if self.merged:
            names = dict.fromkeys(link.adapter_name for link in self.merged)
            raise AdapterError(
                f"no adapter must be merged inside rows(): {some(map(repr, names))} are in the "
                "weights of a layer"
            )
        least = 1 if isinstance(self.module, nn.Embedding) else 2
        if x is None or x.dim() < least or x.shape[0] != rows.count:
            shape = None if x is None else tuple(x.shape)
            raise ValueError(
                f"names must have one entry for each row of the batch, the first axis of a layer's "
                f"input: got {rows.count} names and an input of shape {shape} at "
                f"{next(iter(self.links.values())).name!r}"
            )
        y = self._base(*args, **kwargs)
        indices, updates, alone = [], [], []
        stacks: dict[torch.dtype, dict[int, list[Support]]] = {}
        for place, part in enumerate(rows.parts):
            link = part.links.get(id(self.module))
            if link is None or not link.active or link.adapter not in self.links:
                continue
            supports = low_rank_supports(link) if self._adds else []
            if supports:
                stacks.setdefault(supports[0].blocks.dtype, {})[place] = supports
            else:
                alone.append(place)
        for stack in stacks.values():
            if len(stack) == 1:
                alone += stack
                continue
            segments, found = self._stacked(rows, stack, x)
            if len(segments.rows) == rows.count:
                y = y + found.to(y.dtype)
            else:
                indices.append(segments.rows)
                updates.append(found.to(y.dtype))
        for part in [rows.parts[place] for place in alone]:
            index = part.index(x.device)
            own = x if len(part.places) == rows.count else x.index_select(0, index)
            indices.append(index)
            updates.append(self._of_link(part.links[id(self.module)], own).to(y.dtype))
        if not updates:
            return y
        # At once: out of place every call copies the output.
        return y.index_add(0, torch.cat(indices), torch.cat(updates))

    def _stacked(
        self, rows: Rows, stack: dict[int, list[Support]], x: Tensor
    ) -> tuple[Segments, Tensor]:
        """Return rows, and what adapters add to them whose updates are products of two matrices."""
        places = tuple(stack)
        if (places, x.device) not in rows.kept:
            own = [rows.parts[place] for place in places]
            rows.kept[places, x.device] = Segments.of(own, x.device)
        segments = rows.kept[places, x.device]
        if torch.is_grad_enabled():
            return segments, segments.update(x, *stacked([*stack.values()], x.device))
        # Without gradients factors are stacked once a block, unless they or their scales change.
        key = (self, places, x.device)
        versions = self._versions([own for each in stack.values() for own in each])
        if key not in rows.kept or rows.kept[key][0] != versions:
            rows.kept[key] = (versions, *stacked([*stack.values()], x.device))
        return segments, segments.update(x, *rows.kept[key][1:])

    def _of_link(self, link: Link, x: Tensor) -> Tensor:
        """Return what one adapter adds to the output, of which training may leave out a part."""
        added = functools.partial(self._added, [*link.supports])
        if not (link.dropout.on and link.adapter.training):
            return added(x)
        flat = self.held.linear or self.held.kind == "embedding"
        axis = -1 if flat else 1 - self.held.parameter.dim()  # of outputs
        return link.dropout.update(x, added, axis)

    def _dropped(
        self, dropping: Sequence[Link], rest: list[Support], x: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the output where some adapters leave out a part of their updates."""
        y = self._base(*args, **kwargs)
        if rest:
            y = y + self._added(rest, x).to(y.dtype)
        for link in dropping:
            y = y + self._of_link(link, x).to(y.dtype)
        return y

    def _added(self, supports: list[Support], x: Tensor) -> Tensor:
        """Return what updates add to the layer's own output."""
        # Of another library's forward it is known alone that it stands in for a linear layer.
        if self._adds or (self.wrapped and self.held.linear):
            return Operations(self.base, supports, x).added()
        if not self._applies or not all(own.plain and rank_of(own) for own in supports):
            self._refuse_rows()
        found = [low_rank_output(self.module, x, own) for own in supports]
        return functools.reduce(torch.add, found)

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix, (output width, input width)."""
        if self._plainly:
            weight: Tensor = self.module.weight  # type: ignore[assignment]
            return weight.t() if self._turned else weight
        return self.form.matrix(self.held.parameter)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, if it has one."""
        return self.held.bias

    @property
    def base(self) -> Base:
        """What the layer's weight and bias hold, and held without any adapter."""
        if not self.held.summable:
            weight = self.held.parameter.new_empty(0, dtype=torch.float32)
            empty = weight.expand(0).reshape(0, 0)
            return Base(empty, None, empty, None, False, True)
        weight, bias, wrapped = self.weight, self.bias, not self._plainly or self.wrapped
        if not self.merged:
            return Base(weight, bias, weight, bias, False, wrapped)
        return Base(weight, bias, self.own_weight, self.own_bias, True, wrapped)

    @property
    def wrapped(self) -> bool:
        """Whether another library's forward stands in for the layer's own."""
        return self._previous is not None

    @property
    def own_weight(self) -> Tensor:
        """The weight without any adapter, (output width, input width)."""
        for link in self.merged:
            if link.before is not None and link.before[0] is not None:
                return self.form.matrix(link.before[0])
        return self.weight

    @property
    def own_bias(self) -> Tensor | None:
        """The bias without any adapter."""
        for link in self.merged:
            if link.bare or (link.before is not None and link.before[1] is not None):
                return None if link.before is None else link.before[1]
        return self.bias

    @classmethod
    def bias_below(cls, weight: Weight) -> Tensor | None:
        """Return the bias of a layer without any adapter, if it has one."""
        site = cls.of(weight.module, weight.key)
        return weight.bias if site is None else site.own_bias

    def below(self, adapter: nn.Module) -> list[Link]:
        """Return those that are merged below an adapter, if it is merged here."""
        if not self.merged:
            return []
        link = self.links[adapter]
        return self.merged[: self.merged.index(link)] if link in self.merged else []

    def holders(self, key: str) -> list[str]:
        """Return the names of the adapters whose changes the weight or the bias holds."""
        index = {self.held.key: 0, "bias": 1}.get(key)
        return [
            link.adapter_name
            for link in self.merged
            if index is not None and link.before is not None and link.before[index] is not None
        ]

    def merge(self, adapter: nn.Module) -> None:
        """Add the adapter's update to weight and bias, in place, and keep the bits they had."""
        link = self.links[adapter]
        # In the order of attachment, so that the bits do not depend on that of merging.
        order = {own: index for index, own in enumerate(self.links.values())}
        below = [own for own in self.merged if order[own] < order[link]]
        for own in (link, *self._undo(len(below))):
            self._add(own)
        changed = [self.held.parameter, self.held.bias]
        parts = [local(each) for each in changed if each is not None]
        finite = all(is_finite(_real(each)) for each in parts if each.numel())
        if not agreed(finite, changed[0]):
            self.unmerge(adapter)
            raise ValueError(f"weight + update of {link.name!r} must be finite to be merged")

    def unmerge(self, adapter: nn.Module) -> None:
        """Give weight and bias the bits they had before the adapter was merged, if it is."""
        link = self.links[adapter]
        if link not in self.merged:
            return
        self._check_merged(link)
        for other in self._undo(self.merged.index(link))[1:]:
            self._add(other)

    def _undo(self, place: int) -> list[Link]:
        """Give weight and bias the bits from before all that were merged from a place on."""
        undone = self.merged[place:]
        with torch.no_grad():
            # Those that come later may be the first to change one of the two.
            for own, index in ((self.held.parameter, 0), (self.held.bias, 1)):
                kept = [each.before[index] for each in undone if each.before is not None]
                first = next((bits for bits in kept if bits is not None), None)
                if own is not None and first is not None:
                    own.copy_(first)
        if any(each.bare for each in undone):
            self.module.register_parameter("bias", None)
        del self.merged[place:]
        for each in undone:
            each.before, each.bare = None, False
        return undone

    def _check_merged(self, link: Link) -> None:
        """Refuse to write the bits that were kept into another parameter."""
        for key, kept in zip((self.held.key, "bias"), link.into, strict=True):
            if kept is not None and self.module._parameters.get(key) is not kept:
                raise AdapterError(
                    f"weights must be those that adapter {link.adapter_name!r} was merged into to "
                    f"be unmerged: the {key} of {link.name!r} was replaced since; "
                    "detach(keep_merged=True) leaves all as it is"
                )

    @torch.no_grad()
    def _add(self, link: Link) -> None:
        weight, bias = self.held.parameter, self.held.bias
        supports, base = [*link.supports], self.base
        if any(own.operation != ADD for own in supports):
            base = Base(*map(whole, base))
        of_weight, of_bias = changed_by(base, supports, Support.delta)
        if bias is None and of_bias is not None and is_distributed(weight):
            raise AdapterError(f"{link.name!r} must not be sharded to gain a bias by a merge")
        kept = (
            None if of_weight is None else weight.detach().clone(),
            None if of_bias is None or bias is None else bias.detach().clone(),
        )
        link.before, link.bare = kept, bias is None and of_bias is not None
        self.merged.append(link)
        if of_weight is not None:
            update = spread(self.form.stored(of_weight), weight)
            add_rounded_once(_real(local(weight)), _real(local(update)))
        if of_bias is not None and bias is None:
            gained = nn.Parameter(of_bias.to(weight), requires_grad=False)
            self.module.register_parameter("bias", gained)
        elif of_bias is not None:
            add_rounded_once(local(bias), local(spread(of_bias, bias)))
        link.into = (
            None if of_weight is None else weight,
            None if of_bias is None else self.held.bias,
        )


def _real(weight: Tensor) -> Tensor:
    return torch.view_as_real(weight) if weight.is_complex() else weight


def rank_of(support: Support) -> int:
    """Return the rank of an update that is a product of two matrices; 0 where it is none."""
    return low_rank(support.blocks.plan.layout, support.name)


class Reader:
    """What stands in for the forward of a module that reads adapted weights itself.

    Parameters
    ----------
    module : torch.nn.Module
        The module.

    Attributes
    ----------
    sites : list of Site
        The weights, its own or those of its parts: their sums are in place while it runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.sites: list[Site] = []
        self._previous: Callable[..., Any] | None = module.__dict__.get("forward")

    @classmethod
    def add(cls, module: nn.Module, site: Site) -> None:
        """Let the module read a site's sum."""
        found = [each for each in holders_of(module) if isinstance(each, Reader)]
        reader = found[0] if found else cls(module)
        if not found:
            module.forward = reader.forward
        if site not in reader.sites:
            reader.sites.append(site)
            site.readers.append(reader)

    def remove(self, site: Site) -> None:
        """Let the module read the weight alone; with the last one it is as it was."""
        self.sites.remove(site)
        site.readers.remove(self)
        if not self.sites:
            _unwrap(self.module, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the sums in place."""
        if not torch.compiler.is_compiling():
            for site in self.sites:
                site.reached = True
        if INSIDE and not is_noted(self.sites):
            blind = isinstance(self.module, FAST)
            return call_inside(self.sites, self.forward, args, kwargs, blind)
        return call_with(self.sites, self._base, args, kwargs)

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def holders_of(module: nn.Module) -> list[Site | Reader]:
    """Return what stands in for a module's forward, the outermost first."""
    found: list[Site | Reader] = []
    forward: Any = module.__dict__.get("forward")
    while isinstance(getattr(forward, "__self__", None), (Site, Reader)):
        found.append(forward.__self__)
        forward = forward.__self__._previous
    return found


def is_lost(module: nn.Module, holder: Site | Reader) -> bool:
    """Return whether a module's forward is certainly not that of a holder any more."""
    if holder in holders_of(module):
        return False
    forward = module.__dict__.get("forward")
    # Another library's wrapper may call ours.
    return forward is None or getattr(forward, "__self__", None) is module


def _unwrap(module: nn.Module, holder: Site | Reader) -> None:
    """Take a holder out of the forwards that stand in for a module's own."""
    held = holders_of(module)
    if holder not in held:
        return
    place = held.index(holder)
    if place:
        held[place - 1]._previous = holder._previous
    elif holder._previous is None:
        del module.__dict__["forward"]
    else:
        module.forward = holder._previous
