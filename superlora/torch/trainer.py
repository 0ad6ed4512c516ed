"""Checkpoints of transformers' Trainer that hold an adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from superlora.torch.adapter import Adapter
from superlora.torch.sharded import is_distributed


class AdapterCheckpoints(TrainerCallback):
    """Lets a Trainer save and resume an adapter, and what trains with it, without the base model.

    A checkpoint has kilobytes: what the Trainer itself saves and loads, and beside it the folder of
    `Adapter.save_pretrained`, which `load` reads. Needs transformers, of the extra ``peft``.

    Parameters
    ----------
    adapter : Adapter
        On the model that is trained; `Adapter.alone_in_checkpoints` is set.
    **card : Any
        ``base_model`` and ``license`` of `Adapter.save_pretrained`.

    Examples
    --------
    >>> import torch, superlora as sl, superlora.torch as slt
    >>> adapter = slt.attach(torch.nn.Linear(4, 4), sl.lora(rank=1))
    >>> callbacks = [AdapterCheckpoints(adapter, license="mit")]
    >>> adapter.alone_in_checkpoints
    True
    """

    def __init__(self, adapter: Adapter, **card: Any) -> None:
        adapter.alone_in_checkpoints = True
        self.adapter, self.card = adapter, card

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the adapter beside what the Trainer has saved."""
        # Factors that processes share are written by all of them together.
        shared = any(map(is_distributed, self.adapter.parameters()))
        if not (state.is_world_process_zero or shared):
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        best = {} if state.best_metric is None else {args.metric_for_best_model: state.best_metric}
        self.adapter.save_pretrained(folder, scores=best, **self.card)
