"""`superlora demo` and `superlora search`: their options, and their errors in one line.

The docstrings of the commands are what ``--help`` shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from superlora.demo.extras import require

SAMPLERS = ("evolution", "nsga2", "random")  # the first ranks by one objective alone
PATCH = 14  # pixels, the side of the transformer's

Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="SUPERLORA_CACHE", help="Folder for what is fetched. Default: the user's cache."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch decides.")]


def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the table, the plot and the best small adapter.")
    ] = Path("superlora-demo"),
    cache_dir: Cache = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the order and the start.")] = 0,
    threads: Threads = None,
    only: Annotated[
        str, typer.Option(help="A part of the names of the methods to measure, such as 2-D.")
    ] = "",
) -> None:
    """Adapt a real vision transformer to MNIST by LoRA, SuperLoRA and LoRTA, and compare them.

    Takes about 2 minutes on 2 CPU cores. Fetches 92 MB once, checked by digest.
    """
    require(("torch", "safetensors", "onnx", "matplotlib", "platformdirs", "rich"), "demo")
    with errors("demo"):
        from superlora.demo.run import run

        cache = cache_folder(cache_dir)
        run(seed=seed, cache=cache, output=output_dir, threads=threads, only=only)


def search(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images: a folder for each class, or a task of VTAB-1K with its lists. "
            "Default: MNIST digits."
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=PATCH, help="Side of an image in pixels. Default: 42.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of the supernet's training. Default: 12.")
    ] = None,
    supernet: Annotated[
        Path | None,
        typer.Option(
            help="A trained supernet's file, with what was written beside it, of the same images "
            "and settings. Default: train one."
        ),
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks of the space.")] = "8,4",
    limit: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Most parameters; a search for each if given several times."),
    ] = None,
    objectives: Annotated[
        int, typer.Option(min=1, max=2, help="2: few parameters as well as accuracy.")
    ] = 1,
    sampler: Annotated[
        str | None,
        typer.Option(help="evolution, nsga2 or random. Default: by the number of objectives."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Configurations to evaluate. Default: 300.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="An SQLite file, or URL of a database, which processes may share."),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the supernet, the study and the results.")
    ] = Path("superlora-search"),
    cache_dir: Cache = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the training, the draws.")] = 0,
    threads: Threads = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer digits, 28 pixels and 40 trials: a few minutes."),
    ] = False,
) -> None:
    """Train a GLoRA supernet on a vision transformer and search it for the best adapter.

    Run again after it was killed, the same command goes on from the trained supernet and the last
    evaluated configuration. Several processes share a search: train the supernet in one, then run
    the same command in others, on other machines with --supernet and --storage.
    """  # noqa: DOC501  (it is the help)
    needed = ("torch", "safetensors", "onnx", "platformdirs", "rich", "optuna", "PIL")
    require(needed, "demo,search")
    with errors("search"):
        import torch

        from superlora.demo.data import read_digits, split
        from superlora.demo.fetch import MNIST, VIT, fetch
        from superlora.demo.folders import read_folder
        from superlora.demo.search import run
        from superlora.demo.supernet import QUICK, SUPERNET_FILE, Settings
        from superlora.demo.vit import load_onnx

        settings = QUICK if quick else Settings()
        settings = dataclasses.replace(
            settings,
            ranks=_ranks(ranks),
            resolution=resolution or settings.resolution,
            epochs=epochs or settings.epochs,
            trials=trials or settings.trials,
        )
        if settings.resolution % PATCH:
            raise ValueError(
                f"--resolution must be a multiple of {PATCH}: got {settings.resolution}"
            )
        possible = SAMPLERS[objectives - 1 :]
        if sampler is not None and sampler not in possible:
            raise ValueError(
                f"--sampler must be one of {list(possible)} for {objectives} objective(s): "
                f"got {sampler!r}"
            )
        if supernet is not None and supernet.name != SUPERNET_FILE:
            raise ValueError(f"--supernet must be a file {SUPERNET_FILE}: got {supernet}")
        if threads is not None:
            torch.set_num_threads(threads)
        cache = cache_folder(cache_dir)
        if data is None:
            sizes = dict(zip(("train", "validation", "test"), settings.digits, strict=True))
            images = split(read_digits(fetch(MNIST, cache)), **sizes, seed=seed)
        else:
            images = read_folder(data, settings.resolution, seed)
        run(
            load_onnx(fetch(VIT, cache)),
            images,
            settings,
            output_dir,
            limits=limit or (None,),
            objectives=objectives,
            sampler=sampler,
            storage=storage,
            seed=seed,
            saved=None if supernet is None else supernet.parent,
        )


def _ranks(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ValueError(f"--ranks must be numbers with commas between, as 8,4: got {text!r}")
    return tuple(int(part) for part in parts)


def cache_folder(chosen: Path | None) -> Path:
    """Return the folder for what is fetched: the one chosen, or the user's cache."""
    import platformdirs

    return chosen or platformdirs.user_cache_path("superlora")


@contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn the errors of a command into one line and an exit code."""
    from safetensors import SafetensorError

    from superlora.demo.fetch import FetchError
    from superlora.errors import AdapterError

    try:
        yield
    except (AdapterError, FetchError, SafetensorError, ValueError, OSError) as error:
        typer.echo(f"superlora {command}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"superlora {command}: interrupted", err=True)
        raise typer.Exit(130) from None
