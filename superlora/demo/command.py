"""`superlora demo`: the command's options, and its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from superlora.demo.extras import require

HELP = """Adapt a real vision transformer to MNIST by LoRA, SuperLoRA and LoRTA, and compare them.

Takes about 2 minutes on 2 CPU cores. Fetches 92 MB once, checked by digest.
"""
NEEDED = ("torch", "safetensors", "onnx", "matplotlib", "platformdirs", "rich")

Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="SUPERLORA_CACHE", help="Folder for what is fetched. Default: the user's cache."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch decides.")]


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="More images, pixels and methods: about half an hour.")
    ] = False,
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
    """Run the demo."""
    require(NEEDED, "demo")
    with errors("demo"):
        from superlora.demo.run import run

        cache = cache_folder(cache_dir)
        run(full=full, seed=seed, cache=cache, output=output_dir, threads=threads, only=only)


def cache_folder(chosen: Path | None) -> Path:
    """Return the folder for what is fetched: the one chosen, or the user's cache."""
    import platformdirs

    return chosen or platformdirs.user_cache_path("superlora")


@contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn the errors of a command into one line and an exit code."""
    from safetensors import SafetensorError

    from superlora.demo.fetch import FetchError

    try:
        yield
    except (FetchError, SafetensorError, ValueError, OSError) as error:
        typer.echo(f"superlora {command}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"superlora {command}: interrupted", err=True)
        raise typer.Exit(130) from None
