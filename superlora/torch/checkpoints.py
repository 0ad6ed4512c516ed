"""Checkpoints of training loops that hold adapters without the base model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from superlora.torch.walk import plain_name

# Models whose state dict is whole meanwhile, whichever of their adapters asked to be alone.
_WHOLE: set[int] = set()


class WithoutBase:
    """Hooks with which a model's state dict is without the base, and is loaded so.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    kept : callable
        Returns how the names of kept entries begin, and whole names of others.
    """

    def __init__(
        self, model: nn.Module, kept: Callable[[], tuple[tuple[str, ...], set[str]]]
    ) -> None:
        self.model, self.kept = (model,), kept
        self._handles = [
            # Torch marks the hook, which a method cannot bear.
            model.register_state_dict_post_hook(functools.partial(self._drop)),
            model.register_load_state_dict_pre_hook(self._fill),
        ]

    def remove(self) -> None:
        """Let state dicts hold the whole model again."""
        for handle in self._handles:
            handle.remove()

    def _drop(self, _: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if id(self.model[0]) in _WHOLE:
            return
        for key in self._base(state_dict, prefix):
            del state_dict[key]

    def _fill(self, _: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Let a state dict without any of the base have the model's own."""
        _WHOLE.add(id(self.model[0]))
        try:
            every = self.model[0].state_dict(prefix=prefix, keep_vars=True)
        finally:
            _WHOLE.discard(id(self.model[0]))
        base = self._base(every, prefix)
        if not any(key in state_dict for key in base):
            state_dict.update({key: every[key] for key in base})

    def _base(self, state_dict: Iterable[str], prefix: str) -> list[str]:
        begins, names = self.kept()
        return [
            key
            for key in state_dict
            if key.startswith(prefix)
            and not (own := plain_name(key[len(prefix) :])).startswith(begins)
            and own not in names
        ]
