"""`Replaced`: parameters of the model itself that come with an adapter, such as a new head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.torch.files.safetensors_file import other_shapes
from superlora.torch.sharded import is_distributed, reshard
from superlora.torch.site import Site


class Replaced:
    """Parameters that take the place of a model's own, and can be exchanged with them.

    The model's own are put aside as they are, also where two modules share one.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    values : mapping of str to torch.Tensor
        New values of the parameters of these dotted names; nothing is changed yet.

    Attributes
    ----------
    names : list of str
        The parameters.
    in_use : bool
        Whether the model has the new ones.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        self.names = list(values)
        self.in_use = False
        self._model = (model,)
        parts = [name.rpartition(".") for name in values]
        self._places = [(model.get_submodule(path), leaf) for path, _, leaf in parts]
        self._others = list(map(_like, values.values(), self._own()))

    @property
    def places(self) -> list[tuple[nn.Module, str]]:
        """The module and the name of each parameter in it."""
        return [*self._places]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the new parameters by name, whether they are in use or not."""
        self.refuse_merged()
        for (owner, _), name in zip(self._places, self.names, strict=True):
            path = name.rpartition(".")[0]
            if self._model[0].get_submodule(path) is not owner:
                raise AdapterError(
                    f"{path!r} must be the module whose parameters the adapter replaced: it is "
                    "another now"
                )
        held = self._own() if self.in_use else self._others
        return dict(zip(self.names, held, strict=True))

    def use(self, new: bool) -> None:
        """Let the model have the new parameters, or its own: all of them, or none."""
        if new == self.in_use:
            return
        self.refuse_merged()
        reshard(owner for owner, _ in self._places)
        own = self._own()
        if any(map(is_distributed, own)):
            raise AdapterError(
                "a model must not be sharded while parameters that an adapter replaced are "
                f"exchanged with its own, as to disable or detach it: got {some(self.names)}"
            )
        # The model may have moved since.
        others = list(map(_like, self._others, own))
        for (owner, leaf), other in zip(self._places, others, strict=True):
            owner._parameters[leaf] = other
        self._others = own
        self.in_use = new

    def refuse_merged(self) -> None:
        """Raise if some adapter is merged into one of them."""
        for (owner, leaf), name in zip(self._places, self.names, strict=True):
            site = Site.of(owner)
            merged = [] if site is None else site.holders(leaf)
            if merged:
                raise AdapterError(
                    f"{name!r}, which an adapter has replaced, must not hold merged updates for "
                    f"this: unmerge {some(map(repr, merged))} first"
                )

    def overlap(self, other: Replaced) -> list[str]:
        """Return the parameters that another one replaces too."""
        taken = set(other._places)
        return [
            name for name, place in zip(self.names, self._places, strict=True) if place in taken
        ]

    def _own(self) -> list[nn.Parameter]:
        return [owner.get_parameter(leaf) for owner, leaf in self._places]


def _like(value: Tensor, own: Tensor) -> nn.Parameter:
    """Return a value as a parameter of the device and dtype of another, itself where it is."""
    if isinstance(value, nn.Parameter) and (value.device, value.dtype) == (own.device, own.dtype):
        return value
    with torch.inference_mode(False):
        return nn.Parameter(value.detach().clone().to(own), requires_grad=value.requires_grad)


def refuse_unfit(model: nn.Module, values: Mapping[str, Tensor], source: object) -> None:
    """Raise if a model cannot take these values."""
    every = dict(model.named_parameters(remove_duplicate=False))
    own = {name: every[name] for name in values if name in every}
    expected = {name: tuple(value.shape) for name, value in values.items()}
    found = {name: tuple(parameter.shape) for name, parameter in own.items()}
    problems = other_shapes(expected, found, ("no parameter", "extra", "has"))
    problems += [f"{name!r} lies on the meta device" for name in own if own[name].is_meta]
    if problems:
        raise ValueError(f"the model must have the parameters of {source}: {some(problems, 20)}")
