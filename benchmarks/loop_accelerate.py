"""Train an adapter and a head of MiniLM in a loop of one's own on Accelerate, and resume it.

accelerate launch benchmarks/loop_accelerate.py --output runs/accelerate [--tiny]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from minilm import accuracy, stacked, task

import superlora as sl
import superlora.torch as slt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a model and data made on the spot")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", default="no", help="no, bf16 or fp16")
    options = parser.parse_args()

    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=2)
    set_seed(0)
    work = task(tiny=options.tiny)
    adapter = slt.attach(
        work.model,
        sl.lorta(rank=8),
        targets=["query", "value"],
        also=["classifier"],
        dropout=0.0,
    )
    adapter.alone_in_checkpoints = True  # before the model is wrapped
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=5e-3, rates={"model": 1e-3}))
    loader = torch.utils.data.DataLoader(
        work.train,
        batch_size=8,
        shuffle=True,
        collate_fn=stacked,  # type: ignore[arg-type]
    )
    model, optimizer, loader = accelerator.prepare(work.model, optimizer, loader)
    state = options.output / "state"
    begun = options.output / "epochs.txt"
    first = 0
    if begun.is_file():
        accelerator.load_state(str(state))
        first = int(begun.read_text())
    start = time.perf_counter()
    for epoch in range(first, options.epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(str(state))
        if accelerator.is_main_process:
            begun.write_text(str(epoch + 1))
    seconds = time.perf_counter() - start

    score = accuracy(work.model, work.test)
    if accelerator.is_main_process:
        adapter.save_pretrained(
            options.output / "adapter", base_model=work.base, scores={"accuracy": score}
        )
        entries = sum(own.numel() for own in adapter.parameters())
        print(f"{entries:,} trained numbers, {seconds:.0f} s, accuracy {score:.4f}")
        size = (state / "model.safetensors").stat().st_size
        print(f"model.safetensors of the checkpoint, bytes: {size}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
