"""`Factors`: the trainable tensors of a plan as a module, whether it is on a model or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from superlora.design.cost_rule import check_apply
from superlora.design.spec import Spec
from superlora.errors import AdapterError, some
from superlora.plan import Plan
from superlora.torch.blocks import register_blocks
from superlora.torch.dropout import Dropout
from superlora.torch.files.state import MODEL
from superlora.torch.norms import Norms, norms_of
from superlora.torch.offload import keep_in_memory
from superlora.torch.param_groups import param_groups
from superlora.torch.replaced import Replaced
from superlora.torch.sharded import reshard, spread
from superlora.torch.support import Support

# In a state dict, of an adapter that was merged when it was taken.
MERGED = "merged"


class Factors(nn.Module):
    """The blocks of a plan, their scale, and what trains with them: what an `Adapter` is made of.

    Parameters
    ----------
    plan : Plan
        What lies where; its weights are named like the adapted layers.
    factors : mapping of str to torch.Tensor
        One tensor for each of ``plan.factor_shapes`` and ``plan.frozen_shapes``.
    name : str
        The attribute of the model under which the adapter is registered.
    """

    def __init__(self, plan: Plan, factors: Mapping[str, Tensor], name: str = "superlora") -> None:
        super().__init__()
        self.plan, self.name = plan, name
        self.merged = False
        self.replaced: Replaced | None = None
        self.blocks = register_blocks(self, plan, factors)
        self.supports = self._prepared()
        self.blocks.prepare()
        self.dropout = Dropout()
        self._seed = 0  # of the initial factors
        self._stored: dict[str, Tensor] = {}  # a file's, that wait for the weights to have memory

    def _settle(self) -> None:
        """Let no engine hold the factors elsewhere than in the module."""
        keep_in_memory(self)
        reshard(self.modules())

    def _prepared(self) -> dict[str, Support]:
        return {name: Support(self.blocks, name) for name in self.plan.layout.shapes}

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, for a model that calls all its children: the layers do the work."""
        return x

    def reset(self, seed: int = 0) -> None:
        """Draw the initial factors anew, so that every update is zero.

        Parameters
        ----------
        seed : int
            In [0, 2**64).

        Raises
        ------
        AdapterError
            If the adapter is merged, or has fixed terms, which new factors would not cancel.
        """
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} must be unmerged to be reset")
        if any(own.frozen_terms for own in self.plan.layout.specs):
            raise AdapterError(
                f"adapter {self.name!r} must have no fixed terms to be reset, as keep_output gives "
                "it: attach it again"
            )
        self._settle()
        self.blocks.draw(seed)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the factors, and the parameters of the model that train with them."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse and self.replaced is not None:
            before = f"{prefix}.{MODEL}".lstrip(".")
            for name, parameter in self.replaced.parameters().items():
                yield before + name, parameter

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        empty = any(block.is_meta for block in self.blocks.values())
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        # Memory given to factors that had none (`Module.to_empty`) holds anything.
        if empty and not any(block.is_meta for block in self.blocks.values()):
            with torch.no_grad():
                for name, value in self._stored.items():
                    self.blocks[name].copy_(value)
            if not self._stored:
                self.blocks.draw(self._seed, frozen=True)
            self._stored = {}
        self.blocks.scope.clear()
        self.blocks.prepare()
        return self

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all factors."""
        return self.plan.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.blocks.dtype

    def factors(self) -> dict[str, Tensor]:
        """Return all parameters and frozen blocks by name: the form that ``Plan`` takes."""
        return dict(self.blocks)

    @property
    def applied(self) -> str:
        """How the layers apply their updates: ``"auto"``, ``"factored"`` or ``"formed"``.

        It can be set; ``"auto"`` takes what costs least for a layer and its number of tokens.
        """
        return self.blocks.scope.applied

    @applied.setter
    def applied(self, value: str) -> None:
        check_apply(value, self.plan.layout)
        self.blocks.scope.applied = value

    @property
    def scale(self) -> float:
        """The number in front of ΔW; scales of the spec's overrides change in proportion."""
        return self.blocks.scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self.merged:
            raise AdapterError("scale must be set on an unmerged adapter: call unmerge() first")
        if value is None:
            raise TypeError("scale must be a number: got None")
        self.blocks.scale = Spec(scale=value).scaling

    def param_groups(
        self,
        lr: float,
        *,
        ratio: float = 1.0,
        rates: Mapping[str, float] | None = None,
        weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return the parameters in groups for an optimizer, each with a learning rate.

        Parameters
        ----------
        lr : float
            The rate of all blocks without another.
        ratio : float
            Times `lr` is the rate of the blocks that start at zero, of LoRA the output side: 16 is
            what LoRA+ ([1]_) proposes.
        rates : mapping of str to float, optional
            Rates of kinds of blocks, ``"core"``, ``"factor0"`` …, and ``"model"`` for parameters
            of the model that train with the adapter.
        weight_decay : float, optional
            That of all with two axes or more; by default the optimizer's. Biases, norms and other
            vectors have none.

        Returns
        -------
        list of dict
            With ``"params"``, ``"names"``, ``"lr"`` and mostly ``"weight_decay"``.

        Raises
        ------
        TypeError, ValueError
            If a number is none, negative or not finite, or there is no such kind.

        References
        ----------
        .. [1] S. Hayou, N. Ghosh and B. Yu, "LoRA+: Efficient Low Rank Adaptation of Large
           Models", 2024.

        Examples
        --------
        >>> import torch, superlora as sl, superlora.torch as slt
        >>> adapter = slt.attach(torch.nn.Linear(4, 4), sl.lora(rank=1))
        >>> for group in adapter.param_groups(lr=1e-3, ratio=16):
        ...     print(group["names"], group["lr"])
        ['0.0.factor0'] 0.016
        ['0.0.factor1'] 0.001
        """
        parameters = dict(self.named_parameters())
        return param_groups(self.plan.layout, parameters, lr, ratio, rates or {}, weight_decay)

    def norms(self) -> dict[str, Norms]:
        """Return the norms of every update, scale included: spectral, Frobenius, effective rank.

        Returns
        -------
        dict of str to Norms
            By the names of `deltas`; updates are formed one at a time, and those that are thin
            products not at all.
        """
        self._settle()
        with self.blocks.gathered():
            return {name: norms_of(own.blocks, own.name) for name, own in self.supports.items()}

    def delta(self, name: str) -> Tensor:
        """Form one layer's update.

        Parameters
        ----------
        name : str
            The layer's dotted name.

        Returns
        -------
        torch.Tensor, (output width, input width)
            ``scale * ΔW``, differentiable; never the memory of a factor.

        Raises
        ------
        KeyError
            If the adapter has no layer of that name.
        """
        self.plan.blocks_of(name)  # says which layers there are
        if self.blocks.first.read().is_meta:
            keep_in_memory(self)
        if name not in self.supports:
            raise KeyError(f"name must be one of {some(map(repr, self.supports))}: got {name!r}")
        return self.supports[name].delta()

    def deltas(self) -> dict[str, Tensor]:
        """Form the updates of all layers, as `delta` does."""
        with self.blocks.gathered(), self.blocks.scope.opened():
            return {name: self.delta(name) for name in self.supports}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keep what layers share over many calls without gradients, inside a ``with`` block.

        Layers of one group share tensors during one call of the model. Inside the block they
        share them over all calls, as in generation; factors must not change there.

        Yields
        ------
        None
            Nothing.
        """
        with self.blocks.scope.kept():
            yield

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._check_in_use()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not prefix and self.replaced is not None:  # of the adapter itself, not of its model
            for name, own in self.replaced.tensors().items():
                destination[MODEL + name] = own if keep_vars else own.detach()
        if self.merged:
            # In a tensor, since formats such as safetensors drop the metadata.
            destination[prefix + MERGED] = torch.ones(1)
            destination._metadata[prefix[:-1]]["merged"] = True

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        self._check_loadable(local_metadata, prefix + MERGED in state_dict)
        reshard(self.modules())
        for name, block in (*self.named_parameters(), *self.named_buffers()):
            if prefix + name in state_dict:  # one may be whole and the other in parts
                state_dict[prefix + name] = spread(state_dict[prefix + name], block)
        if not prefix and self.replaced is not None:
            for name, own in self.replaced.tensors().items():
                if MODEL + name in state_dict:
                    with torch.no_grad():
                        own.copy_(state_dict.pop(MODEL + name))
                else:
                    missing.append(MODEL + name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)

    def _check_loadable(self, metadata: Mapping[str, Any], marked: bool) -> None:
        """Refuse to load a state dict, with this metadata, that would count an update twice."""
        self._check_in_use()
        if self.merged or marked or metadata.get("merged"):
            whose = "the model" if self.merged else "the state dict"
            raise AdapterError(
                f"adapter {self.name!r} must be unmerged where a state dict is taken and where it "
                f"is loaded, or its update counts twice: it is merged in {whose}"
            )

    def _check_in_use(self) -> None:
        if self.replaced is not None and not self.replaced.in_use:
            raise AdapterError(
                f"adapter {self.name!r} must not be disabled where a state dict is taken or "
                f"loaded: the model has its own {some(self.replaced.names)} meanwhile"
            )
