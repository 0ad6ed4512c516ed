"""Train an adapter and a head of MiniLM with transformers' Trainer; go on if there is a checkpoint.

python benchmarks/loop_trainer.py --output runs/trainer [--tiny]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from minilm import accuracy, task
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import superlora as sl
import superlora.torch as slt
from superlora.torch.trainer import AdapterCheckpoints


def share_of_right(predicted: Any) -> dict[str, float]:
    """Return what the Trainer reports of its evaluation."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a model and data made on the spot")
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()

    work = task(tiny=options.tiny)
    adapter = slt.attach(
        work.model, sl.lora(rank=8, alpha=16), targets=["query", "value"], also=["classifier"]
    )
    arguments = TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(
        work.model,
        arguments,
        train_dataset=work.train,
        eval_dataset=work.test,
        compute_metrics=share_of_right,
        # LoRA+, and a rate of its own for the head.
        optimizers=(
            torch.optim.AdamW(adapter.param_groups(lr=5e-4, ratio=4, rates={"model": 1e-3})),
            None,
        ),
        callbacks=[AdapterCheckpoints(adapter, base_model=work.base)],
    )
    last = get_last_checkpoint(str(options.output)) if options.output.is_dir() else None
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start

    score = accuracy(work.model, work.test)
    adapter.save_pretrained(
        options.output / "adapter", base_model=work.base, scores={"accuracy": score}
    )
    sizes = {
        path.parent.name: path.stat().st_size
        for path in options.output.glob("checkpoint-*/model.safetensors")
    }
    entries = sum(own.numel() for own in adapter.parameters())
    print(f"{entries:,} trained numbers, {seconds:.0f} s, accuracy {score:.4f}")
    print(f"model.safetensors of the checkpoints, bytes: {sizes}")


if __name__ == "__main__":
    main()
