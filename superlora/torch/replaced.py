"""`Replaced`: parameters of the model itself that train and are saved with an adapter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.torch.files.safetensors_file import other_shapes
from superlora.torch.layers import Weight
from superlora.torch.sharded import is_distributed, reshard
from superlora.torch.site import Site
from superlora.torch.targets import is_named
from superlora.torch.walk import held_in, outside_adapters, read, submodule, tensors_of

Also = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
Place = tuple[nn.Module, str]


class Replaced:
    """Parameters and buffers that take the place of a model's own, and can be exchanged with them.

    The model's own are put aside as they are, also where two modules share one.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    values : mapping of str to torch.Tensor
        New values of the parameters and buffers of these dotted names; nothing is changed yet.
    shared : mapping of str to sequence of str, optional
        Other names of the same parameter, which get the same new one.

    Attributes
    ----------
    names : list of str
        The parameters and buffers.
    shared : dict of str to list of str
        As given.
    in_use : bool
        Whether the model has the new ones.
    """

    def __init__(
        self,
        model: nn.Module,
        values: Mapping[str, Tensor],
        shared: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        held = tensors_of(model)
        # In the model's order, which a file does not keep and an optimizer's state goes by.
        self.names = [name for name in held if name in values]
        self.shared = {name: list(others) for name, others in (shared or {}).items()}
        self.in_use = False
        self._model = (model,)
        self._places: dict[str, list[Place]] = {
            name: [held[each] for each in (name, *self.shared.get(name, ()))] for name in self.names
        }
        own = self._own()
        self._others = {name: _like(values[name], own[name]) for name in self.names}

    @property
    def every(self) -> list[str]:
        """All names of the parameters and buffers, where modules share one too."""
        return [*self.names, *(name for others in self.shared.values() for name in others)]

    @property
    def places(self) -> list[Place]:
        """The module and the name in it of each."""
        return [place for places in self._places.values() for place in places]

    def tensors(self) -> dict[str, Tensor]:
        """Return the new parameters and buffers by name, whether they are in use or not."""
        self.refuse_merged()
        for name, ((owner, _), *_) in self._places.items():
            path = name.rpartition(".")[0]
            if submodule(self._model[0], path) is not owner:
                raise AdapterError(
                    f"{path!r} must be the module whose parameters the adapter replaced: it is "
                    "another now"
                )
        return self._own() if self.in_use else dict(self._others)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the new parameters by name, which are trained."""
        held = self._own() if self.in_use else self._others
        return {name: own for name, own in held.items() if isinstance(own, nn.Parameter)}

    def use(self, new: bool) -> None:
        """Let the model have the new ones, or its own: all of them, or none."""
        if new == self.in_use:
            return
        self.refuse_merged()
        reshard(owner for owner, _ in self.places)
        own = self._own()
        if any(map(is_distributed, own.values())):
            raise AdapterError(
                "a model must not be sharded while parameters that an adapter replaced are "
                f"exchanged with its own, as to disable or detach it: got {some(self.names)}"
            )
        # The model may have moved since.
        others = {name: _like(value, own[name]) for name, value in self._others.items()}
        for name, places in self._places.items():
            for owner, leaf in places:
                held_in(owner, leaf)[leaf] = others[name]
        self._others = own
        self.in_use = new

    def refuse_merged(self) -> None:
        """Raise if some adapter is merged into one of them."""
        for name, places in self._places.items():
            for owner, leaf in places:
                site = Site.of(owner, leaf if leaf != "bias" else "weight")
                merged = [] if site is None else site.holders(leaf)
                if merged:
                    raise AdapterError(
                        f"{name!r}, which an adapter has replaced, must not hold merged updates "
                        f"for this: unmerge {some(map(repr, merged))} first"
                    )

    def overlap(self, other: Replaced) -> list[str]:
        """Return the names of what another one replaces too."""
        taken = {place for places in other._places.values() for place in places}
        return [name for name, places in self._places.items() if not taken.isdisjoint(places)]

    def _own(self) -> dict[str, Tensor]:
        return {name: read(*places[0]) for name, places in self._places.items()}


def _like(value: Tensor, own: Tensor) -> Tensor:
    """Return a value on the device and in the dtype of the model's own, a parameter if that is."""
    kinds = [isinstance(each, nn.Parameter) for each in (value, own)]
    if kinds[0] == kinds[1] and (value.device, value.dtype) == (own.device, own.dtype):
        return value
    with torch.inference_mode(False):
        if all(kinds) and not (
            value.is_meta or own.is_meta
        ):  # the same parameter, which an optimizer may have
            value.data = value.data.to(own)
            if value.grad is not None:
                value.grad = value.grad.to(own)
            return value
        made = value.detach().clone().to(own)
        return nn.Parameter(made, made.is_floating_point()) if kinds[1] else made


def with_also(model: nn.Module, also: Also | None, adapted: Iterable[Weight]) -> Replaced | None:
    """Return what a user names to be trained and saved with an adapter, copies of it."""
    if also is None:
        return None
    held = tensors_of(model)
    chosen = _chosen(held, also)
    weights = {id(weight.module._parameters.get(weight.key)) for weight in adapted}
    groups: dict[int, list[str]] = {}
    for name, (owner, leaf) in held.items():
        groups.setdefault(id(read(owner, leaf)), []).append(name)
    values: dict[str, Tensor] = {}
    shared = {}
    for identity, names in groups.items():
        named = [name for name in names if name in chosen]
        if not named:
            continue
        own = read(*held[names[0]])
        if identity in weights:
            raise ValueError(f"also must name no adapted weight: got {named[0]!r}")
        if len(named) < len(names):
            others = [name for name in names if name not in chosen]
            raise ValueError(
                f"also must name every module that shares a parameter: {named[0]!r} is "
                f"{some(map(repr, others))} too"
            )
        if isinstance(own, nn.Parameter) and not own.is_floating_point():
            raise ValueError(
                f"also must name parameters of a floating-point type: {named[0]!r} has {own.dtype}"
            )
        if own.is_meta:
            raise AdapterError(
                f"weights must be loaded to be trained with an adapter: {named[0]!r} lies on the "
                "meta device"
            )
        with torch.inference_mode(False):
            copied = own.detach().clone()
            values[names[0]] = nn.Parameter(copied) if isinstance(own, nn.Parameter) else copied
        if names[1:]:
            shared[names[0]] = names[1:]
    return Replaced(model, values, shared)


def _chosen(held: Mapping[str, Place], also: Also) -> set[str]:
    """Return the names of the parameters and buffers that a user names."""
    if callable(also):
        chosen = set()
        for name, (owner, leaf) in held.items():
            parameter = owner._parameters.get(leaf)
            if parameter is not None and also(name, parameter):
                chosen.add(name)
        if not chosen:
            raise ValueError("also must choose at least one parameter: the predicate chose none")
        return chosen
    patterns = [also] if isinstance(also, str) else also
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(
            f"also must be a list of names, a regular expression or a predicate: got {also!r}"
        )
    if not patterns:
        raise ValueError("also must hold at least one name: got an empty list")
    found: set[str] = set()
    for pattern in patterns:
        try:
            whole = re.compile(pattern) if isinstance(also, str) else None
        except re.error as error:
            raise ValueError(
                f"also must be a valid regular expression: got {pattern!r} ({error})"
            ) from None
        own = {
            name
            for name in held
            for each in _above(name)
            if (whole.fullmatch(each) if whole is not None else is_named(each, [pattern]))
        }
        if not own:
            names = list(dict.fromkeys(each for name in held for each in _above(name)))
            near = difflib.get_close_matches(pattern, names, 3, 0.0)
            raise ValueError(
                f"also must match the model: {pattern!r} is no parameter and no module that has "
                f"one; the nearest names are {some(map(repr, near))}"
            )
        found |= own
    return found


def _above(name: str) -> list[str]:
    """Return a dotted name and those of the modules that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def unsaved(model: nn.Module, held: Iterable[Replaced]) -> list[str]:
    """Return the parameters of a model that are trained and are in no adapter."""
    known = {id(own) for replaced in held for own in replaced.parameters().values()}
    found = []
    for name, (owner, leaf) in tensors_of(model).items():
        parameter = owner._parameters.get(leaf)
        if parameter is not None and parameter.requires_grad and id(parameter) not in known:
            found.append(name)
    return found


def batches_of(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Return the norms that keep running statistics, and how many batches these have seen."""
    found = {}
    for name, module in outside_adapters(model):
        count = getattr(module, "num_batches_tracked", None)
        if isinstance(count, Tensor) and not count.is_meta:
            found[name] = (module, int(count))
    return found


def refuse_unfit(
    model: nn.Module,
    values: Mapping[str, Tensor],
    shared: Mapping[str, Sequence[str]],
    source: object,
) -> None:
    """Raise if a model cannot take these values, or does not share what was shared."""
    held = tensors_of(model)
    own = {name: read(*held[name]) for name in values if name in held}
    expected = {name: tuple(value.shape) for name, value in values.items()}
    found = {name: tuple(parameter.shape) for name, parameter in own.items()}
    problems = other_shapes(expected, found, ("no parameter", "extra", "has"))
    problems += [f"{name!r} lies on the meta device" for name in own if own[name].is_meta]
    problems += [
        f"{name!r} is of {value.dtype} instead of {own[name].dtype}"
        for name, value in values.items()
        if name in own and value.is_floating_point() != own[name].is_floating_point()
    ]
    problems += [
        f"{name!r} is not shared with {other!r}"
        for name, others in shared.items()
        for other in others
        if name not in own or other not in held or read(*held[other]) is not own[name]
    ]
    if problems:
        raise ValueError(f"the model must have the parameters of {source}: {some(problems, 20)}")
