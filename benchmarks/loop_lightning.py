"""Train an adapter and a head of MiniLM with Lightning; go on if there is a checkpoint.

python benchmarks/loop_lightning.py --output runs/lightning [--tiny]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from minilm import Example, Task, accuracy, stacked, task

import superlora as sl
import superlora.torch as slt


class Adapted(lightning.LightningModule):
    """A model, its adapter, and the optimizer of what is trained."""

    def __init__(self, work: Task) -> None:
        super().__init__()
        self.model = work.model
        self.adapter = slt.attach(
            work.model, sl.lokr(rank=4), targets=["query", "value"], also=["classifier"]
        )
        self.adapter.alone_in_checkpoints = True

    def training_step(self, batch: Example, _: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.adapter.param_groups(lr=5e-3, rates={"model": 1e-3}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a model and data made on the spot")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    work = task(tiny=options.tiny)
    module = Adapted(work)
    loader = torch.utils.data.DataLoader(
        work.train,
        batch_size=16,
        shuffle=True,
        collate_fn=stacked,  # type: ignore[arg-type]
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        default_root_dir=options.output,
        callbacks=[ModelCheckpoint(options.output, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = options.output / "last.ckpt"
    start = time.perf_counter()
    trainer.fit(module, loader, ckpt_path=last if last.is_file() else None)
    seconds = time.perf_counter() - start

    score = accuracy(work.model, work.test)
    module.adapter.save_pretrained(
        options.output / "adapter", base_model=work.base, scores={"accuracy": score}
    )
    entries = sum(own.numel() for own in module.adapter.parameters())
    print(f"{entries:,} trained numbers, {seconds:.0f} s, accuracy {score:.4f}")
    print(f"last checkpoint, bytes: {last.stat().st_size}")


if __name__ == "__main__":
    main()
