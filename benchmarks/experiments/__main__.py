"""`python benchmarks/experiments run NAME` measures; `... report` draws and writes the docs."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

# The folder that holds this package, and the modules that the benchmarks share.
sys.path.insert(0, str(Path(__file__).parent.parent))
# Workers start anew, and find the package by it.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])]
)

from smollm import cache_folder

from experiments import results, runs
from experiments.experiment import experiment, names

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def known(name: str) -> str:
    """Return the name of an experiment that there is."""
    try:
        experiment(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return name


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="The experiment; see `list`.", callback=known)],
    processes: Annotated[int, typer.Option(min=1, help="Methods at a time.")] = 2,
    only: Annotated[str, typer.Option(help="Methods with this in their names.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Take no run of an earlier time.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = results.FOLDER,
) -> None:
    """Measure an experiment; what an earlier run measured with this code is not measured again."""
    folder = Path(tempfile.mkdtemp()) if fresh else cache_folder() / "experiments"
    rows = runs.measure(name, folder, processes=processes, only=only)
    results.write(output, name, experiment(name), rows, whole=not only)


@app.command()
def geometry(
    name: Annotated[str, typer.Argument(help="One that has results.", callback=known)] = "digits",
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = results.FOLDER,
) -> None:
    """Train some methods at their chosen rates again, and compare the updates themselves."""
    from experiments import geometry as own

    own.write(own.measure(name, output), output)


@app.command()
def drawings(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = results.FOLDER,
) -> None:
    """Train some methods of `drawing` at their chosen rates again, and show what they draw."""
    from experiments import drawing_figure, report

    file = report.FIGURES / "drawings.png"
    figure, checks = drawing_figure.of_results(output)
    drawing_figure.save(figure, file)
    typer.echo(f"{file}\n{checks}")


@app.command()
def report() -> None:
    """Draw every figure and write every table of the docs and the README from the results."""
    from experiments.report import write

    for file in write():
        typer.echo(file)


@app.command("list")
def list_them() -> None:
    """List the experiments."""
    for name in names():
        typer.echo(f"{name}: {experiment(name).title}")


if __name__ == "__main__":
    app()
