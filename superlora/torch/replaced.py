"""`Replaced`: parameters of the model itself that come with an adapter, such as a new head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from superlora.errors import some


class Replaced:
    """Values that take the place of a model's own, and can be exchanged with them.

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
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        self.names = list(values)
        self._in_use = False
        self._parameters = [model.get_parameter(name) for name in values]
        self._others = [
            value.detach().clone().to(parameter)
            for value, parameter in zip(values.values(), self._parameters, strict=True)
        ]

    def values(self) -> dict[str, Tensor]:
        """Return the new values by name, whether they are in use or not."""
        held = self._parameters if self._in_use else self._others
        return {name: v.detach().clone() for name, v in zip(self.names, held, strict=True)}

    def holds(self, parameter: Tensor) -> bool:
        """Return whether a parameter is one of these."""
        return any(parameter is own for own in self._parameters)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the values in use with the others, bit for bit."""
        for parameter, other in zip(self._parameters, self._others, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(before)
        self._in_use = not self._in_use


def refuse_unfit(model: nn.Module, values: Mapping[str, Tensor], source: object) -> None:
    """Raise if a model cannot take these values.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    values : mapping of str to torch.Tensor
        New values by the parameters' dotted names.
    source : object
        Where they come from, for the message.

    Raises
    ------
    ValueError
        If a parameter is missing or of another shape; all are listed.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    problems = []
    for name, value in values.items():
        if name not in own:
            problems.append(f"no parameter {name!r}")
        elif own[name].shape != value.shape:
            found = tuple(own[name].shape)
            problems.append(f"{name!r} has shape {found} instead of {tuple(value.shape)}")
        elif own[name].is_meta:
            problems.append(f"{name!r} lies on the meta device")
    if problems:
        raise ValueError(f"the model must have the parameters of {source}: {some(problems, 20)}")
