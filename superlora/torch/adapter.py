"""`Adapter`: the trainable factors of a plan, as one module registered on the model."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from superlora.design.supports import OPERATIONS
from superlora.errors import AdapterError, some
from superlora.operations import GIVES_BIAS
from superlora.plan import Plan
from superlora.torch.checkpoints import WithoutBase
from superlora.torch.factors import MERGED, Factors
from superlora.torch.files.folder import TENSORS, card_of, file_of, write_beside
from superlora.torch.files.state import save_blocks
from superlora.torch.files.swap import swap_blocks
from superlora.torch.interop.formats import Export
from superlora.torch.interop.to_lycoris import save_lycoris
from superlora.torch.interop.to_peft import save_peft
from superlora.torch.layers import Weight, refuse_empty
from superlora.torch.link import Link
from superlora.torch.reached import (
    ChangeWatch,
    changing,
    check_mergeable,
    check_not_wrapped,
    listed,
)
from superlora.torch.replaced import unsaved
from superlora.torch.selection import Selection
from superlora.torch.sharded import gathered, once, reshard
from superlora.torch.site import Site
from superlora.torch.summary import Summary, summary_of
from superlora.torch.support import Support
from superlora.torch.walk import Frozen, outside_adapters, plain_name, release


class Adapter(Factors):
    """The factors of a plan, attached to a model's layers.

    Made by `attach`, `load`, `from_peft` and `from_lycoris`. Its parameters are named
    like the plan's factors, ``"group.split.block"``. With those of the model that came with it,
    named ``"model."`` and their name there, they are all that is trained.

    Where several processes hold the factors in parts, as under ``fully_shard``, what reads or
    changes them all is a collective: every process must call `save`, `to_peft`, `to_lycoris`,
    `delta`, `deltas`, `merge`, `unmerge`, `swap` and `reset`. One process writes.

    Parameters
    ----------
    plan : Plan
        What lies where; its weights are named like the adapted layers.
    factors : mapping of str to torch.Tensor
        One tensor for each of ``plan.factor_shapes`` and ``plan.frozen_shapes``.
    name : str
        The attribute of the model under which the adapter is registered.

    Attributes
    ----------
    plan, name : Plan and str
        As given.
    blocks : Blocks
        The factors and frozen blocks by name.
    supports : dict of str to Support
        What is prepared for each update, by its name in the plan.
    merged : bool
        Whether the weights hold the update.
    replaced : Replaced or None
        Parameters of the model that train with the adapter, such as a head; `disabled` and
        `detach` put the model's own back.
    dropout : Dropout
        What is left out in training, by the names that `attach` has for it.
    """

    def __init__(self, plan: Plan, factors: Mapping[str, Tensor], name: str = "superlora") -> None:
        super().__init__(plan, factors, name)
        # Norms with running statistics, and how many batches they had seen when it was attached.
        self._batches: dict[str, tuple[nn.Module, int]] = {}
        self._disabled = 0  # how many `disabled` blocks are open
        self._merge_again = False  # when the last of them ends
        self._sites: dict[str, Site] = {}  # by weight; those of rows of one layer are one
        self._twins: list[Site] = []  # the same parameters in other modules
        self._selection = Selection({})
        self._stored_as: dict[str, Any] = {}  # the weights, as a file's header says; kept on detach
        self._watch: ChangeWatch | None = None  # while it is attached
        self._bare: list[str] = []  # layers without the bias that an operation would change
        # The model, and its module that registers this one; a tuple is no submodule.
        self._homes: tuple[nn.Module, ...] = ()
        self._frozen: Frozen = []
        # Before and after the model loads a state dict, and its forward.
        self._hooks: list[RemovableHandle] = []
        self._without_base: WithoutBase | None = None  # while it is alone in checkpoints
        self._order = 0  # of attachment

    def __prepare_scriptable__(self) -> Adapter:
        raise AdapterError(
            f"adapter {self.name!r} must be merged and detached, merge() and "
            "detach(keep_merged=True), before torch.jit.script; torch.jit.trace, torch.export and "
            "torch.compile take an adapted model as it is"
        )

    def __repr__(self) -> str:
        # The factors are too many to list.
        left_out = self._selection.left_out
        rest = f", {len(left_out)} layers left out" if left_out else ""
        return f"Adapter({self.plan!r}, scale={self.scale}{rest})"

    def _settle(self) -> None:
        """Let no engine hold the factors or the weights elsewhere than in the model."""
        super()._settle()
        reshard(site.module for site in self._every)

    @contextmanager
    def _whole_factors(self) -> Iterator[Any]:
        """Let what is written be whole, and give the mesh of the processes that hold it, if any."""
        self._settle()
        own = [(place.owner, place.leaf) for place in self.blocks.places.values()]
        own += [] if self.replaced is None else self.replaced.places
        with torch.no_grad(), gathered(own) as mesh:
            for name, shape in self.plan.layout.input_shapes.items():
                if self.blocks[name].shape != shape:
                    raise AdapterError(
                        f"factors must have the shapes of the plan: {name!r} has "
                        f"{tuple(self.blocks[name].shape)} instead of {shape}, as where "
                        "FullyShardedDataParallel flattens them; use fully_shard"
                    )
            yield mesh

    @property
    def _beside(self) -> dict[str, Any]:
        """What a file's header says beside the design."""
        return {}

    @property
    def _header(self) -> dict[str, Any]:
        dropout = {"dropout": self.dropout.values} if self.dropout.on else {}
        return self._beside | self._stored_as | dropout

    @property
    def attached(self) -> bool:
        """Whether the adapter is on a model."""
        return bool(self._homes)

    @property
    def model(self) -> nn.Module:
        """The model that the adapter is attached to."""
        self._check_attached("asked for its model")
        return self._homes[0]

    def layers(self) -> dict[str, nn.Module]:
        """Return the adapted layers by dotted name, in the plan's order."""
        return {name: site.module for name, site in self._sites.items()}

    def weights(self) -> dict[str, Weight]:
        """Return the adapted weights by dotted name, in the plan's order."""
        return {name: site.held for name, site in self._sites.items()}

    def reached(self) -> dict[str, bool | None]:
        """Return of every adapted layer whether its update took part in a forward pass so far.

        Returns
        -------
        dict of str to (bool or None)
            None where the module that has the layer did not run either, as experts that no token
            was sent to; False where something read the weight without the update. Compiled passes
            are not seen.
        """
        every = self._sites.items()
        return {name: False if site.missed else site.reached for name, site in every}

    def summary(self) -> Summary:
        """Return the adapted layers, those left out and why, and the share of the model.

        Returns
        -------
        Summary
            A dict; printed it is a table.

        Raises
        ------
        AdapterError
            If the adapter is not attached.
        """
        self._check_attached("summarised")
        return summary_of(self, self.model, self._selection, self._sites)

    @property
    def gains_bias(self) -> list[str]:
        """The layers without a bias that have one while the adapter is merged."""
        return [
            name
            for name, site in self._sites.items()
            if site.own_bias is None
            and not GIVES_BIAS.isdisjoint([own.operation for own in site.links[self].supports])
        ]

    @property
    def active(self) -> bool:
        """Whether the layers' forward adds the update."""
        return not self._disabled and not self.merged

    @property
    def alone_in_checkpoints(self) -> bool:
        """Whether the model's state dict holds adapters and what trains with them alone.

        It can be set. A training loop then writes checkpoints without the base; a model with the
        same adapter loads them, also with ``strict=True``, and keeps its base.
        """
        return self._without_base is not None

    @alone_in_checkpoints.setter
    def alone_in_checkpoints(self, value: bool) -> None:
        self._check_attached("alone in checkpoints")
        if self._without_base is not None:
            self._without_base.remove()
            self._without_base = None
        if value:
            self._without_base = WithoutBase(self._homes[0], self._kept)

    def _kept(self) -> tuple[tuple[str, ...], set[str]]:
        """Return how the names of what adapters hold begin, and those of what trains with them."""
        adapters = registered(self._homes[0])
        names: set[str] = set()
        for adapter in adapters:
            if adapter.replaced is not None:
                names |= set(adapter.replaced.every)
        return tuple(f"{plain_name(name)}." for name in adapters.values()), names

    def _link(self, model: nn.Module, selection: Selection) -> None:
        """Let the forward of the selected layers add their updates."""
        self._selection, self._twins = selection, []
        self._stored_as = selection.beside
        first = self.blocks.first
        for name in self.plan.layout.supports:
            weight = selection.weights[name]
            supports = self._supports_of(name)
            if name in selection.rows:
                supports = tuple(supports)
                for own in supports:
                    own.cut_to(selection.rows[name])
            site = Site.of(weight.module, weight.key)
            link = None if site is None else site.links.get(self)
            if link is not None:  # rows of the same layer
                link.supports = (*link.supports, *supports)
            else:
                link = Link(self, self.name, name, supports, first, self.dropout, self.active)
            readers = selection.readers.get(name, ())
            site = self._sites[name] = Site.add(weight, link, readers)
            for twin in selection.twins.get(name, ()):
                self._twins.append(Site.add(twin, link, readers, site))
        names = {site: selection.module_of(name) for name, site in self._sites.items()}
        parents = {self._sites[n]: p for n, p in selection.parents.items() if n in self._sites}
        self._watch = ChangeWatch.on(model, self, names, parents)

    @property
    def _every(self) -> list[Site]:
        return [*dict.fromkeys(self._sites.values()), *self._twins]

    @property
    def _own(self) -> list[Site]:
        """Each parameter once."""
        return [*dict.fromkeys(self._sites.values())]

    def _check_unchanged(self, verb: str) -> None:
        found = self._watch.changes(self) if self._watch is not None else {}
        if found:
            raise AdapterError(
                f"adapter {self.name!r} cannot be {verb}: layers were changed since it was "
                f"attached, {listed(found)}; detach it and attach it again"
            )

    def _supports_of(self, layer: str) -> Iterable[Support]:
        """Return the support tensors of a layer, in the order of the operations."""
        own = self.plan.layout.supports[layer]
        return tuple(self.supports[own[each]] for each in OPERATIONS if each in own)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model compute as if the adapter were not there, inside a ``with`` block.

        A merged adapter is unmerged for the block.

        Yields
        ------
        None
            Nothing.
        """
        merged = self.merged
        if merged:
            self.unmerge()
        try:
            self._use_replaced(False)
        except BaseException:
            if merged:
                self.merge(unreached="merge", bias="ignore")
            raise
        self._merge_again = self._merge_again or merged
        self._disabled += 1
        self._activate()
        try:
            yield
        finally:
            self._disabled -= 1
            self._activate()
            if not self._disabled:
                self._use_replaced(True)
            if self._merge_again and not self._disabled:
                self._merge_again = False
                self.merge(unreached="merge", bias="ignore")  # as it was

    def _activate(self) -> None:
        """Let the layers' forward know whether it is to add the updates."""
        for site in self._every:
            site.links[self].active = self.active

    def _use_replaced(self, new: bool) -> None:
        if self.replaced is not None:
            self.replaced.use(new)

    def merge(self, *, unreached: str = "refuse", bias: str = "warn") -> None:
        """Add every update to its weight, so that the model costs what its base does.

        The weights' own values are kept, for `unmerge`. If any cannot be merged, none is. Forward
        passes of the model that other threads begin meanwhile wait; while one is under way, this
        is refused. Passes of parts of the model, and compiled ones, are not seen.

        Parameters
        ----------
        unreached : {"refuse", "merge"}
            What is done where the module that has a layer ran and the layer did not, so that the
            forward pass lacks an update that merging would add.
        bias : {"warn", "refuse", "ignore"}
            What is done where layers gain a bias, which ``from_pretrained`` drops when the merged
            model was saved.

        Raises
        ------
        AdapterError
            If the adapter is merged already, disabled or not attached, a weight lies on the meta
            device, is quantised or shared with another layer, a layer was changed since or not
            reached, or one gains a bias that is refused, or another thread runs a forward pass.
        ValueError
            If the sum of a weight and its update is not finite, or an argument is none of those.
        """
        self._check_attached("merged")
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} is merged already")
        if self._disabled:
            raise AdapterError(f"adapter {self.name!r} must not be disabled to be merged")
        self._settle()
        self._check_unchanged("merged")
        weights = {name: site.held.parameter for name, site in self._sites.items()}
        refuse_empty("weights must be loaded, and not offloaded, to be merged", weights)
        check_mergeable(self, self._homes[0], self._sites, self._twins, unreached, bias)
        done: list[Site] = []
        with changing(self._watch, "merged"):
            try:
                with self.blocks.gathered(), self.blocks.scope.opened():
                    for site in self._own:
                        done.append(site)
                        site.merge(self)
            except BaseException:
                for site in done:
                    site.unmerge(self)
                raise
            self.merged = True
            self._activate()

    def unmerge(self) -> None:
        """Take every update out of its weight, bit for bit.

        Forward passes of other threads are treated as by `merge`. Updates of adapters that were
        attached later and are merged are formed and added again.

        Raises
        ------
        AdapterError
            If the adapter is not merged, or another thread runs a forward pass.
        """
        if not self.merged:
            raise AdapterError(f"adapter {self.name!r} must be merged to be unmerged")
        self._settle()
        self._check_unchanged("unmerged")
        with changing(self._watch, "unmerged"):
            for site in self._own:
                site.unmerge(self)
            self.merged = False
            self._activate()

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
            If the adapter is not attached, or is merged and `keep_merged` is False, or lies on
            another merged one, or another library has wrapped a layer's forward since.
        """
        self._check_attached("detached")
        if self.merged and not keep_merged:
            raise AdapterError(
                f"adapter {self.name!r} is merged: call unmerge() first, or "
                "detach(keep_merged=True) to leave the weights merged"
            )
        check_not_wrapped(self.name, self._every)
        below = {link.adapter_name: None for site in self._own for link in site.below(self)}
        if below:
            raise AdapterError(
                f"adapter {self.name!r} must not lie on another merged one to be detached merged: "
                f"detach or unmerge {', '.join(map(repr, below))} first"
            )
        model, host = self._homes
        if not self.merged:
            self._use_replaced(False)
        self.alone_in_checkpoints = False
        self.replaced = None
        gained = {site.module for site in self._own if site.links[self].bare}
        for adapter in adapters_of(model) if gained else ():  # as trainable as the weight
            frozen = [owner for owner, key in adapter._frozen if key == "weight"]
            adapter._frozen += [(owner, "bias") for owner in frozen if owner in gained]
        for site in self._every:
            site.remove(self)
        del host._modules[self.name]
        for hook in self._hooks:
            hook.remove()
        if self._frozen:
            ordered = sorted(adapters_of(model), key=operator.attrgetter("_order"))
            later = [(a._homes[0], a._frozen) for a in ordered if a._order > self._order]
            release(self._frozen, later)
        self._sites, self._homes, self._frozen, self._hooks = {}, (), [], []
        self._twins, self._selection, self._batches = [], Selection({}), {}
        self.dropout.check = None
        if self._watch is not None:
            self._watch.drop(self)
            self._watch = None
        self.merged = False
        self.blocks.scope.clear()
        self._merge_again = False

    def save(self, path: str | Path) -> None:
        """Write every factor, and the spec with the scale now in force, to a safetensors file.

        Parameters
        ----------
        path : str or pathlib.Path
            The file; replaced if it exists, and left as it was if writing fails.

        Raises
        ------
        AdapterError
            If a factor lies on the meta device or does not have the plan's shape, or a layer was
            changed since the adapter was attached.
        """
        self._check_writable()
        with self._whole_factors() as mesh:
            once(mesh, lambda: self._write(Path(path)))
        self._warn_unsaved()

    def _write(self, path: Path) -> None:
        save_blocks(self.blocks, self._bare, self.replaced, self._header, path)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        base_model: str | None = None,
        scores: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> None:
        """Write a folder to keep or to share: the file of `save`, its design as JSON, a model card.

        Parameters
        ----------
        folder : str or pathlib.Path
            The folder; made if there is none. A ``README.md`` that somebody wrote stays.
        base_model : str, optional
            What the card says was adapted; by default what the model says of itself.
        scores : mapping of str to float, optional
            What the card says of its worth.
        license : str, optional
            What the card says of its licence.

        Raises
        ------
        AdapterError
            As in `save`.
        NotADirectoryError
            If `folder` is a file.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder must be a directory: got {folder}")
        self._check_writable()
        replaced = {} if self.replaced is None else self.replaced.tensors()
        also = {name: own.numel() for name, own in replaced.items()}
        model = self._homes[0] if self._homes else None
        card = card_of(self.plan, model, also, base_model, scores, license)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(folder / TENSORS)
            write_beside(folder, card)

        with self._whole_factors() as mesh:
            once(mesh, write)
        self._warn_unsaved()

    def _check_writable(self) -> None:
        self._settle()
        refuse_empty(f"adapter {self.name!r} must have memory to be saved", self.blocks)
        self._check_unchanged("saved")

    def swap(self, path: str | Path, *, allow_nonfinite: bool = False) -> None:
        """Take the factors and the scale of another file of the same design, in place.

        The parameters stay the same tensors, so that optimisers and compiled code go on.

        Parameters
        ----------
        path : str or pathlib.Path
            A file that `save` wrote, or a folder of `save_pretrained`, of the same layers and the
            same spec but for its scale. Its values are rounded to the adapter's dtype.
        allow_nonfinite : bool
            Read NaN and infinity too, which are refused else.

        Raises
        ------
        AdapterError
            If the adapter is merged, not attached, or lies on the meta device.
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated, not an adapter or of another design, or has other
            tensors, or its frozen blocks or maps are others, or its values do not fit the
            adapter's dtype: what differs is listed, and nothing is changed.

        Examples
        --------
        >>> import pathlib, tempfile, torch, superlora as sl, superlora.torch as slt
        >>> path = pathlib.Path(tempfile.mkdtemp(), "zero.safetensors")
        >>> adapter = slt.attach(torch.nn.Linear(4, 4), sl.lora(rank=1, alpha=2))
        >>> adapter.save(path)
        >>> _ = torch.nn.init.ones_(adapter.factors()["0.0.factor0"])
        >>> adapter.swap(path)
        >>> bool(adapter.delta("").any())
        False
        """
        self._check_attached("given another file")
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} must be unmerged to be given another file")
        self._settle()
        held: dict[str, Tensor] = dict(self.blocks)
        if self.replaced is not None:
            held |= self.replaced.tensors()
        refuse_empty(f"adapter {self.name!r} must have memory to be given another file", held)
        beside = self._beside | self._selection.beside
        path = file_of(Path(path))
        self.scale = swap_blocks(
            self.blocks, self.weights(), self.replaced, beside, path, allow_nonfinite
        )
        self.blocks.scope.clear()

    def to_peft(
        self,
        directory: str | Path,
        *,
        rank: int | None = None,
        energy: float | None = None,
        serve: bool = False,
    ) -> Export:
        """Write a folder that ``peft.PeftModel.from_pretrained`` loads.

        Parameters
        ----------
        directory : str or pathlib.Path
            The folder; made if there is none.
        rank : int, optional
            Where PEFT has no exact counterpart, the rank of the LoRA that is nearest.
        energy : float, optional
            Instead, or besides: keep the least rank with this part, in (0, 1], of the sum of
            squares of the update's singular values.
        serve : bool
            Write what any server of LoRA reads alike: LoRA alone, of one rank for all layers,
            alpha equal to it and the scale in the factors, without patterns, and the task of the
            model.

        Returns
        -------
        Export
            The format of every layer, and its relative error; printed it is a table.

        Raises
        ------
        AdapterError
            If the adapter is not attached.
        NotADirectoryError
            If `directory` is a file.
        ValueError
            If an update needs a rank or an energy and none is given, or a weight is of a kind that
            PEFT has no LoRA for. For servers also if parameters of the model go with the adapter,
            or a layer is a convolution.

        Notes
        -----
        LoRA, LoKr and LoHa are written as such, and any other update of low rank as the
        LoRA that it equals. Rank or energy truncate an update's singular values. Convolutions
        without groups and embeddings are written as LoRA.
        """
        self._check_attached("written for another library, whose files name layers")
        held = self.model, self._whole(), self.replaced
        folder = Path(directory)
        with self._whole_factors() as mesh:
            export = once(mesh, lambda: save_peft(self.blocks, *held, folder, rank, energy, serve))
        self._warn_unsaved()
        return export

    def to_lycoris(
        self,
        path: str | Path,
        *,
        rank: int | None = None,
        energy: float | None = None,
        keys: str = "lycoris",
        prefix: str | None = None,
    ) -> Export:
        """Write a safetensors file that LyCORIS loads, or ComfyUI, diffusers, kohya's scripts.

        Parameters
        ----------
        path : str or pathlib.Path
            The file; replaced if it exists.
        rank, energy : int and float, optional
            As in `to_peft`.
        keys : {"lycoris", "kohya", "comfy", "diffusers"}
            How the program names tensors: ``"lycoris"`` and ``"kohya"`` (``lora_unet_``) write
            underscores, ``"comfy"`` (``diffusion_model.``) and ``"diffusers"`` (``unet.`` or
            ``transformer.``, LoRA alone, of one rank and of scale 1) the names' own dots.
        prefix : str, optional
            What the keys begin with instead, such as ``"lora_te1"`` for a first text encoder.

        Returns
        -------
        Export
            As in `to_peft`.

        Raises
        ------
        AdapterError
            If the adapter is not attached, or has replaced parameters that LyCORIS cannot hold.
        ValueError
            If an update needs a rank or an energy and none is given, or a layer is
            none of LyCORIS's, or has another's name once its dots are underscores, or there are
            no such `keys`.

        Notes
        -----
        The scale of LoKr and LoHa is in a factor, and their alpha is the rank: programs make a
        scale of alpha in several ways, which then all give 1.
        """
        self._check_attached("written for another library, whose files name layers")
        if self.replaced is not None:
            raise AdapterError(
                f"adapter {self.name!r} has replaced parameters of the model, which the format "
                f"cannot hold: {some(self.replaced.names)}"
            )
        held = self.model, self._whole(), Path(path)
        with self._whole_factors() as mesh:
            export = once(
                mesh, lambda: save_lycoris(self.blocks, *held, rank, energy, keys, prefix)
            )
        self._warn_unsaved()
        return export

    def _whole(self) -> dict[str, Weight]:
        """Return the weights, or refuse those that another library's files cannot name."""
        self._check_unchanged("written")
        more = [*self._selection.rows, *self._selection.twins]
        if more:
            raise ValueError(
                "weights must be a layer's own to be written for another library: got "
                f"{some(map(repr, more))}, rows or a shared weight"
            )
        return self.weights()

    def refuse_to_load(self, model: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
        """Refuse before any of the model is loaded."""
        metadata = getattr(state_dict, "_metadata", {})
        own = prefix + registered(model).get(self, self.name)
        self._check_loadable(metadata.get(own, {}), f"{own}.{MERGED}" in state_dict)

    def _warn_unsaved(self) -> None:
        """Warn of what was trained beside the adapter, and is not in its files."""
        if not self._homes:
            return
        adapters = adapters_of(self._homes[0])
        held = [own.replaced for own in adapters if own.replaced is not None]
        trained = unsaved(self._homes[0], held)
        if trained:
            warnings.warn(
                f"{some(map(repr, trained))} require gradients and are not saved with adapter "
                f"{self.name!r}: name them in attach(also=...), or freeze them",
                stacklevel=3,
            )
        known = {name for own in held for name in own.names}
        moved = [
            name
            for name, (module, count) in self._batches.items()
            if f"{name}.num_batches_tracked".lstrip(".") not in known
            and int(module._buffers["num_batches_tracked"]) != count  # type: ignore[arg-type]
        ]
        if moved:
            warnings.warn(
                f"running statistics of {some(map(repr, moved))} have changed since adapter "
                f"{self.name!r} was attached and are not saved with it: name these norms in "
                "attach(also=...), or train with them in eval mode",
                stacklevel=3,
            )

    def _check_attached(self, verb: str) -> None:
        if not self._homes:
            raise AdapterError(f"adapter {self.name!r} must be attached to be {verb}")


def registered(model: nn.Module) -> dict[Adapter, str]:
    """Return the adapters that a model or a part of it registers, and their dotted names."""
    found: dict[Adapter, str] = {}
    for name, module in outside_adapters(model, wrappers=True):
        for key, part in module._modules.items():
            if isinstance(part, Adapter):
                found.setdefault(part, f"{name}.{key}".lstrip("."))
    return found


def adapters_of(model: nn.Module) -> set[Adapter]:
    """Return the adapters that `model` or a part of it registers, or whose layers it has."""
    found = set(registered(model))
    for _, module in outside_adapters(model):
        site = Site.of(module)
        if site is not None:
            found |= {adapter for adapter in site.links if isinstance(adapter, Adapter)}
    return found
