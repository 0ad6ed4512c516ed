"""`Replaced`: parameters of the model itself that come with an adapter, such as a new head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from superlora.errors import AdapterError, some


class Replaced:
    """Parameters that take the place of a model's own, and can be exchanged with them.

    The model's own are put aside as they are: nothing is written into them, also where
    two modules share one.

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
        self._owners = [model.get_submodule(name.rpartition(".")[0]) for name in values]
        self._others: list[nn.Parameter] = []
        for name, value in values.items():
            new = value.detach().clone().to(model.get_parameter(name))
            self._others.append(nn.Parameter(new, requires_grad=False))

    def values(self) -> dict[str, Tensor]:
        """Return the new values by name, whether they are in use or not."""
        held = [own for _, own in self._own()] if self.in_use else self._others
        return {name: v.detach().clone() for name, v in zip(self.names, held, strict=True)}

    def exchange(self) -> None:
        """Exchange the parameters in use with the others.

        Raises
        ------
        AdapterError
            If a module that has one was exchanged itself.
        """
        for place, (owner, own) in enumerate(self._own()):
            other = self._others[place]
            other.data = other.data.to(own)  # the model may have moved since
            owner._parameters[self.names[place].rpartition(".")[2]] = other
            self._others[place] = own
        self.in_use = not self.in_use

    def overlaps(self, names: Mapping[str, Tensor], model: nn.Module) -> str | None:
        """Return one of a model's parameter names that is replaced here already, if any."""
        mine = {
            (id(owner), name.rpartition(".")[2])
            for owner, name in zip(self._owners, self.names, strict=True)
        }
        for name in names:
            path, _, leaf = name.rpartition(".")
            if (id(model.get_submodule(path)), leaf) in mine:
                return name
        return None

    def _own(self) -> list[tuple[nn.Module, nn.Parameter]]:
        found = []
        for owner, name in zip(self._owners, self.names, strict=True):
            path, _, leaf = name.rpartition(".")
            if self._model[0].get_submodule(path) is not owner:
                raise AdapterError(
                    f"{path!r} must be the module whose {leaf} the adapter replaced: it is another "
                    "now"
                )
            found.append((owner, owner.get_parameter(leaf)))
        return found


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
