"""`Supernet`: all configurations of a space in one set of nested tensors, trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.random import check_seed
from superlora.search.extract import supports_of
from superlora.search.options import check_known
from superlora.search.space import Configuration, Option, Space
from superlora.search.supernet_checks import check_alone, dtype_of
from superlora.search.supernet_choice import Choice
from superlora.search.supernet_site import SupernetSite
from superlora.search.supernet_storage import LEFT, RIGHT, Stored, initial, parts, stored_shapes
from superlora.torch.adapter import Adapter, adapters_of
from superlora.torch.attach import attach, check_free, check_model, host_of
from superlora.torch.layers import bias_of, parameter_of, shape_of
from superlora.torch.targets import ALL_LINEAR, Targets, find_targets
from superlora.torch.walk import Frozen, freeze, release


class Supernet(Choice, nn.Module):
    """Support tensors of all configurations of a space, nested in one storage, on a model.

    Making one adapts the model; until `draw` or `use` chooses a configuration its forward is
    refused. With the tensors as they are at the start its output stays bit for bit what it was.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with ``Linear`` layers, or GPT-2's ``Conv1D``. Its parameters are frozen; their
        names and the modules' classes stay as they are.
    targets : sequence of str, str or callable
        Names or suffixes of layers, a regular expression for whole names, ``"all-linear"``, or
        ``predicate(name, module) -> bool``.
    ranks : sequence of int
        The ranks of the space; the largest is stored, the others are its leading part.
    operations : mapping of str to sequence of option, optional
        The merge operations and what each may be, as in `Space`; all of GLoRA by default.
    name : str
        The attribute of `model` under which the supernet is registered; of its first adapted
        layer, where `model` is a ``Sequential`` or a ``ModuleList``.
    seed : int
        Of the initial tensors and of the configurations drawn, in [0, 2**64).
    dtype : torch.dtype, optional
        The tensors' dtype; by default the weights', float32 for half precision.

    Attributes
    ----------
    space : Space
        The configurations.
    name : str
        As given.
    seed : int
        As given.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name, or an adapter or another supernet, or a weight
        lies on the meta device.
    TypeError, ValueError
        If the targets, the ranks or the weights do not fit; nothing is changed then.

    Notes
    -----
    GLoRA's supernet, as its released code has it ([1]_). For a layer of output width o and input
    width i, with the largest rank r::

        W = W₀ + W₀ ∘ A + B                A, B: left (o, r), right (r, i)
        b = b₀ + b₀ ∘ D + E + W₀ C         C: left (i, r), right (r, 1)     D, E: left (o, 1)

    Rank q is ``left[:, :q] @ right[:q]``, a vector is ``left[:, :1]``, a constant ``left[0, 0]``,
    repeated to the support's shape: what one configuration learns, all others that read the same
    numbers have. The left factors start at zero, the right ones uniform (Xavier).

    One step, whatever the number of forward and backward passes in it, has one configuration::

        for step, (x, y) in enumerate(batches):
            supernet.draw(step)
            loss(model(x), y).backward()
            optimizer.step(), optimizer.zero_grad()

    A step whose configuration is ``"none"`` everywhere has nothing to train: skip its backward
    pass, which torch refuses. The configuration depends on the seed and the step alone, so that
    all processes of a distributed run draw the same. A tensor that a configuration does not read
    has no gradient: wrap the model in
    ``DistributedDataParallel(model, find_unused_parameters=True)``. Columns that a rank leaves
    out have one of zeros, so that momentum and weight decay still move them. The configuration
    must stay until the backward pass has ended where activations are checkpointed.

    Without gradients, and under a configuration chosen by `use`, a layer's updated weight is
    formed once and kept until a tensor, the weight or the configuration changes or gradients are
    enabled; changes through ``tensor.data`` are not seen before that.

    References
    ----------
    .. [1] A. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient
       Fine-tuning", 2023.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> supernet = Supernet(model, ["0"], ranks=(4, 2), seed=1)
    >>> supernet.num_parameters, supernet.space.size
    (160, 900)
    >>> drawn = supernet.draw(step=0)
    >>> model(torch.ones(1, 8)).sum().backward()
    >>> lora = supernet.space.fixed(add_weight=4)
    >>> with torch.no_grad(), supernet.using(lora):
    ...     model(torch.ones(1, 8)).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets = ALL_LINEAR,
        ranks: Sequence[int] = (8, 4),
        *,
        operations: Mapping[str, Sequence[Option]] | None = None,
        name: str = "supernet",
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        check_seed(seed)
        modules = find_targets(model, targets)
        present = [part.name for part in model.modules() if isinstance(part, Supernet)]
        check_alone(model, modules, present)
        check_free(model, host_of(model, modules), name)
        dtype = dtype_of(modules, dtype)
        shapes = {layer: shape_of(module) for layer, module in modules.items()}
        bare = [layer for layer, module in modules.items() if bias_of(module) is None]
        self.space = Space(shapes, ranks, operations, tuple(bare))  # type: ignore[arg-type]
        if not stored_shapes(self.space):
            raise ValueError("operations must have an option that is not 'none': got no other")
        self.name, self.seed = name, seed
        self._layers = {layer: str(index) for index, layer in enumerate(modules)}
        # Whatever contexts we are called in, the tensors hold values and can be trained.
        with torch.device("cpu"), torch.inference_mode(False):
            for (layer, operation, side), values in initial(self.space, seed):
                device = parameter_of(modules[layer]).device
                tensor = torch.from_numpy(values).to(device, dtype)
                self._add(layer, operation).register_parameter(side, nn.Parameter(tensor))
        self._sites: dict[str, SupernetSite] = {}
        # The model, and the module of it that registers this one; in a tuple, or torch would
        # make them submodules of their own part.
        self._homes: tuple[nn.Module, ...] = ()
        self._frozen: Frozen = []
        self._attach(model, modules)

    def _add(self, layer: str, operation: str) -> nn.Module:
        owner: nn.Module = self
        for key in (self._layers[layer], operation):
            if key not in owner._modules:
                owner.add_module(key, nn.Module())
            owner = owner.get_submodule(key)
        return owner

    def _attach(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.train(model.training)
        self._frozen = freeze(model)
        host = host_of(model, modules)
        for layer, module in modules.items():
            self._sites[layer] = SupernetSite(module, layer, self)
            module.forward = self._sites[layer]
        self._homes = (model, host)
        host.add_module(self.name, self)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, for a model that calls all its children: the layers do the work."""
        return x

    def __repr__(self) -> str:
        # The tensors are too many to list.
        return (
            f"Supernet({len(self._layers)} layers, ranks={self.space.ranks}, "
            f"{self.num_parameters:,} parameters)"
        )

    @property
    def num_parameters(self) -> int:
        """Entries of all that is stored; ``space.num_parameters`` counts a configuration's."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The tensors' dtype."""
        return next(self.parameters()).dtype

    @property
    def attached(self) -> bool:
        """Whether the supernet is on a model."""
        return bool(self._homes)

    def layers(self) -> dict[str, nn.Module]:
        """Return the adapted layers.

        Returns
        -------
        dict of str to torch.nn.Module
            By dotted name, in the model's order.
        """
        return {layer: site.module for layer, site in self._sites.items()}

    def stored(self, layer: str) -> dict[str, Stored]:
        """Return what is stored for one layer.

        Parameters
        ----------
        layer : str
            Its dotted name.

        Returns
        -------
        dict of str to (torch.nn.Parameter, torch.nn.Parameter or None)
            The parameters themselves by operation, left and right; no right one for a vector.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        check_known("layer", layer, self._layers)
        owner = self._modules.get(self._layers[layer])  # none, if all its options are "none"
        found: dict[str, Stored] = {}
        for operation, support in {} if owner is None else owner._modules.items():
            assert support is not None
            left = support._parameters[LEFT]
            assert left is not None
            found[operation] = (left, support._parameters.get(RIGHT))
        return found

    def extract(self, configuration: Configuration, *, name: str = "superlora") -> Adapter:
        """Put an ordinary adapter of a configuration in the supernet's place, as it was trained.

        Parameters
        ----------
        configuration : Configuration
            One of the space.
        name : str
            The attribute of the model under which the adapter is registered.

        Returns
        -------
        Adapter
            Of as many parameters as the configuration, and with copies of their values; it can be
            trained on, saved and merged. The supernet is detached.

        Raises
        ------
        AdapterError
            If the supernet is not attached, or cannot be detached, or `name` is in use.
        KeyError, TypeError, ValueError
            If the configuration is none of the space, or has no support at all.
        """
        self._check_detachable("extracted from")
        self.space.check(configuration)
        model, host = self._homes
        modules = self.layers()
        designs = supports_of(configuration)
        if name != self.name:
            check_free(model, host, name)
        self.detach()
        try:
            adapter = attach(
                model, designs, lambda layer, _: layer in modules, name=name, dtype=self.dtype
            )
        except BaseException:
            self._attach(model, modules)
            raise
        self._copy_to(adapter, configuration)
        return adapter

    @torch.no_grad()
    def _copy_to(self, adapter: Adapter, configuration: Configuration) -> None:
        blocks = adapter.factors()
        for layer, options in configuration.items():
            stored = self.stored(layer)
            for operation, option in options.items():
                if option == "none":
                    continue
                left, *right = parts(option, stored[operation])
                values = (left, *(each.t() for each in right))
                names = adapter.plan.blocks_of(f"{operation}.{layer}")
                for block, value in zip(names, values, strict=True):
                    blocks[block].copy_(value.reshape(blocks[block].shape))

    def detach(self) -> None:
        """Take the supernet off the model, which is then as it was before.

        Raises
        ------
        AdapterError
            If it is not attached, or an adapter was attached after it, or another library has
            wrapped a layer's forward since.
        """
        self._check_detachable("detached")
        _, host = self._homes
        for site in self._sites.values():
            del site.module.__dict__["forward"]
        del host._modules[self.name]
        release(self._frozen, [])
        self._sites, self._homes, self._frozen = {}, (), []

    def _check_detachable(self, what: str) -> None:
        if not self.attached:
            raise AdapterError(f"supernet {self.name!r} must be attached to be {what}")
        adapters = [adapter.name for adapter in adapters_of(self._homes[0])]
        if adapters:
            raise AdapterError(
                f"supernet {self.name!r} must be the last on its model to be {what}: detach "
                f"{some(map(repr, adapters))} first"
            )
        wrapped = [
            layer
            for layer, site in self._sites.items()
            if site.module.__dict__.get("forward") is not site
        ]
        if wrapped:
            raise AdapterError(
                f"supernet {self.name!r} cannot be {what} while the forward of {wrapped[0]!r} is "
                "wrapped by something attached later: remove that first"
            )

    def save(self, path: str | Path) -> None:
        """Write the supernet to a safetensors file, atomically.

        Parameters
        ----------
        path : str or pathlib.Path
            The file; replaced if it exists, and left as it was if writing fails.

        Notes
        -----
        Every tensor is stored once, beside the space with the layers' names and shapes, the seed
        and a format version.
        """
        from superlora.search.supernet_files import save_supernet

        save_supernet(self, Path(path))

    @staticmethod
    def load(model: nn.Module, path: str | Path, *, name: str = "supernet") -> Supernet:
        """Put a saved supernet on a model.

        Parameters
        ----------
        model : torch.nn.Module
            A model with layers of the names and shapes that the file gives.
        path : str or pathlib.Path
            A file that `save` wrote.
        name : str
            The attribute of `model` under which the supernet is registered.

        Returns
        -------
        Supernet
            With the very tensors that were saved, on the layers' devices, and no configuration.

        Raises
        ------
        AdapterError
            As for a new one.
        FileNotFoundError
            If there is no such file.
        TypeError, ValueError
            If the file is truncated, not a supernet's, of another format version, for other
            layers or ranks, or has missing or extra tensors; the model is as it was.
        """
        from superlora.search.supernet_files import load_supernet

        return load_supernet(model, Path(path), name)
