"""`Selection`: the weights that are adapted, who else has them, and what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from superlora.torch.layers import Weight, kind_of
from superlora.torch.memory import Owners
from superlora.torch.reads import ignores_bias, is_read
from superlora.torch.walk import outside_adapters, submodule


@dataclass
class Selection:
    """The weights that are adapted.

    Attributes
    ----------
    weights : dict of str to Weight
        By dotted name, in the model's order: of a layer that of its module, of another parameter
        its own, of rows of a layer the layer's and that of the rows.
    rows : dict of str to (int, int)
        Of weights that are some rows of a layer's, the first and the one after the last.
    twins : dict of str to list of Weight
        The same parameter in other modules.
    readers : dict of str to list of torch.nn.Module
        Modules that read the weight themselves, or its twins.
    left_out : dict of str to str
        Layers that are not adapted, and why.
    designs : dict of str to Any
        What a mapping of targets gives for a weight.
    parents : dict of str to torch.nn.Module
        What calls a layer, unless it chooses among several.
    without_bias : set of str
        Weights whose reader, or whose layer's own class, does not read the layer's bias.
    shared_bias : set of str
        Those whose layer shares its bias, or whose weight is adapted for several layers.
    """

    weights: dict[str, Weight]
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    twins: dict[str, list[Weight]] = field(default_factory=dict)
    readers: dict[str, list[nn.Module]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    designs: dict[str, Any] = field(default_factory=dict)
    parents: dict[str, nn.Module] = field(default_factory=dict)
    without_bias: set[str] = field(default_factory=set)
    shared_bias: set[str] = field(default_factory=set)

    @property
    def shapes(self) -> dict[str, Any]:
        """What a plan is made for."""
        found: dict[str, Any] = {}
        for name, weight in self.weights.items():
            axes = weight.axes
            if name in self.rows:
                start, stop = self.rows[name]
                found[name] = (stop - start, axes.in_)
            else:
                found[name] = axes.shape if axes.plain else axes
        return found

    def module_of(self, name: str) -> str:
        """Return the name of the module that has a weight."""
        own = name in self.rows or self.weights[name].kind == "parameter"
        return name.rpartition(".")[0] if own else name

    @property
    def beside(self) -> dict[str, Any]:
        """What a file's header says of how weights are stored, and which are no layer's own."""
        rows = {name: list(each) for name, each in self.rows.items()}
        transposed = [name for name, weight in self.weights.items() if weight.transposed]
        return {
            "transposed": transposed,
            **({"rows": rows} if rows else {}),
            **({"tied": [*self.twins]} if self.twins else {}),
        }


class Inventory:
    """A model's modules and parameters by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(outside_adapters(model))
        self.layers: dict[str, Weight] = {}  # whether they are fit or not
        self.parameters: dict[str, Weight] = {}
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            kind = kind_of(module)
            if kind is not None:
                self.layers[name] = Weight(module, kind)
            for key, parameter in module._parameters.items():
                if parameter is not None and not (kind is not None and key == "weight"):
                    self.parameters[f"{name}.{key}".lstrip(".")] = Weight(module, "parameter", key)
        self.owners = Owners(self.modules)

    def get(self, name: str) -> Weight | None:
        """Return the weight of a name, or of another name of the same layer, if there is one."""
        found = self.layers.get(name) or self.parameters.get(name)
        if found is not None or name in self.modules:
            return found
        module = submodule(self.model, name)
        return next((own for own in self.layers.values() if own.module is module), None)

    def names(self, named: Iterable[str]) -> list[str]:
        """Return names in the model's order."""
        wanted = set(named)
        return [name for name in [*self.modules, *self.parameters] if name in wanted]

    def above(self, name: str) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Return the modules above a name, nearest first, and the rest of the name from each."""
        parts = name.split(".") if name else []
        found = []
        for count in range(len(parts) - 1, -1, -1):
            module = self.modules.get(".".join(parts[:count]))
            if module is not None:
                found.append((module, tuple(parts[count:])))
        return found


def complete(selection: Selection, held: Inventory, tied: str) -> None:
    """Find what reads the weights, and who else has them."""
    taken: dict[int, str] = {}
    for name, weight in list(selection.weights.items()):
        layer = name.rpartition(".")[0] if name in selection.rows else name
        whose = [layer]
        if tied == "once" and name not in selection.rows:
            memory = id(weight.parameter)
            if memory in taken:
                del selection.weights[name]
                selection.left_out[name] = f"is {taken[memory]!r}, which is adapted once for both"
                continue
            taken[memory] = name
            others = held.owners.others(weight.module, weight.key)
            if others:
                selection.twins[name] = [_twin(held, weight, other) for other in others]
                whose += others
        found = {r: with_bias for each in whose for r, with_bias in _readers(held, each).items()}
        selection.readers[name] = list(found)
        if not all(found.values()) or (weight.key == "weight" and ignores_bias(weight.module)):
            selection.without_bias.add(name)
        shared = weight.bias is not None and held.owners.others(weight.module, "bias")
        if shared or selection.twins.get(name):
            selection.shared_bias.add(name)
        above = held.above(layer)
        # A list chooses among its items, and is not called.
        if above and not isinstance(above[0][0], (nn.ModuleList, nn.ModuleDict)):
            selection.parents[name] = above[0][0]


def _twin(held: Inventory, weight: Weight, other: str) -> Weight:
    """Return a parameter in another module, under the name of the parameter there."""
    path, _, key = other.rpartition(".")
    found = held.layers.get(path) if key == "weight" else None
    if found is None or found.parameter is not weight.parameter or found.shape != weight.shape:
        raise ValueError(
            f"tied='once' must have one parameter that layers read alike: {other!r} is no weight "
            "of a layer, or another Parameter over the same memory, or is read otherwise"
        )
    return found


def _readers(held: Inventory, name: str) -> dict[nn.Module, bool]:
    """Return what reads a weight, and whether it reads the layer's bias too."""
    weight = held.get(name)
    if weight is None:  # under its parameter's name
        name = name.rpartition(".")[0]
        weight = held.layers[name]
    found = {weight.module: False} if weight.kind == "parameter" else {}
    leaf = () if weight.kind == "parameter" else (weight.key,)
    for module, path in held.above(name):
        # It only asks whether its layers are alike.
        if type(module) is nn.TransformerEncoder or module in found:
            continue
        own = (*path, *leaf)
        of_bias = is_read(module, (*own[:-1], "bias"))
        if is_read(module, own) or (of_bias and weight.bias is not None):
            found[module] = of_bias
    return found
