"""`Adapter`: the trainable factors of a plan, as one module registered on the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError
from superlora.plan import Plan
from superlora.reconstruct import apply_factored, weight_delta
from superlora.torch.layers import parameter_of
from superlora.torch.site import Site


class Adapter(nn.Module):
    """The factors of a plan, attached to a model's layers.

    Made by `attach` and `load`. Its parameters are named like the plan's factors,
    ``"group.split.block"``; only they are trained.

    Parameters
    ----------
    plan : Plan
        What lies where; its weights are named like the adapted layers.
    factors : mapping of str to torch.Tensor
        One tensor for each of ``plan.factor_shapes``.
    name : str
        The attribute of the model under which the adapter is registered.

    Attributes
    ----------
    plan : Plan
        As given.
    name : str
        As given.
    merged : bool
        Whether the weights hold the update.
    """

    def __init__(self, plan: Plan, factors: Mapping[str, Tensor], name: str = "superlora") -> None:
        super().__init__()
        self.plan = plan
        self.name = name
        self.merged = False
        self._enabled = True
        self._scale = plan.scale
        self._blocks = {weight: plan.blocks_of(weight) for weight in plan.shapes}
        self._sites: dict[str, Site] = {}
        # The model, and the module of it that registers this one; in a tuple, or
        # torch would make them submodules of their own part.
        self._homes: tuple[nn.Module, ...] = ()
        self._frozen: list[nn.Parameter] = []
        for block, shape in plan.factor_shapes.items():
            factor = factors[block]
            if tuple(factor.shape) != shape:
                raise ValueError(
                    f"factors[{block!r}] must have shape {shape}: got {tuple(factor.shape)}"
                )
            *path, leaf = block.split(".")
            owner: nn.Module = self
            for key in path:
                if key not in owner._modules:
                    owner.add_module(key, nn.Module())
                owner = owner.get_submodule(key)
            owner.register_parameter(leaf, nn.Parameter(factor))

    def extra_repr(self) -> str:
        """Return the counts for ``repr``; the factors are too many to list."""
        return f"{self.plan!r}, scale={self.scale}"

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all factors."""
        return self.plan.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return next(self.parameters()).dtype

    @property
    def active(self) -> bool:
        """Whether the layers' forward adds the update."""
        return self._enabled and not self.merged

    @property
    def scale(self) -> float:
        """The number in front of ΔW, used in forward, merge and export alike."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self.merged:
            raise AdapterError("scale must be set on an unmerged adapter: call unmerge() first")
        self._scale = self.plan.spec.replace(alpha=None, scale=value).scaling

    def factors(self) -> dict[str, nn.Parameter]:
        """Return all factors by name, the form that ``Plan`` takes.

        Returns
        -------
        dict of str to torch.nn.Parameter
            The parameters themselves.
        """
        return {block: self._factor(block) for block in self.plan.factor_shapes}

    def delta(self, name: str) -> Tensor:
        """Form one layer's update.

        Parameters
        ----------
        name : str
            The layer's dotted name.

        Returns
        -------
        torch.Tensor, (output width, input width)
            ``scale * ΔW``, differentiable.

        Raises
        ------
        KeyError
            If the adapter has no layer of that name.
        """
        self.plan.blocks_of(name)  # names the layers there are, if this is none
        device = self._factor(self._blocks[name][0]).device
        return self.form(name, self.blocks(name, device))

    def deltas(self) -> dict[str, Tensor]:
        """Form the updates of all layers.

        Returns
        -------
        dict of str to torch.Tensor
            ``scale * ΔW`` for each layer, (output width, input width).
        """
        return {name: self.delta(name) for name in self.plan.shapes}

    def blocks(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """Return the factors that one layer's update is made of, on `device`."""
        return {block: self._factor(block).to(device) for block in self._blocks[name]}

    def form(self, name: str, factors: Mapping[str, Tensor]) -> Tensor:
        """Form one layer's update from the factors given, with this adapter's scale."""
        delta: Tensor = weight_delta(self.plan.layout, factors, name, self._scale)
        return delta

    def applies_factored(self, name: str) -> bool:
        """Return whether the layer's update is applied without being formed."""
        return self.plan.layout.applies_factored(name)

    def apply_factored(self, name: str, x: Tensor) -> Tensor:
        """Multiply by one layer's update without forming it."""
        factors = self.blocks(name, x.device)
        dtype = next(iter(factors.values())).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        y: Tensor = apply_factored(self.plan.layout, factors, name, x, self._scale)
        return y

    def _factor(self, block: str) -> nn.Parameter:
        group, split, leaf = block.split(".")
        owner = self._modules[group]._modules[split]  # type: ignore[union-attr]
        return owner._parameters[leaf]  # type: ignore[union-attr, return-value]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model compute as if the adapter were not there, inside a ``with`` block.

        Works merged too: the weights are restored for the block and merged again.

        Yields
        ------
        None
            Nothing.
        """
        enabled, merged = self._enabled, self.merged
        self._enabled = False
        if merged:
            self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()
            self._enabled = enabled

    def merge(self) -> None:
        """Add every update to its weight, so that the model costs what its base does.

        The weights' own values are kept; `unmerge` restores them bit for bit. One
        weight is formed at a time. If any cannot be merged, none is.

        Raises
        ------
        AdapterError
            If the adapter is merged already or not attached, or a weight lies on
            the meta device.
        ValueError
            If an update is not finite.
        """
        self._check_attached("merged")
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} is merged already")
        empty = [name for name, site in self._sites.items() if parameter_of(site.module).is_meta]
        if empty:
            raise AdapterError(
                f"weights must be loaded to be merged: {len(empty)} lie on the meta device, first "
                f"{empty[0]!r}"
            )
        done: list[Site] = []
        try:
            for site in self._sites.values():
                done.append(site)
                site.merge(self)
        except BaseException:
            for site in done:
                site.unmerge(self)
            raise
        self.merged = True

    def unmerge(self) -> None:
        """Take every update out of its weight, bit for bit.

        Raises
        ------
        AdapterError
            If the adapter is not merged.
        """
        if not self.merged:
            raise AdapterError(f"adapter {self.name!r} must be merged to be unmerged")
        for site in self._sites.values():
            site.unmerge(self)
        self.merged = False

    def detach(self, *, keep_merged: bool = False) -> None:
        """Take the adapter off the model, which is then as it was before `attach`.

        Parameters
        ----------
        keep_merged : bool
            Leave merged weights merged for good; else the adapter must not be
            merged.

        Raises
        ------
        AdapterError
            If the adapter is not attached, or is merged and `keep_merged` is False.
        """
        self._check_attached("detached")
        if self.merged and not keep_merged:
            raise AdapterError(
                f"adapter {self.name!r} is merged: call unmerge() first, or "
                "detach(keep_merged=True) to leave the weights merged"
            )
        model, host = self._homes
        for site in self._sites.values():
            site.remove(self)
        del host._modules[self.name]
        heirs = [other for other in model.modules() if isinstance(other, Adapter)]
        if heirs:
            heirs[0]._frozen += self._frozen
        else:
            for parameter in self._frozen:
                parameter.requires_grad_(True)
        self._sites, self._homes, self._frozen, self.merged = {}, (), [], False

    def save(self, path: str | Path) -> None:
        """Write the adapter to a safetensors file, atomically.

        Parameters
        ----------
        path : str or pathlib.Path
            The file; replaced if it exists, and left as it was if writing fails.

        Notes
        -----
        Every factor is stored once, beside the spec with the scale now in force,
        the ordered names and shapes of the layers, and a format version.
        """
        from superlora.torch.state import save_adapter

        save_adapter(self, Path(path))

    def _check_attached(self, verb: str) -> None:
        if not self._homes:
            raise AdapterError(f"adapter {self.name!r} must be attached to be {verb}")
