"""`superlora search`: the command's options, and its errors in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from superlora.demo.extras import require

HELP = """Train a GLoRA supernet on a vision transformer and search it for the best adapter.

CONFIG is `digits`, `vtab-1k` or a TOML file like these. Run again after it was killed, the same
command goes on from its last epoch and its last evaluated configuration. Several processes share a
search: train the supernet in one, then run the same command in others, on other machines with
--supernet and --storage.
"""
EXTRA = "demo,search"
NEEDED = ("torch", "safetensors", "onnx", "platformdirs", "rich", "optuna", "PIL")
SAMPLERS = ("evolution", "nsga2", "random")


def search(
    config: Annotated[str, typer.Argument(help="digits, vtab-1k, or a TOML file.")] = "digits",
    data: Annotated[
        Path | None, typer.Option(help="vtab-1k: folder with a folder for each task.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="vtab-1k: one of its 19 tasks.")] = None,
    supernet: Annotated[
        Path | None,
        typer.Option(help="A trained supernet's file, its head beside it. Default: train one."),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks of the space, such as 8,4. Default: the config's.")
    ] = None,
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
        int | None, typer.Option(min=1, help="Configurations to evaluate. Default: the config's.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="An SQLite file, or URL of a database, which processes may share."),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the supernet, the study and the results.")
    ] = Path("superlora-search"),
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SUPERLORA_CACHE",
            help="Folder for what is fetched. Default: the user's cache.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the training, the draws.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch decides.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The config's smaller settings: a few minutes.")
    ] = False,
) -> None:
    """Run a search and turn its errors into one line and an exit code."""
    require(NEEDED, EXTRA)
    import platformdirs
    import torch

    from superlora.demo.fetch import MNIST, VIT, FetchError
    from superlora.demo.run import fetched
    from superlora.demo.search import Options, run
    from superlora.demo.search_config import SearchError, load_config
    from superlora.demo.tasks import load_task
    from superlora.demo.vit import load_onnx

    cache = cache_dir or platformdirs.user_cache_path("superlora")
    try:
        settings = load_config(config, quick=quick)
        if supernet is not None and ranks is not None:
            raise SearchError("--ranks must not be given with --supernet, which has its own")
        if ranks is not None:
            changed = dataclasses.replace(settings.supernet, ranks=_ranks(ranks))
            settings = dataclasses.replace(settings, supernet=changed)
        if trials is not None:
            fewer = dataclasses.replace(settings.search, trials=trials)
            settings = dataclasses.replace(settings, search=fewer)
        if sampler is not None and sampler not in SAMPLERS:
            raise SearchError(f"--sampler must be one of {list(SAMPLERS)}: got {sampler!r}")
        if sampler == "evolution" and objectives == 2:
            raise SearchError("--sampler must be nsga2 or random for 2 objectives: got 'evolution'")
        if threads is not None:
            torch.set_num_threads(threads)
        images = load_task(settings, data, task, lambda: fetched(MNIST, cache), seed)
        options = Options(
            output=output_dir,
            limits=tuple(limit) if limit else (None,),
            objectives=objectives,
            sampler=sampler,
            storage=storage,
            seed=seed,
        )
        run(settings, options, images, load_onnx(fetched(VIT, cache)), saved=supernet)
    except (FetchError, SearchError, ValueError, OSError) as error:
        typer.echo(f"superlora search: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("superlora search: interrupted; run it again to go on", err=True)
        raise typer.Exit(130) from None


def _ranks(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ValueError(f"--ranks must be numbers with commas between, as 8,4: got {text!r}")
    return tuple(int(part) for part in parts)
