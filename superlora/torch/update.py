"""Ways to change a layer's output by its updates: factored, multiplied by a map, or formed.

Each is written twice: by plain operations, for what sees every operation (compilers, torch.func,
second derivatives), and as one function whose backward pass makes again what is not cheap to keep.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from superlora._backend import backend_of
from superlora.algebra.contract import contract_pair, matrices, run
from superlora.algebra.form import form, scaled, take, total
from superlora.design.contraction import Contraction
from superlora.design.cost_rule import Factored
from superlora.design.layout import Layout
from superlora.design.network import Operand, group_network
from superlora.torch.autograd import (
    aliases,
    gradients,
    is_traced,
    linearized,
    without_autocast,
)
from superlora.torch.operands import Operands, Rows
from superlora.torch.scope import Values

# A number, or a tensor of one, which compiled code multiplies by.
Scale = float | Tensor
_torch = backend_of(torch.empty(0))


class Call(NamedTuple):
    """What a way to change a layer's output is applied to.

    Attributes
    ----------
    x : torch.Tensor, (tokens, input width)
        Inputs.
    weight, bias : torch.Tensor or None
        The layer's; without a weight the update alone is asked for.
    tensors : sequence of torch.Tensor
        First what layers may share, of all supports; then the blocks.
    scale : float or torch.Tensor
        What multiplies the update; formed supports have numbers of their own.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    tensors: Sequence[Tensor]
    scale: Scale


class Way:
    """One way to change a layer's output. Integers and maps: it holds no tensor."""

    def __init__(self, *operands: Operands) -> None:
        self.operands = operands
        self.shared_count = 0
        # What every layer reads all of: where it stands among the tensors, whose it is, its key.
        self.whole: list[tuple[int, int, Hashable]] = []
        for index, own in enumerate(operands):
            for each in own.shared:
                if each.several and each.part is None:
                    self.whole.append((self.shared_count, index, each.key))
                self.shared_count += 1

    def arrays(self, tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
        """Return what one support is made of, of the tensors that layers may share and blocks."""
        if not self.shared_count:
            return tensors
        (own,) = self.operands
        cuts = own.cut(tensors[: self.shared_count], (0, own.height), device)
        return [*cuts, *tensors[self.shared_count :]]

    def plain(self, call: Call) -> Tensor:
        """Return the output by operations that torch differentiates itself."""
        update: Tensor = scaled(self.update(call.x, call.tensors), call.scale)
        if call.weight is None:
            return update
        return linear(call.x, call.weight, call.bias) + update

    def update(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the update's part of the output, not scaled, by plain operations."""
        raise NotImplementedError

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and what is kept for the backward pass."""
        return self.plain(call), []

    def backward(self, back: Backward) -> None:
        """Gather the gradients that are asked for."""
        back.of_x = back.through_base()
        rest = [back.x, *back.tensors]
        wanted = [back.of_x is not None, *back.wanted]
        _, pull = linearized(lambda x, *own: self.update(x, own), rest, wanted)
        of_x, *found = pull(back.gradient * back.scale)
        if back.of_x is not None and of_x is not None:
            back.of_x += of_x
        back.take(found)


class Backward:
    """What a backward pass reads, named as in a `Call`, and the gradients that it gathers.

    Attributes
    ----------
    kept : list of torch.Tensor
        What the forward pass kept, in order.
    wanted : sequence of bool
        Whose gradients of `tensors` are asked for.
    of_x : torch.Tensor or None
        The inputs' gradient, where it is asked for.
    sums : list of (torch.Tensor or None)
        Those of `tensors`.
    """

    def __init__(self, ctx: Any, gradient: Tensor, sums: list[Tensor | None]) -> None:
        self.x, self.weight, *rest = ctx.saved_tensors
        own = len(rest) - ctx.kept
        self.tensors = [*ctx.shared, *rest[:own]]
        self.kept = rest[own:]
        self.gradient, self.scale = gradient, ctx.scale
        self.wants_x, self.wants_weight, _, *self.wanted = ctx.needs_input_grad[_FIXED:]
        self.of_x: Tensor | None = None
        self.sums = sums

    def through_base(self) -> Tensor | None:
        """Return the inputs' gradient without the update; None where it is not asked for."""
        if not self.wants_x:
            return None
        if self.weight is None:
            return torch.zeros_like(self.x)
        found: Tensor = self.gradient @ self.weight
        return found

    def take(self, found: Sequence[Tensor | None]) -> None:
        """Add gradients, one for each of the tensors."""
        self.sums = list(map(_added, self.sums, found))

    def sum_of(self, index: int) -> Tensor:
        """Return the sum of one tensor, which rows and layers add to in place; zero at first."""
        found = self.sums[index]
        if found is None:
            self.sums[index] = found = torch.zeros_like(self.tensors[index])
        return found

    def add(
        self, own: Operands, first: int, gradients: Sequence[Tensor | None], rows: Rows
    ) -> None:
        """Add the adjoint of `Operands.cut` to the sums of the tensors that layers may share."""
        for index, (each, gradient) in enumerate(zip(own.shared, gradients, strict=True), first):
            if gradient is not None:
                total = self.sum_of(index)
                each.add(total, gradient.to(total.device), rows)


class FactoredWay(Way):
    """Networks with the inputs as one operand; with the layer's weight it is the last tensor."""

    def __init__(self, layout: Layout, name: str, factored: Factored) -> None:
        own = Operands(layout, name, factored.sources, factored.opened)
        super().__init__(own)
        self.factored = factored
        self.height = layout.shapes[name][0]
        # For every term its path, and where each operand stands, with its slice if it is one.
        self.few, self.many = (
            tuple((term.contraction, _places(own, term.operands)) for term in terms)
            for terms in (factored.few, factored.many)
        )

    def _terms(self, tokens: int) -> Sequence[tuple[Contraction, Sequence[Place]]]:
        return self.many if tokens >= self.factored.switch else self.few

    def _values(
        self, x: Tensor, arrays: Sequence[Tensor], places: Sequence[Place], index: int
    ) -> list[Tensor]:
        """Return the operands of a term."""
        factored = self.factored
        values = [x if len(factored.inputs) == 1 else x.reshape(-1, *factored.inputs)]
        if factored.opened is not None:
            rows = arrays[index]
            values.append(rows.reshape(*factored.lead, *rows.shape[1:]))
        elif factored.base is not None:
            values.append(arrays[-1].reshape(factored.base))
        for place, operand in places:
            array = arrays[place]
            values.append(array if operand is None else take(_torch, array, operand))
        return values

    def update(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the update's part of the output, not scaled, by plain operations."""
        arrays = self.arrays(tensors, x.device)
        # No compiler is to see a number of tokens compared.
        terms = self.many if is_traced() else self._terms(x.shape[0])
        found = total(
            run(path, self._values(x, arrays, places, index), _torch)
            for index, (path, places) in enumerate(terms)
        )
        y: Tensor = found.reshape(x.shape[0], self.height)
        return y

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and what is kept for the backward pass."""
        x, weight, bias, arrays, scale = call
        if self.shared_count:
            arrays = self.arrays(arrays, x.device)
        y = None if weight is None else linear(x, weight, bias)
        kept: list[Tensor] = []
        for index, (path, places) in enumerate(self._terms(x.shape[0])):
            values = self._values(x, arrays, places, index)
            for step in path.steps[:-1]:
                left, right = values[step.left], values[step.right]
                values.append(contract_pair(_torch, step.pair, left, right))
            if keep:
                for place in path.cheap:
                    kept.append(values[place])
            y = self._add(path, values, y, scale)
        assert y is not None
        return y, kept

    def _add(
        self, path: Contraction, values: Sequence[Tensor], y: Tensor | None, scale: Any
    ) -> Tensor:
        """Add the last contraction to the output, in the same pass where it can be."""
        step = path.steps[-1]
        left, right = values[step.left], values[step.right]
        if y is not None and step.pair.adds and path.axes is None:
            one, other = matrices(_torch, step.pair, left, right)
            y.view(one.shape[0], other.shape[1]).addmm_(one, other, alpha=scale)
            return y
        found = contract_pair(_torch, step.pair, left, right)
        if path.axes is not None:
            found = found.permute(path.axes)
        found = found.reshape(-1, self.height)
        if y is not None:
            return y.add_(found, alpha=scale)
        scaled_alone: Tensor = found if scale == 1 else found * scale
        return scaled_alone

    def backward(self, back: Backward) -> None:
        """Gather the gradients that are asked for."""
        back.of_x = back.through_base()
        (own,) = self.operands
        arrays = self.arrays(back.tensors, back.x.device)
        found: list[Tensor | None] = [None] * len(arrays)
        kept = iter(back.kept)
        for index, (path, places) in enumerate(self._terms(back.x.shape[0])):
            values = self._values(back.x, arrays, places, index)
            count = len(values)
            for number, step in enumerate(path.steps[:-1]):
                left, right = values[step.left], values[step.right]
                cheap = count + number in path.cheap
                values.append(
                    next(kept) if cheap else contract_pair(_torch, step.pair, left, right)
                )
            # Where each operand stands among the arrays; the inputs stand nowhere.
            stand = [place for place, _ in places]
            if count > 1 + len(places):
                stand.insert(0, index if own.leading else len(arrays) - 1)
            wanted = [back.of_x is not None, *(back.wanted[place] for place in stand)]
            of_inputs, *pulled = _pull(path, values, wanted, back)
            if of_inputs is not None:
                assert back.of_x is not None
                back.of_x += of_inputs.reshape(back.x.shape)
            slices = [None] * (len(pulled) - len(places)) + [operand for _, operand in places]
            for place, operand, gradient in zip(stand, slices, pulled, strict=True):
                if gradient is not None:
                    found[place] = _untaken(gradient, operand, arrays[place], found[place])
        back.add(own, 0, found[: self.shared_count], (0, self.height))
        found[: self.shared_count] = [None] * self.shared_count
        back.take(found)


# Where an operand stands among the arrays, and its slice if it is not the whole array.
Place = tuple[int, Operand | None]


def _places(own: Operands, operands: Sequence[Operand]) -> tuple[Place, ...]:
    return tuple((own.places[each.source], None if each.whole else each) for each in operands)


def _pull(
    path: Contraction, values: Sequence[Tensor], wanted: Sequence[bool], back: Backward
) -> list[Tensor | None]:
    """Take the output's gradient back along a path; the inputs' is added in place if it can be."""
    count = len(wanted)
    needed = list(wanted)
    for step in path.steps:
        needed.append(needed[step.left] or needed[step.right])
    found: list[Tensor | None] = [None] * len(needed)
    last = back.gradient
    if len(path.output) != 2:
        last = last.reshape(-1, *(path.sizes[label] for label in path.output[1:]))
    if path.axes is not None:
        last = last.permute(sorted(range(last.dim()), key=path.axes.__getitem__))
    found[-1] = last
    scale = back.scale
    for number in range(len(path.steps) - 1, -1, -1):
        step, pulls = path.steps[number], path.pulls[number]
        gradient = found[count + number]
        found[count + number] = None
        if gradient is None:
            continue
        sides = ((step.left, step.right), (step.right, step.left))
        for (place, other), pair in zip(sides, pulls, strict=True):
            if not needed[place]:
                continue
            if place == 0 and pair.adds and back.of_x is not None:
                one, two = matrices(_torch, pair, gradient, values[other])
                back.of_x.view(one.shape[0], two.shape[1]).addmm_(one, two, alpha=scale)
                continue
            own = contract_pair(_torch, pair, gradient, values[other])
            found[place] = own if scale == 1 else own * scale
        scale = 1.0  # everything before the last step has it by now
    return found[:count]


def _untaken(
    gradient: Tensor, operand: Operand | None, array: Tensor, so_far: Tensor | None
) -> Tensor:
    """Add the adjoint of a slice to the gradient of what it was taken of."""
    if operand is None or operand.cut is None:
        return _added(so_far, gradient.reshape(array.shape))  # type: ignore[return-value]
    if so_far is None:
        so_far = array.new_zeros(array.shape)
    digits = so_far if operand.digits is None else so_far.view(operand.digits)
    part = digits[operand.cut]
    part += gradient.reshape(part.shape)
    return so_far


class MultipliedWay(Way):
    """A map that multiplies inputs itself."""

    def __init__(self, layout: Layout, name: str) -> None:
        group = layout.grouping.pieces[name][0].group
        self.network = group_network(layout, group)
        self.map = layout.maps[group]
        super().__init__(Operands(layout, name, self.network.sources, vectors=False))

    def update(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the update's part of the output, not scaled, by plain operations."""
        (own,) = self.operands
        arrays = self.arrays(tensors, x.device)
        entries = form(self.network, [arrays[place] for place in own.places], _none)
        found: Tensor = self.map.multiply(entries.reshape(-1), x)
        return found


def _none(*_: int) -> Tensor:
    raise AssertionError("a folded tensor is not cut from a mapped vector")


class FormedWay(Way):
    """``W₀ + ΔW``, formed some rows at a time, dropped, and formed again in the backward pass.

    Supports that are `scaling` are multiplied by the base weight, the last of the tensors. `chunk`
    rows are best formed at once; 0 stands for all.
    """

    def __init__(
        self,
        operands: Sequence[Operands],
        scaling: Sequence[bool],
        scale: Sequence[Scale],
        chunk: int,
    ) -> None:
        super().__init__(*operands)
        self.scales, self.chunk = any(scaling), chunk
        self.height = operands[0].height
        # Of every support where its leaves stand, whether it scales, and its number.
        self.parts: list[tuple[Operands, list[int], bool, Scale]] = []
        first, block = 0, self.shared_count
        for own, scales, number in zip(operands, scaling, scale, strict=True):
            last, end = first + len(own.shared), block + len(own.own)
            places = [*range(first, last), *range(block, end)]
            self.parts.append((own, places, scales, number))
            first, block = last, end

    def plain(self, call: Call) -> Tensor:
        """Return the output by operations that torch differentiates itself."""
        delta = self.delta(call.tensors, call.x.device)
        total = delta.to(call.x.dtype) if call.weight is None else call.weight + delta
        return linear(call.x, total, call.bias)

    def delta(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return the sum of all changes of the weight."""
        rows = (0, self.height)
        leaves = self._leaves(tensors, rows, device)
        found = []
        with without_autocast(device):  # forward is merged, which is formed as exactly
            for own, places, scales, scale in self.parts:
                delta = scaled(own.form([leaves[place] for place in places], rows), scale)
                found.append(leaves[-1].to(delta.dtype) * delta if scales else delta)
            y: Tensor = total(found)
        return y

    def _leaves(self, tensors: Sequence[Tensor], rows: Rows, device: torch.device) -> list[Tensor]:
        """Return what some rows are formed of: parts of what is shared, blocks, the base's rows."""
        found: list[Tensor] = []
        first = 0
        for own in self.operands:
            last = first + len(own.shared)
            found += own.cut(tensors[first:last], rows, device)
            first = last
        found += tensors[first:]
        if self.scales:
            found[-1] = found[-1][rows[0] : rows[1]]
        return found

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and what is kept for the backward pass."""
        x, weight, bias, tensors, _ = call
        if weight is None or not self._in_chunks(x):
            return self.plain(call), []
        changed = torch.empty_like(weight)  # laid out as it is, so that sums round alike
        for rows in self._chunks():
            leaves = self._leaves(tensors, rows, x.device)
            before, out = weight[slice(*rows)], changed[slice(*rows)]
            for own, places, scales, scale in self.parts:
                with without_autocast(x.device):
                    delta = own.form([leaves[place] for place in places], rows)
                before = _plus(before, delta, leaves[-1] if scales else None, scale, out)
        return linear(x, changed, bias), []

    def _in_chunks(self, x: Tensor) -> bool:
        # Elsewhere a kernel's launch costs more than what a cache saves.
        return bool(self.chunk) and x.device.type == "cpu"

    def _chunks(self) -> Iterator[Rows]:
        count = max(1, round(self.height / self.chunk)) if self.chunk else 1
        for index in range(count):
            yield index * self.height // count, (index + 1) * self.height // count

    def backward(self, back: Backward) -> None:
        """Gather the gradients that are asked for."""
        weight, gradient, x = back.weight, back.gradient, back.x
        whole = weight is None or back.wants_weight or not self._in_chunks(x)
        for rows in [(0, self.height)] if whole else self._chunks():
            leaves = self._leaves(back.tensors, rows, x.device)
            part = gradient[:, slice(*rows)]
            made = leaves[:-1] if self.scales else leaves
            dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in made])
            of_sum = part.t().to(dtype) @ x.to(dtype) if any(back.wanted) else None
            changed = part.new_zeros(()) if weight is None else weight[slice(*rows)]
            found: list[Tensor | None] = [None] * len(leaves)
            for own, places, scales, scale in self.parts:
                delta, pull = linearized(
                    lambda *mine, own=own, rows=rows: own.form(mine, rows),
                    [leaves[place] for place in places],
                    [back.wanted[place] for place in places],
                )
                base = leaves[-1].to(delta.dtype) if scales else None
                if back.wants_x:
                    changed = _plus(changed, delta, base, scale)
                if of_sum is None:
                    continue
                of_scaled = of_sum.to(delta.dtype)
                # No two parameters may have one memory as their gradients.
                if scale != 1 or len(self.parts) > 1:
                    of_scaled = of_scaled * scale
                pulled = pull(of_scaled if base is None else of_scaled * base)
                for place, each in zip(places, pulled, strict=True):
                    found[place] = each
                if scales and back.wanted[-1]:
                    found[-1] = _added(found[-1], of_scaled * delta)
            if back.wants_x:
                changed = changed.to(part.dtype)
                back.of_x = part @ changed if back.of_x is None else back.of_x.addmm_(part, changed)
            self._give(back, found, rows)

    def _give(self, back: Backward, found: Sequence[Tensor | None], rows: Rows) -> None:
        first = 0
        for own in self.operands:
            last = first + len(own.shared)
            back.add(own, first, found[first:last], rows)
            first = last
        rest = list(found[first:])
        if self.scales:
            if rest[-1] is not None:
                of_base = back.sum_of(len(back.tensors) - 1)
                of_base[rows[0] : rows[1]] += rest[-1]
            rest[-1] = None
        back.take([*[None] * first, *rest])


def _plus(
    before: Tensor, delta: Tensor, base: Tensor | None, scale: Any, out: Tensor | None = None
) -> Tensor:
    """Add an update, times the weight that it scales if there is one, in one pass."""
    if base is None:
        return torch.add(before, delta, alpha=scale, out=out)
    return torch.addcmul(before, base, delta, value=scale, out=out)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


# What `Applied` takes before the inputs.
_FIXED = 2


class Applied(torch.autograd.Function):
    """A layer's output by one way, with a backward pass that keeps little.

    What every layer reads all of goes through them as a chain, as in y → q → y → k → y → v. On the
    way back each adds its gradient, in place, to the sum that it is handed: one of their own would
    cost every layer as much as the model is deep. What layers share is kept out of the saved
    tensors, whose hooks a checkpointed layer replays.
    """

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        scale: float,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Any:
        """Return the output, and what is kept for the backward pass."""
        y, kept = way.forward(Call(x, weight, bias, tensors, scale), True)
        ctx.way, ctx.scale = way, scale
        ctx.shared, ctx.kept = tensors[: way.shared_count], len(kept)
        ctx.save_for_backward(x, weight, *tensors[way.shared_count :], *kept)
        ctx.set_materialize_grads(False)
        handed, frozen = [], []
        for place, *_ in way.whole:
            handed.append(tensors[place].view_as(tensors[place]))
            if not tensors[place].requires_grad:
                frozen.append(handed[-1])
        ctx.mark_non_differentiable(*frozen)
        return (y, *handed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *handed: Tensor | None) -> Any:
        """Gather the gradients that are asked for."""
        none: list[Tensor | None] = [None] * _FIXED
        sums: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - _FIXED - 3)
        for (place, *_), each in zip(ctx.way.whole, handed, strict=True):
            sums[place] = each
        if gradient is None:
            return (*none, None, None, None, *sums)
        with without_autocast(gradient.device):
            if torch.is_grad_enabled():
                return (*none, *_differentiable(ctx, gradient, sums))
            back = Backward(ctx, gradient, sums)
            ctx.way.backward(back)
            of_weight = None
            if back.wants_weight:
                of_weight = gradient.t() @ back.x.to(gradient.dtype)
            of_bias = gradient.sum(0) if ctx.needs_input_grad[_FIXED + 2] else None
            if back.of_x is not None:
                back.of_x = back.of_x.to(back.x.dtype)
            return (*none, back.of_x, of_weight, of_bias, *back.sums)


def _differentiable(
    ctx: Any, gradient: Tensor, sums: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients by operations that are differentiated themselves."""
    way: Way = ctx.way
    x, weight, *rest = ctx.saved_tensors
    x, *tensors = aliases([x, *ctx.shared, *rest[: len(rest) - ctx.kept]])
    weight = None if weight is None else weight.view_as(weight)
    y = way.plain(Call(x, weight, None, tensors, ctx.scale))
    of_x, of_weight, *found = gradients(y, [x, weight, *tensors], gradient, again=True)
    found = list(map(_added, sums, found))
    wants_bias = ctx.needs_input_grad[_FIXED + 2]
    return [of_x, of_weight, gradient.sum(0) if wants_bias else None, *found]


def apply_way(way: Way, call: Call, kept: Sequence[Values | None]) -> Tensor:
    """Return a layer's output, and keep what it hands on: `kept` has values for each support."""
    if is_traced():
        return way.plain(call)
    if not torch.is_grad_enabled():
        return way.forward(call, False)[0]
    x, weight, bias, tensors, scale = call
    y, *handed = Applied.apply(way, scale, x, weight, bias, *tensors)  # type: ignore[no-untyped-call]
    for (_, index, key), tensor in zip(way.whole, handed, strict=True):
        values = kept[index]
        if values is not None:
            values[key] = {None: tensor}
    found: Tensor = y
    return found
