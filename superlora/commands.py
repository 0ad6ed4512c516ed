"""The commands for files: their options, one function each, and what is printed of it.

The docstrings of the commands are what ``--help`` shows.
"""

from __future__ import annotations

import dataclasses
import inspect as inspect_module
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from superlora.demo.command import errors
from superlora.demo.extras import require

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")]
Preset = Annotated[str, typer.Option(help="The method: a preset of the library, such as lotr.")]
Rank = Annotated[int | None, typer.Option(min=1, help="The preset's rank. Default: its own.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", help="field=value of the preset or the spec; may be repeated."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="all-linear, a regular expression for whole names, or several ends of names. "
        "Default: all-linear."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(help="Instead of a rank: most parameters, 100k or 1.5M, or bytes, 400kB."),
]
Energy = Annotated[
    float | None,
    typer.Option(help="Of a LoRA: the share of the squared singular values to keep."),
]
Base = Annotated[
    Path | None, typer.Option(help="The adapter's base, where its files alone say too little.")
]


@contextmanager
def command(name: str, *more: str) -> Iterator[None]:
    """Run a command: what is missing, errors and warnings are one line each."""
    require(("torch", "safetensors", "rich", *more), "cli")

    def shown(message: Warning | str, *_: Any) -> None:
        typer.echo(f"superlora {name}: warning: {message}", err=True)

    with errors(name), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown  # type: ignore[assignment]
        yield


def plan(
    model: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of a model.")],
    preset: Preset,
    rank: Rank = None,
    targets: Targets = None,
    fields: Fields = None,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter of a checkpoint would be: groups, folds, ranks, parameters.

    The headers of the files are read, and no tensor.
    """
    with command("plan"):
        from superlora.torch.on_disk.planning import plan_checkpoint

        found, selection = plan_checkpoint(model, make_spec(preset, rank, fields), chosen(targets))
        if as_json:
            _print_json(
                {
                    "parameters": found.num_parameters,
                    "bytes": 4 * found.num_parameters,
                    "dense": found.num_dense,
                    "weights": {n: list(shape) for n, shape in found.shapes.items()},
                    "factors": {n: list(shape) for n, shape in found.factor_shapes.items()},
                    "left_out": selection.left_out,
                    "spec": found.spec.to_dict(),
                }
            )
            return
        typer.echo(found.describe())
        typer.echo(
            f"{found.num_parameters:,} parameters, {4 * found.num_parameters:,} bytes in single "
            f"precision, for {found.num_dense:,} entries of {len(found.layout.supports):,} weights"
        )
        for name, why in selection.left_out.items():
            typer.echo(f"left out: {name} {why}")


def merge(
    base: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of a model.")],
    adapter: Annotated[Path, typer.Argument(help="A file or folder of superlora, PEFT, LyCORIS.")],
    output: Output,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16. Default: as in the base.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter's updates to the weights of a checkpoint, a tensor at a time.

    The output has the base's files and names. The same command goes on after it was interrupted.
    """
    with command("merge"):
        from superlora.torch.on_disk.merge import Merge, merge_files

        def started(found: Merge, show: Callable[[int], None]) -> None:
            show(found.nbytes)
            gained = f", {len(found.gained)} biases gained" if found.gained else ""
            typer.echo(
                f"{len(found.weights)} weights, {len(found.biases)} biases, {len(found.replaced)} "
                f"replaced parameters{gained}; {_size(found.nbytes)} to write, at most "
                f"{_size(found.peak)} of memory for tensors",
                err=True,
            )

        with _progress() as (show, advance):
            found = merge_files(
                base,
                adapter,
                output,
                dtype=dtype,
                force=force,
                started=lambda merge: started(merge, show),
                advance=advance,
            )
        if found.gained:
            typer.echo(
                f"superlora merge: warning: {len(found.gained)} layers gained a bias, which "
                "from_pretrained drops where the model's class has none",
                err=True,
            )
        if as_json:
            _print_json({"output": str(output), **found._asdict()})
        else:
            typer.echo(f"wrote {output}")


def inspect(
    adapter: Annotated[Path, typer.Argument(help="A file or folder of superlora, PEFT, LyCORIS.")],
    plot: Annotated[Path | None, typer.Option(help="Draw norms and ranks to a PNG file.")] = None,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Show an adapter's design, parameters, and the norms and effective ranks of its updates."""
    with command("inspect", *(["matplotlib"] if plot else [])):
        from superlora.torch.on_disk.adapters import inspect_adapter
        from superlora.torch.on_disk.writing import check_output

        if plot is not None:
            check_output(plot, [own for own in (adapter, base) if own is not None], force)
        found = inspect_adapter(adapter, base)
        own = found.adapter
        if plot is not None:
            _plot_norms(found.norms, plot)
        if as_json:
            _print_json(
                {
                    "format": found.kind,
                    "spec": own.plan.spec.to_dict(),
                    "scale": own.scale,
                    "dtype": str(own.dtype).removeprefix("torch."),
                    "parameters": own.num_parameters,
                    "dense": own.plan.num_dense,
                    "updates": {
                        name: {"shape": list(own.plan.shapes[name]), **norms._asdict()}
                        for name, norms in found.norms.items()
                    },
                    "replaced": {name: list(shape) for name, shape in found.replaced.items()},
                    "gains_bias": own.gains_bias,
                    "dropout": own.dropout.values if own.dropout.on else {},
                }
            )
            return
        typer.echo(own.plan.describe())
        rows = [
            [name, " x ".join(map(str, own.plan.shapes[name])), *(f"{each:.4g}" for each in norms)]
            for name, norms in found.norms.items()
        ]
        _print_table(("update", "shape", "spectral", "Frobenius", "effective rank"), rows)
        typer.echo(
            f"{found.kind}, {own.dtype}, scale {own.scale:g}: {own.num_parameters:,} parameters "
            f"for {own.plan.num_dense:,} entries; all numbers are finite"
        )
        for name, shape in found.replaced.items():
            typer.echo(f"brings {name} of shape {list(shape)}")
        for name in own.gains_bias:
            typer.echo(f"gives a bias to {name}")


def diff(
    first: Annotated[Path, typer.Argument(help="A checkpoint, or an adapter.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """List which tensors of two checkpoints differ, or updates of two adapters, and by how much.

    Exits with 0 where nothing differs, 1 where something does, and 2 on an error.
    """  # noqa: DOC501  (it is the help)
    try:
        with command("diff"):
            from superlora.torch.on_disk.compare import diff_files

            found = diff_files(first, second, base)
            if as_json:
                _print_json([_finite(own._asdict()) for own in found])
            elif found:
                _print_table(
                    ("name", "differs in", "relative norm", "largest"),
                    [[own.name, own.why, *map(_number, own[2:])] for own in found],
                )
    except typer.Exit as ended:
        raise typer.Exit(2 if ended.exit_code == 1 else ended.exit_code) from None
    raise typer.Exit(int(bool(found)))


def average(
    paths: Annotated[list[Path], typer.Argument(help="Checkpoints, or adapters, two at least.")],
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="One for each, with commas between. Default: equal ones.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the weighted mean of checkpoints tensor by tensor, or of adapters."""
    with command("average"):
        from superlora.torch.on_disk.compare import average_files

        numbers = None if weights is None else _numbers(weights)
        with _progress() as (_, advance):
            average_files(paths, output, numbers, force=force, advance=advance)
        if as_json:
            _print_json({"output": str(output)})
        else:
            typer.echo(f"wrote {output}")


def extract(
    base: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of a model.")],
    tuned: Annotated[Path, typer.Argument(help="The same model, fine-tuned.")],
    output: Output,
    preset: Preset,
    rank: Rank = None,
    budget: Budget = None,
    targets: Targets = None,
    fields: Fields = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Bring other changed parameters whole: all, a regular expression for whole names, "
            "or several ends of names."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of frozen blocks and of random starts.")] = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the adapter that comes nearest to what a fine-tune changed.

    Of weights that share blocks all differences are in memory at a time, else of one.
    """
    with command("extract"):
        from superlora.torch.on_disk.fitting import extract_files

        most = _most(rank, budget)

        def started(plan: Any, peak: int) -> None:
            typer.echo(
                f"{len(plan.shapes)} weights, {plan.num_parameters:,} parameters; at most "
                f"{_size(peak)} of memory",
                err=True,
            )

        found = extract_files(
            base,
            tuned,
            output,
            make_spec(preset, rank, fields)
            if most is None
            else lambda own: make_spec(preset, own, fields),
            chosen(targets),
            budget=most,
            also="all" if also == ["all"] else chosen(also) if also else None,
            seed=seed,
            force=force,
            started=started,
        )
        if as_json:
            _print_json(
                {
                    "output": str(output),
                    "spec": found.plan.spec.to_dict(),
                    "parameters": found.plan.num_parameters,
                    "error": found.report.error,
                    "errors": _finite(found.report.errors),
                    "converged": found.report.converged,
                    "replaced": _finite(found.replaced),
                    "left": _finite(found.left),
                }
            )
            return
        typer.echo(str(found.report))
        typer.echo(f"wrote {output}: {found.plan!r}")
        for name, change in found.replaced.items():
            typer.echo(f"brings {name}, changed by {change:.2e}")
        for name, change in found.left.items():
            typer.echo(f"changed too, and left out: {name}, by {change:.2e}")


def convert(
    source: Annotated[Path, typer.Argument(help="A file or folder of superlora, PEFT, LyCORIS.")],
    output: Annotated[Path, typer.Argument(help="The file, or for PEFT the folder, to write.")],
    to: Annotated[str, typer.Option(help="superlora, peft, lycoris, kohya, comfy or diffusers.")],
    design: Annotated[
        str | None, typer.Option("--as", help="Another preset, fitted to the updates.")
    ] = None,
    rank: Rank = None,
    budget: Budget = None,
    energy: Energy = None,
    fields: Fields = None,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the format of another program, and of another design if asked."""
    with command("convert"):
        from superlora.torch.on_disk.fitting import convert_files, shapes_of, spec_under

        spec: Any = design
        if design == "lora" and budget is None and not fields:
            if rank is None and energy is None:
                raise ValueError("--as lora must have a --rank, an --energy or a --budget")
        elif design is not None:
            if energy is not None:
                raise ValueError("--energy must come with --as lora, or without --as")
            most = _most(rank, budget)
            spec = make_spec(design, rank, fields)
            if most is not None:
                shapes = shapes_of(source, base)
                spec = spec_under(most, lambda own: make_spec(design, own, fields), shapes)
            rank = None
        elif budget is not None or fields:
            raise ValueError("--budget and --set must come with --as")
        errors = convert_files(
            source, output, to, base=base, spec=spec, rank=rank, energy=energy, force=force
        )
        _print_errors(source, output, errors, as_json)


def resize(
    adapter: Annotated[Path, typer.Argument(help="A file or folder of superlora, PEFT, LyCORIS.")],
    output: Output,
    rank: Annotated[
        int | None, typer.Option(min=1, help="The new rank, below the adapter's.")
    ] = None,
    energy: Energy = None,
    base: Base = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter of the same design and format, and of a smaller rank."""
    with command("resize"):
        from superlora.torch.on_disk.fitting import resize_files

        errors = resize_files(adapter, output, rank, energy=energy, base=base, force=force)
        _print_errors(adapter, output, errors, as_json)


COMMANDS = (plan, extract, merge, inspect, convert, resize, diff, average)


def _most(rank: int | None, budget: str | None) -> int | None:
    """Return a budget as a number of parameters in single precision, None where there is none."""
    if budget is None:
        return None
    if rank is not None:
        raise ValueError("--rank and --budget must not both be given")
    number, unit = parse_budget(budget)
    return number // 4 if unit == "bytes" else number


def _print_errors(source: Path, output: Path, errors: dict[str, float], as_json: bool) -> None:
    before, after = (_tensor_bytes(path) for path in (source, output))
    if as_json:
        found = {"output": str(output), "bytes": after, "errors": _finite(dict(errors))}
        _print_json(found)
        return
    rows = [[name, "", f"{error:.2e}" if error else "exact"] for name, error in errors.items()]
    _print_table(("update", "", "relative error"), rows)
    typer.echo(f"wrote {output}: {after:,} bytes of tensors, where {source} has {before:,}")


def _tensor_bytes(path: Path) -> int:
    """Return the bytes of all tensors of an adapter's files."""
    from superlora.torch.files.safetensors_file import read_header

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return sum(stop - start for own in files for *_, start, stop in read_header(own)[1].values())


def make_spec(preset: str, rank: int | None, fields: Sequence[str] | None) -> Any:
    """Return what a preset makes of a rank and of fields."""
    from superlora import Spec, presets

    if preset not in presets.__all__:
        raise ValueError(f"--preset must be one of {', '.join(presets.__all__)}: got {preset!r}")
    values: dict[str, Any] = {} if rank is None else {"rank": rank}
    for field in fields or ():
        key, equals, text = field.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--set must be field=value: got {field!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if key in values:
            raise ValueError(
                f"--set must give a field once, which no other option gives: got {field!r}"
            )
        values[key] = value
    make = getattr(presets, preset)
    known = [own for own in inspect_module.signature(make).parameters if own != "changes"]
    known += [own.name for own in dataclasses.fields(Spec) if own.name not in known]
    for key in values:
        if key not in known:
            raise ValueError(f"--set must name one of {', '.join(known)}: got {key!r}")
    try:
        return make(**values)
    except TypeError as error:  # an unknown field, or one of another type
        raise ValueError(f"--preset {preset}: {error}") from None


def chosen(targets: Sequence[str] | None) -> str | list[str]:
    """Return targets as `attach` takes them: one may be a pattern, several are ends of names."""
    if not targets:
        return "all-linear"
    names = [name for own in targets for name in own.split(",")]
    if len(targets) == 1 and len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]):
        return names[0]
    return names


def parse_budget(text: str) -> tuple[int, str]:
    """Return a budget such as 100k, 1.5M or 400kB as a number, and of what."""
    unit = "bytes" if text.endswith("B") else "parameters"
    digits = text.removesuffix("B")
    factors = {"k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
    factor = factors.get(digits[-1:], 1)
    try:
        number = float(digits[:-1] if factor > 1 else digits) * factor
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1):
        raise ValueError(f"--budget must be a number such as 100k, 1.5M or 400kB: got {text!r}")
    return int(number), unit


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between: got {text!r}") from None


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _finite(said: dict[str, Any]) -> dict[str, Any]:
    """Return values that JSON has: no NaN or infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in said.items()
    }


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, allow_nan=False))


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < 2 else "right", no_wrap=place != 1)
    for row in rows:
        table.add_row(*row)
    Console(width=1000).print(table)  # which a terminal wraps


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Yield what sets the number of bytes to write, and what counts those that were written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    if not sys.stderr.isatty():  # some releases end a hidden bar with an empty line
        yield (lambda total: None, lambda count: None)
        return
    columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)
        yield (
            lambda total: bars.update(bar, total=total),
            lambda count: bars.update(bar, advance=count),
        )


def _plot_norms(norms: dict[str, Any], path: Path) -> None:
    """Draw the norms and the effective ranks of updates, one below the other."""
    from superlora.plot import new_figure

    figure, (left, right) = new_figure(2, 3.6, 1.5 + 0.22 * len(norms))
    names = list(norms)
    left.barh(names, [own.frobenius for own in norms.values()], label="Frobenius norm")
    left.barh(names, [own.spectral for own in norms.values()], height=0.4, label="spectral norm")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=7)
    right.barh(names, [own.effective_rank for own in norms.values()], color="C2")
    right.invert_yaxis()
    right.set_yticks([])
    right.set_xlabel("effective rank")
    left.set_xlabel("norm of the update")
    figure.savefig(path, format="png", dpi=150)
