"""The command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from superlora import __version__
from superlora.demo.extras import require

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the ``superlora`` command."""
    require(("typer", "rich"), "cli")
    build()(prog_name="superlora")


def build() -> typer.Typer:
    """Return the command line application; typer is imported no sooner."""
    import typer

    from superlora import commands
    from superlora.demo import command

    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(__version__)
            raise typer.Exit

    @app.callback()
    def superlora(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        """Low-rank adaptation of many weights at once, as tensors."""

    for own in commands.COMMANDS:
        app.command()(own)
    app.command()(command.demo)
    app.command()(command.search)
    return app
