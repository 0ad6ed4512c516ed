"""`Supernet`: an adapter that holds all configurations of a space, trained together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from superlora.checks import check_count
from superlora.design.supports import OPERATIONS, Supports
from superlora.errors import AdapterError, some
from superlora.plan import Plan
from superlora.presets.operations import support
from superlora.random import check_seed
from superlora.search.extract import supports_of
from superlora.search.options import check_known, check_names
from superlora.search.space import Configuration, Option, Space
from superlora.torch.adapter import Adapter
from superlora.torch.attach import (
    attach,
    check_free,
    check_operations,
    checked_model,
    host_of,
    register,
)
from superlora.torch.blocks import Blocks
from superlora.torch.files.load import read_adapter
from superlora.torch.files.state import SUPERNET, valid_header
from superlora.torch.replaced import Also, Replaced, with_also
from superlora.torch.selection import Selection
from superlora.torch.site import Site
from superlora.torch.start import initial
from superlora.torch.support import Support
from superlora.torch.targets import ALL_LINEAR, Targets, find_targets


class Supernet(Adapter):
    """Support tensors of all configurations of a space, nested in one adapter.

    Making one adapts the model; until `draw` or `use` chooses a configuration its forward is
    refused. With the tensors as they are at the start its output stays bit for bit the base's.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with ``Linear`` layers, or GPT-2's ``Conv1D``. Its parameters are frozen; their
        names and the modules' classes stay as they are.
    targets : sequence of str, str or callable
        The layers, as in `superlora.torch.attach`.
    ranks : sequence of int
        The ranks of the space; the largest is stored, the others are its leading part.
    operations : mapping of str to sequence of option, optional
        The merge operations and what each may be, as in `Space`; all of GLoRA by default.
    also : sequence of str, str or callable, optional
        Parameters of the model that train with it, as in `superlora.torch.attach`.
    name : str
        The attribute of `model` under which the supernet is registered.
    seed : int
        Of the initial tensors and of the configurations drawn, in [0, 2**64).
    dtype : torch.dtype, optional
        The tensors' dtype; by default the weights', float32 for half precision.

    Attributes
    ----------
    space : Space
        The configurations.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name.
    TypeError, ValueError
        If the targets, the ranks or the weights do not fit; nothing is changed then.

    See Also
    --------
    superlora.torch.Adapter : `merge`, `delta`, `deltas`, `gains_bias` and `disabled` are those of
        the configuration in force; `plan`, `num_parameters`, `factors` and `save` of all that is
        stored.

    Notes
    -----
    GLoRA's supernet ([1]_). For a layer of output width o and input width i, with the largest
    rank r::

        W = W₀ + W₀ ∘ A + B                A, B: left (o, r), right (i, r)
        b = b₀ + b₀ ∘ D + E + W₀ C         C: left (i, r), right (1, r)     D, E: left (o,)

    Rank q is ``left[:, :q] @ right[:, :q].T``, a vector is ``left[:, 0]``, a constant
    ``left[0, 0]``, repeated to the support's shape: what one configuration learns, all others
    that read the same numbers have. The left factors start at zero.

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
        also: Also | None = None,
        name: str = "supernet",
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        model = checked_model(model)
        check_seed(seed)
        selection = find_targets(model, targets)
        modules = selection.weights
        _check_linear(selection)
        shapes = {layer: weight.shape for layer, weight in modules.items()}
        bare = [layer for layer, weight in modules.items() if Site.bias_below(weight) is None]
        space = Space(shapes, ranks, operations, tuple(bare))  # type: ignore[arg-type]
        plan = Plan(_stored(space), shapes)
        check_operations(plan, selection)
        check_free(model, host_of(model, modules), name)
        replaced = with_also(model, also, modules.values())
        super().__init__(plan, initial(plan, modules, seed, dtype), name)
        self.space, self._seed = space, seed
        self._configuration: dict[str, dict[str, Option]] | None = None
        # Of each option of a layer's operation that was chosen so far.
        self._options: dict[tuple[str, str, Option], Support] = {}
        register(model, self, selection, replaced)

    def _prepared(self) -> dict[str, Support]:
        return {}  # `supports` has those of the configuration in force

    def __repr__(self) -> str:
        # The tensors are too many to list.
        return (
            f"Supernet({len(self.space.layers)} layers, ranks={self.space.ranks}, "
            f"{self.num_parameters:,} parameters)"
        )

    @property
    def seed(self) -> int:
        """As given."""
        return self._seed

    @property
    def configuration(self) -> Configuration | None:
        """A copy of the configuration in force; None until one is chosen."""
        own = self._configuration
        return None if own is None else {layer: dict(options) for layer, options in own.items()}

    def sample(self, step: int) -> Configuration:
        """Return the configuration of a training step, without choosing it.

        Parameters
        ----------
        step : int
            In [0, 2**64).

        Returns
        -------
        Configuration
            Uniform over the space; the same for the same seed, step and space.

        Raises
        ------
        TypeError
            If `step` is no integer.
        ValueError
            If it is out of that range.
        """
        if check_count("step", step, least=0) >= 1 << 64:
            raise ValueError(f"step must be below 2**64: got {step}")
        # Of another counter than the initial tensors, which take the seed's streams as well.
        philox = numpy.random.Philox(
            key=numpy.array([self.seed, step], dtype=numpy.uint64),
            counter=numpy.array([0, 0, 0, 1], dtype=numpy.uint64),
        )
        return self.space.sample(numpy.random.Generator(philox))

    def draw(self, step: int) -> Configuration:
        """Choose the configuration of a training step, until another one is chosen.

        Parameters
        ----------
        step : int
            In [0, 2**64); no two steps of a run should have the same.

        Returns
        -------
        Configuration
            What `sample` gives.

        Raises
        ------
        AdapterError
            If the supernet is on no model, or is merged.
        """
        found = self.sample(step)
        self.use(found)
        return found

    def use(self, configuration: Configuration | None) -> None:
        """Choose a configuration, until another one is chosen.

        Parameters
        ----------
        configuration : Configuration or None
            One of the space; None to choose none.

        Raises
        ------
        AdapterError
            If the supernet is on no model, or is merged.
        TypeError, ValueError
            If it is none of the space.
        """
        if configuration is not None:
            self.space.check(configuration)
            self._check_attached("given a configuration")
        if self.merged:
            raise AdapterError(
                f"supernet {self.name!r} must be unmerged to be given another configuration"
            )
        self._choose(configuration)

    def _choose(self, configuration: Configuration | None) -> None:
        self.supports, self._configuration = {}, None
        if configuration is not None:
            # What is done to the caller's own afterwards must not pass unseen.
            self._configuration = {layer: dict(own) for layer, own in configuration.items()}
        for layer, site in self._sites.items():
            site.links[self].supports = self._supports_of(layer)

    @contextmanager
    def using(self, configuration: Configuration) -> Iterator[None]:
        """Choose a configuration inside a ``with`` block, which may merge it.

        Parameters
        ----------
        configuration : Configuration
            One of the space.

        Yields
        ------
        None
            Nothing.
        """
        before = self.configuration
        self.use(configuration)
        try:
            yield
        finally:
            if self.merged:
                self.unmerge()
            self._choose(before)

    def options(self, layer: str) -> Mapping[str, Option]:
        """Return the options of one layer in the configuration in force.

        Parameters
        ----------
        layer : str
            Its dotted name.

        Returns
        -------
        mapping of str to option
            By operation.

        Raises
        ------
        AdapterError
            If none was chosen.
        ValueError
            If there is no such layer.
        """
        check_known("layer", layer, self.space.layers)
        return dict(self._check_chosen()[layer])

    def _check_chosen(self) -> dict[str, dict[str, Option]]:
        if self._configuration is None:
            raise AdapterError(
                f"supernet {self.name!r} must have a configuration: call draw(step) at every "
                "training step, or use(configuration) to evaluate one"
            )
        return self._configuration

    def stored(self, layer: str) -> dict[str, tuple[nn.Parameter, ...]]:
        """Return the parameters that are stored for one layer.

        Parameters
        ----------
        layer : str
            Its dotted name.

        Returns
        -------
        dict of str to tuple of torch.nn.Parameter
            By operation: left (height, r) and right (width, r) of a support (height, width), or
            one vector where the operation has no rank.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        check_known("layer", layer, self.space.layers)
        return {
            operation: tuple(map(self.get_parameter, self.plan.blocks_of(name)))
            for operation, name in self.plan.layout.supports.get(layer, {}).items()
        }

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
            If the supernet is not attached, or is merged, or cannot be detached, or `name` is in
            use.
        TypeError, ValueError
            If the configuration is none of the space, or has no support at all.
        """
        self._check_attached("extracted from")
        self.space.check(configuration)
        (model, host), selection = self._homes, self._selection
        layers = self.space.layers
        designs = supports_of(configuration)
        if name != self.name:
            check_free(model, host, name)
        held = self.replaced
        values = {} if held is None else held.tensors()
        checked_model(model)
        self.detach()
        try:
            adapter = attach(
                model,
                designs,
                lambda layer, _: layer in layers,
                also=None if held is None else held.every,
                name=name,
                dtype=self.dtype,
            )
        except BaseException:
            register(model, self, selection, held and Replaced(model, values, held.shared))
            raise
        _give(adapter, values)
        with torch.no_grad():
            for layer, options in configuration.items():
                for operation, option in options.items():
                    if option == "none":
                        continue
                    own = self._support(layer, operation, option).blocks
                    names = adapter.plan.blocks_of(f"{operation}.{layer}")
                    for block, value in zip(names, own.values(), strict=True):
                        adapter.blocks[block].copy_(value)
        adapter.scale, adapter.applied = self.scale, self.applied
        return adapter

    @staticmethod
    def load(
        model: nn.Module,
        path: str | Path,
        *,
        name: str = "supernet",
        allow_nonfinite: bool = False,
    ) -> Supernet:
        """Put a saved supernet on a model.

        Parameters
        ----------
        model : torch.nn.Module
            A model with layers of the names and shapes that the file gives.
        path : str or pathlib.Path
            A file that `save` wrote.
        name : str
            The attribute of `model` under which the supernet is registered.
        allow_nonfinite : bool
            Read NaN and infinity too, which are refused else.

        Returns
        -------
        Supernet
            With the very tensors that were saved, on the layers' devices, and no configuration.

        Raises
        ------
        AdapterError
            If `model` has an attribute of that name, or a weight lies on the meta device.
        FileNotFoundError
            If there is no such file.
        TypeError
            If a weight is not of a floating-point type.
        ValueError
            If the file is truncated, not a supernet's, of another format version, for other
            layers or ranks, or has missing or extra tensors; the model is as it was.
        """
        path = Path(path)
        read = read_adapter(model, path, name, allow_nonfinite)
        header = read.description.supernet
        if header is None:
            raise ValueError(f"{path} must be a supernet's: superlora.torch.load reads it")
        with valid_header(path):
            check_names("supernet", header, ("seed", "space"))
            space, seed = Space.from_dict(header["space"]), check_seed(header["seed"])
            stored = _stored(space)
        if stored != read.plan.spec or dict(space.layers) != read.plan.layout.layers:
            raise ValueError(f"{path} must hold the tensors of its space: it has another design")
        held = read.selection.weights
        bare = [name for name, weight in held.items() if Site.bias_below(weight) is None]
        ordered = list(find_targets(model, lambda layer, _: layer in space.layers).weights)
        for what, expected, found in (
            ("the layers", list(space.layers), ordered),
            ("layers without a bias", list(space.without_bias), bare),
        ):
            if expected != found:
                raise ValueError(
                    f"the model must have {what} of {path} in their order: expected "
                    f"{some(map(repr, expected)) or 'none'}, got {some(map(repr, found)) or 'none'}"
                )
        supernet = Supernet(
            model,
            lambda layer, _: layer in space.layers,
            space.ranks,
            operations=dict(space.operations),
            name=name,
            seed=seed,
            dtype=next(iter(read.blocks.values())).dtype,
            also=None if read.replaced is None else read.replaced.every,
        )
        _give(supernet, {} if read.replaced is None else read.replaced.tensors())
        with torch.no_grad():
            for block, value in read.blocks.items():
                supernet.blocks[block].copy_(value)
        supernet.scale = read.description.scale
        return supernet

    @property
    def _beside(self) -> dict[str, Any]:
        return {SUPERNET: {"seed": self.seed, "space": self.space.to_dict()}}

    def delta(self, name: str) -> Tensor:
        """Form one support tensor of the configuration in force."""
        self._check_chosen()
        return super().delta(name)

    def deltas(self) -> dict[str, Tensor]:
        """Form the support tensors of the configuration in force."""
        self._check_chosen()
        return super().deltas()

    def _supports_of(self, layer: str) -> Iterable[Support]:
        if self._configuration is None:
            return _Unchosen(self)
        options = self._configuration[layer]
        chosen = [o for o in OPERATIONS if options.get(o, "none") != "none"]
        found = [self._support(layer, operation, options[operation]) for operation in chosen]
        self.supports |= {own.name: own for own in found}
        return tuple(found)

    def _support(self, layer: str, operation: str, option: Option) -> Support:
        """Return what is prepared for an option: a support whose blocks are parts of the stored."""
        key = (layer, operation, option)
        if key not in self._options:
            plan = Plan({operation: support(operation, option)}, {layer: self.space.layers[layer]})
            stored = self.plan.blocks_of(f"{operation}.{layer}")
            names = plan.blocks_of(f"{operation}.{layer}")
            places = {}
            for name, block in zip(names, stored, strict=False):  # a vector is of the left alone
                whole = self.plan.layout.block_shapes[block]
                part = _part(option, len(whole))
                places[name] = self.blocks.places[block]._replace(part=part)
            own = Blocks(plan, places, whole=self.blocks)
            self._options[key] = Support(own, f"{operation}.{layer}")
        return self._options[key]


@torch.no_grad()
def _give(adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Let parameters of the model that train with an adapter have values."""
    own = {} if adapter.replaced is None else adapter.replaced.tensors()
    for name, value in values.items():
        own[name].copy_(value)


def _check_linear(selection: Selection) -> None:
    """Refuse layers whose weight is none that all operations take."""
    unfit = [n for n, w in selection.weights.items() if not w.linear or not w.summable]
    if unfit or selection.rows or selection.designs:
        kinds = sorted({type(selection.weights[name].module).__name__ for name in unfit})
        raise ValueError(
            f"targets must match Linear or Conv1D layers: got {some(map(repr, unfit))} of type "
            f"{', '.join(kinds) or 'rows, or with designs'}"
        )


def _part(option: Option, axes: int) -> tuple[slice | int, ...]:
    """Return the part of a stored factor, (height, r), or vector that an option reads."""
    if option == "vector":
        return (slice(None), 0)[:axes]
    if option == "constant":
        return (slice(1), 0)[:axes]
    assert isinstance(option, int)
    return (slice(None), slice(option))


def _stored(space: Space) -> Supports:
    """Return the designs of the largest options, of which all others are parts."""
    largest = {
        layer: {name: space.options(layer, name)[0] for name in space.operations}
        for layer in space.layers
    }
    if {option for own in largest.values() for option in own.values()} == {"none"}:
        raise ValueError("operations must have an option that is not 'none': got no other")
    return supports_of(largest)


class _Unchosen:
    """The support tensors of a supernet that has no configuration: an error."""

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet

    def __iter__(self) -> Iterator[Support]:
        self.supernet._check_chosen()
        return iter(())
