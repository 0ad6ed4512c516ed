"""`superlora demo`: the command's options, and its errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from superlora.demo.extras import require

HELP = """Adapt a real vision transformer to MNIST by LoRA, SuperLoRA and LoRTA, and compare them.

Fetches 92 MB once, checked by digest. Measured points are kept: an interrupted run goes on where it
stopped.
"""
EXTRA = "demo"
NEEDED = ("torch", "safetensors", "onnx", "matplotlib", "platformdirs", "rich")


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer images, pixels and methods: about 2 minutes.")
    ] = False,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the table, the plot and the best small adapter.")
    ] = Path("superlora-demo"),
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SUPERLORA_CACHE",
            help="Folder for what is fetched and measured. Default: the user's cache.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what an earlier run measured.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the order and the start.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch decides.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="A part of the names of the methods to measure, such as 2-D.")
    ] = "",
) -> None:
    """Run the demo and turn its errors into one line and an exit code."""
    require(NEEDED, EXTRA)
    import platformdirs

    from superlora.demo.fetch import FetchError
    from superlora.demo.run import NoPointError, ReloadError, run

    cache = cache_dir or platformdirs.user_cache_path("superlora")
    try:
        run(
            quick=quick,
            seed=seed,
            cache=cache,
            output=output_dir,
            fresh=fresh,
            threads=threads,
            only=only,
        )
    except (FetchError, NoPointError, ReloadError, OSError) as error:
        typer.echo(f"superlora demo: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("superlora demo: interrupted; run it again to go on", err=True)
        raise typer.Exit(130) from None
