"""What an adapter adapts of a model, and what it leaves out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from superlora.errors import some
from superlora.torch.selection import Selection
from superlora.torch.site import Site
from superlora.torch.walk import outside_adapters

# Of a model's entries, below which a warning is given.
_LEAST_SHARE = 0.1


class Summary(dict[str, Any]):
    """What an adapter adapts: a dict that is printed as a table.

    Its keys are ``layers``, a dict of the kind, shape, parameters and ``reached`` of every
    adapted weight; ``left_out``, the reason for each layer that could have been adapted;
    ``parameters``, trainable entries; ``entries``, those of the adapted weights;
    ``model_entries``, of all weights of the model with at least two axes; and ``share``, the one
    in proportion to the other.
    """

    def __str__(self) -> str:
        rows = [("layer", "kind", "shape", "parameters", "reached")]
        for name, own in self["layers"].items():
            shape = " x ".join(map(str, own["shape"]))
            known = {True: "yes", False: "no", None: "not yet"}[own["reached"]]
            rows.append((name, own["kind"], shape, f"{own['parameters']:,}", known))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.append(self._last)
        lines += [f"left out: {name} {why}" for name, why in self["left_out"].items()]
        return "\n".join(lines)

    @property
    def _last(self) -> str:
        return (
            f"{self['parameters']:,} parameters reach {self['share']:.1%} of the model's weights, "
            f"{self['entries']:,} of {self['model_entries']:,} entries"
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(caption=self._last)
        for title in ("layer", "kind", "shape", "parameters", "reached or left out"):
            table.add_column(title)
        for name, own in self["layers"].items():
            known = {True: "yes", False: "no", None: "not yet"}[own["reached"]]
            shape = " x ".join(map(str, own["shape"]))
            table.add_row(name, own["kind"], shape, f"{own['parameters']:,}", known)
        for name, why in self["left_out"].items():
            table.add_row(name, "", "", "", f"left out: {why}", style="dim")
        return table


def summary_of(
    adapter: Any, model: nn.Module, selection: Selection, sites: Mapping[str, Site]
) -> Summary:
    """Return what an adapter adapts of a model."""
    layout = adapter.plan.layout
    shapes, seen = layout.factor_shapes, set()
    layers = {}
    for name, site in sites.items():
        # A factor that weights share counts where it stands first.
        own = [b for s in layout.supports[name].values() for b in layout.inputs_of(s)]
        new = [block for block in dict.fromkeys(own) if block in shapes and block not in seen]
        seen |= set(new)
        layers[name] = {
            "kind": site.held.kind,
            "shape": layout.layer_axes[name].shape,
            "parameters": sum(math.prod(shapes[block]) for block in new),
            "reached": False if site.missed else site.reached,
        }
    entries = sum(layout.layer_axes[name].entries for name in sites)
    every = {
        id(parameter): math.prod(parameter.shape)
        for _, module in outside_adapters(model)
        for parameter in module._parameters.values()
        if parameter is not None and not is_lazy(parameter) and parameter.dim() > 1
    }
    total = sum(every.values())
    return Summary(
        layers=layers,
        left_out=dict(selection.left_out),
        parameters=adapter.num_parameters,
        entries=entries,
        model_entries=total,
        share=min(1.0, entries / total) if total else 1.0,
    )


def warn_of_few(adapter: Any) -> None:
    """Warn where little of a model is adapted."""
    summary = adapter.summary()
    if summary["share"] < _LEAST_SHARE:
        left_out = some(f"{name!r} {why}" for name, why in summary["left_out"].items())
        rest = f"; left out: {left_out}" if left_out else ""
        warnings.warn(
            f"adapter {adapter.name!r} reaches {summary['share']:.1%} of the entries of the "
            f"model's weights{rest}; targets='all' takes convolutions and stacked experts too",
            stacklevel=3,
        )
