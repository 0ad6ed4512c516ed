"""What merging an adapter into a checkpoint on a disk costs, beside copying the checkpoint.

A folder of the shapes of Llama 3.2 1B, random bfloat16 weights in shards, is copied by
`shutil.copytree` and merged by `superlora.torch.on_disk.merge_files`, in turns and from a warm
cache, with LoRA adapters of rank 8 of the query and value layers and of all linear layers. Each
turn begins with nothing left to write to the disk. Times end as the call does, and with all bytes
on the disk, which a merge always waits for; CPU seconds are those of the process. `anonymous` is
the most resident memory that belongs to no file, above that before the merge.

Run: ``python benchmarks/bench_merge_files.py [--layers 16] [--rounds 5]``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import superlora as sl
import superlora.torch as slt
from superlora.torch.on_disk import merge_files
from superlora.torch.on_disk.checkpoint import Checkpoint
from superlora.torch.on_disk.merge import Merge
from superlora.torch.on_disk.skeleton import skeleton

WIDTH, INNER, KEYS, VOCABULARY = 2048, 8192, 512, 128_256
SHARD = 1 << 30  # bytes
TARGETS = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama of so many layers, whose head is its embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part, height in (("q", WIDTH), ("k", KEYS), ("v", KEYS), ("o", WIDTH)):
            found[f"{name}.self_attn.{part}_proj.weight"] = (height, WIDTH)
        for part in ("gate", "up"):
            found[f"{name}.mlp.{part}_proj.weight"] = (INNER, WIDTH)
        found[f"{name}.mlp.down_proj.weight"] = (WIDTH, INNER)
        for part in ("input", "post_attention"):
            found[f"{name}.{part}_layernorm.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,)}


def write_model(folder: Path, layers: int) -> None:
    """Write a sharded folder of random weights."""
    folder.mkdir()
    noise = torch.randn(1 << 24).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        entries = torch.Size(shape).numel()
        values = noise.repeat(entries // len(noise) + 1)[:entries].reshape(shape)
        if size + 2 * entries > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name], size = values, size + 2 * entries
    places = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))


def write_adapter(base: Path, targets: str | list[str], path: Path) -> None:
    """Write a LoRA with random factors."""
    source = Checkpoint(base)
    model = skeleton({name: source.tensor(name) for name in source.tensors})
    adapter = slt.attach(model, sl.lora(rank=8), targets=targets)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.copy_(0.02 * torch.randn(factor.shape))
    adapter.save(path)


def anonymous() -> int:
    """Return resident bytes that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def synced(folder: Path) -> None:
    """Wait until all bytes of a folder are on the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        base, output = folder / "base", folder / "output"
        write_model(base, options.layers)
        for name, targets in TARGETS.items():
            write_adapter(base, targets, folder / f"{name}.safetensors")
        times: dict[str, list[tuple[float, float, float]]] = {}
        merges: dict[str, Merge] = {}
        most = dict.fromkeys(TARGETS, 0)
        for _ in range(options.rounds):
            for name in ("copy", *TARGETS):
                os.sync()
                start, used, before = time.perf_counter(), time.process_time(), anonymous()
                if name == "copy":
                    shutil.copytree(base, output)
                else:

                    def watch(_: int, name: str = name, before: int = before) -> None:
                        most[name] = max(most[name], anonymous() - before)

                    file = folder / f"{name}.safetensors"
                    merges[name] = merge_files(base, file, output, advance=watch)
                done = time.perf_counter() - start
                synced(output)
                both = done, time.perf_counter() - start
                times.setdefault(name, []).append((*both, time.process_time() - used))
                shutil.rmtree(output)
        size = sum(own.nbytes for own in Checkpoint(base).tensors.values())
        print(f"{size / 1e9:.2f} GB in {len(Checkpoint(base).files)} shards")
        copied = times["copy"]
        print(
            "| | seconds | synced | over copying, synced | CPU seconds | anonymous MB | said MB |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|")
        for name, own in times.items():
            ratio = statistics.median(a[1] / b[1] for a, b in zip(own, copied, strict=True))
            one, two, used = (statistics.median(part) for part in zip(*own, strict=True))
            said = f"{merges[name].peak / 1e6:.0f}" if name in merges else ""
            mega = f"{most[name] / 1e6:.0f}" if name in merges else ""
            print(
                f"| {name} | {one:.2f} | {two:.2f} | {ratio:.2f} | {used:.2f} | {mega} | {said} |"
            )


if __name__ == "__main__":
    main()
