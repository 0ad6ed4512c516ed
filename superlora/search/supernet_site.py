"""What stands in for one layer's forward in a supernet."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.design.supports import OF_BIAS, support_shape
from superlora.errors import AdapterError
from superlora.operations import change, changes
from superlora.search.space import Option
from superlora.search.supernet_storage import formed, parts
from superlora.torch.autograd import is_traced, without_autocast
from superlora.torch.layers import bias_of, input_name, parameter_of, shape_of, weight_of
from superlora.torch.operands import Operands
from superlora.torch.update import Call, FormedWay, apply_way

if TYPE_CHECKING:
    from superlora.search.supernet import Supernet

# Entries of an update that are formed at once: few enough for a core's cache.
_CHUNK = 1 << 18


@dataclass
class _Kept:
    """A layer's updated weight and bias, and all that they were made from."""

    options: Mapping[str, Option]
    tensors: list[Tensor]
    states: list[tuple[int, int]]
    weight: Tensor
    bias: Tensor | None

    def holds(self, options: Mapping[str, Option], tensors: Sequence[Tensor]) -> bool:
        """Return whether nothing has changed since."""
        return (
            options == self.options
            and len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and list(map(_state, tensors)) == self.states
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    # The address tells of memory exchanged through `.data`, as `Module.to` does.
    return tensor._version, tensor.data_ptr()


class SupernetSite:
    """A picklable callable that a layer holds as its instance attribute ``forward``.

    The layer's class, parameters and state-dict keys stay as they were; taking the attribute
    away gives the layer back.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    name : str
        What the supernet calls it.
    supernet : Supernet
        Whose configuration counts.
    """

    alone = True  # no adapter goes on the same layer

    def __init__(self, module: nn.Module, name: str, supernet: Supernet) -> None:
        self.module, self.name, self.supernet = module, name, supernet
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def clear(self) -> None:
        """Drop the updated weight that is kept for evaluation."""
        self._kept = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with its supports of the configuration in force."""
        options = self.supernet.options(self.name)
        x = args[0] if args else kwargs.get(input_name(self.module))
        plain = all(option == "none" for option in options.values())
        if plain or x is None or len(args) + len(kwargs) != 1:  # what is wrong, the layer says
            y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
            return y
        if torch.is_grad_enabled():
            self._kept = None
        elif self.supernet.fixed and not is_traced():
            return torch.nn.functional.linear(x, *self._updated(options))
        return self._trained(x, self._parts(options))

    def _parts(self, options: Mapping[str, Option]) -> dict[str, tuple[Tensor, ...]]:
        stored = self.supernet.stored(self.name)
        return {
            operation: parts(options[operation], stored[operation])
            for operation in stored
            if options[operation] != "none"
        }

    def _trained(self, x: Tensor, found: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        weight, bias = weight_of(self.module), bias_of(self.module)
        if weight.requires_grad:
            raise AdapterError(
                f"weights under a supernet must stay frozen: that of {self.name!r} requires a "
                "gradient"
            )
        shift = self._shift(found, weight, bias)
        # One product with the whole weight, unless the sum would round a small update away.
        wide = weight.dtype in (torch.float32, torch.float64)
        fused = wide and _dtype(found) == weight.dtype
        if fused and bias is not None and shift is not None:
            bias, shift = bias + shift, None
        # Flat, since what a Function returns must be no view to be changed in place afterwards.
        flat = x.reshape(-1, x.shape[-1])
        scale, add = found.get("scale_weight", ()), found.get("add_weight", ())
        if len(scale) < 2:
            y = _factored_linear(flat, weight, bias, scale, add)
        elif fused:
            y = _formed_linear(flat, weight, bias, weight, scale, add)
        else:
            y = torch.nn.functional.linear(flat, weight, bias)
            y = y + _formed_linear(flat, None, None, weight, scale, add).to(y.dtype)
        if shift is not None:
            y = y + shift.to(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _shift(
        self, found: Mapping[str, tuple[Tensor, ...]], weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Return what the bias changes by."""
        total = None
        with without_autocast(weight.device):
            for operation, own in found.items():
                if operation not in OF_BIAS or (operation == "scale_bias" and bias is None):
                    continue
                support = formed(own, support_shape(operation, shape_of(self.module)))
                # A wider copy of the weight would be kept for the backward pass.
                dtype = weight.dtype if operation == "weight_to_bias" else support.dtype
                base = bias if bias is None else bias.to(dtype)
                part = change(operation, support.to(dtype), weight, base).to(support.dtype)
                total = part if total is None else total + part
        return total

    def _updated(self, options: Mapping[str, Option]) -> tuple[Tensor, Tensor | None]:
        """Return the updated weight and bias, formed anew only where something has changed."""
        stored = self.supernet.stored(self.name)
        bias = bias_of(self.module)
        tensors = [parameter_of(self.module), *([] if bias is None else [bias])]
        tensors += [each for pair in stored.values() for each in pair if each is not None]
        if self._kept is None or not self._kept.holds(options, tensors):
            self._kept = None  # before there is another
            weight, shifted = self._form(self._parts(options), bias)
            states = list(map(_state, tensors))
            self._kept = _Kept(options, tensors, states, weight, shifted)
        return self._kept.weight, self._kept.bias

    def _form(
        self, found: Mapping[str, tuple[Tensor, ...]], bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Form the updated weight and bias in the wider precision, and round them once."""
        weight = weight_of(self.module).detach()
        shape = shape_of(self.module)
        dtype = torch.promote_types(weight.dtype, _dtype(found))
        with without_autocast(weight.device):
            supports = {
                operation: formed(own, support_shape(operation, shape)).to(dtype)
                for operation, own in found.items()
            }
            wide = weight.to(dtype)
            base = None if bias is None else bias.to(dtype)
            of_weight, of_bias = changes(wide, base, supports)
        total = weight if of_weight is None else (wide + of_weight).to(weight.dtype)
        if of_bias is None:
            return total, bias
        return total, (of_bias if base is None else base + of_bias).to(weight.dtype)


def _dtype(found: Mapping[str, tuple[Tensor, ...]]) -> torch.dtype:
    return next(iter(found.values()))[0].dtype


def _factored_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Sequence[Tensor],
    add: Sequence[Tensor],
) -> Tensor:
    """Return ``x @ (weight + weight ∘ S_scale + S_add)ᵀ + bias``, and form nothing."""
    # The gradient of a formed weight would cost another product of the whole size.
    y = torch.nn.functional.linear(x, weight, bias)
    updates = []
    if scale:  # of whole rows, which the outputs are scaled as
        updates.append(scale[0].t() * (y if bias is None else y - bias))
    if len(add) > 1:
        left, right = (each.to(x.dtype) for each in add)
        updates.append(torch.nn.functional.linear(torch.nn.functional.linear(x, right), left))
    elif add:  # all columns are the same
        dtype = torch.promote_types(x.dtype, add[0].dtype)
        updates.append(x.sum(-1, keepdim=True, dtype=dtype) * add[0].t())
    for update in updates:
        y = y + update.to(y.dtype)
    return y


def _formed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor,
    scale: Sequence[Tensor],
    add: Sequence[Tensor],
) -> Tensor:
    """Return ``x @ (weight + base ∘ S_scale + S_add)ᵀ + bias``."""
    nested = [(_Nested(base, len(own)), own) for own in (scale, add) if own]
    operands = [each for each, _ in nested]
    scaling = [own is scale for _, own in nested]
    rows = max(1, _CHUNK // max(1, base.shape[1]))
    way = FormedWay(operands, scaling, [1.0] * len(nested), rows)
    tensors = [*scale, *add, *([base] if scale else [])]
    return apply_way(way, Call(x, weight, bias, tensors, 1.0), ())


class _Nested(Operands):
    """The leading slices of stored factors, as the operands of a support that is formed.

    Parameters
    ----------
    weight : torch.Tensor, (output width, input width)
        W₀.
    count : int
        How many factors there are.
    """

    shared = ()

    def __init__(self, weight: Tensor, count: int) -> None:
        # No part of a plan: what a formed way asks for, and no more.
        self.height, self.columns = weight.shape
        self.own: tuple[Any, ...] = (None,) * count

    def cut(self, *_: Any) -> list[Tensor]:
        """Return nothing: no tensor is shared."""
        return []

    def form(self, arrays: Sequence[Tensor], rows: tuple[int, int]) -> Tensor:
        """Form rows of the support."""
        first, *others = arrays
        # A constant is one row, repeated.
        own = first if first.shape[0] == 1 else first[rows[0] : rows[1]]
        return formed([own, *others], (rows[1] - rows[0], self.columns))
