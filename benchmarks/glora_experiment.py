"""GLoRA's supernet and search on a real transformer, against methods of fixed form.

All 48 linear layers of the demo's ViT-S/14 (query, key and value as one) are adapted to a small
set of MNIST digits. Each seed decides the images of the parts, their order and the start. A
supernet is trained once for each space, then searched once for each limit of parameters,
on the validation part alone. Every measured point is kept in the cache, and a search in its
study, so that an interrupted run goes on.

Run: ``python benchmarks/glora_experiment.py`` for the table and the figures of the docs,
``--quick`` to see that all runs (the docs are left as they are), ``--tune`` for the validation
accuracies at other learning rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import platform
import sys
import time
from pathlib import Path

import glora_plots
import measuring
import torch
from glora_plots import LETTERS
from glora_points import (
    FULL,
    QUICK,
    Lab,
    Row,
    Setup,
    all_points,
    baseline,
    random_accuracy,
    space,
    summary,
    supernet,
)

import superlora
from superlora.demo.data import Splits, read_digits, split
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.vit import load_onnx

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))
from tables import between, replaced  # noqa: E402  (lies beside the docs)

PAGE = DOCS / "glora-experiment.md"
FIGURES = """\
What the layers chose, a line a seed. A colour that all lines of an operation have in one place
would be a preference of that layer. All seeds agree in {agreed:,} of {count:,} choices; it would
be {expected:.0f} if each search had shuffled its own over the layers.

![For each support tensor and layer, the option of each search](_static/glora-choices.svg)

Where the parameters went:

![Shares of the parameters by the type of the layer](_static/glora-parameters.svg)"""
FACTORS = (0.3, 1.0, 3.0)  # of the learning rates, to tune them
RANDOM = 20  # configurations that say how good a supernet is


def table(rows: list[Row]) -> str:
    """Return the Markdown table of the summary."""

    def cell(row: Row, field: str) -> str:
        std = row.get(f"{field}_std")
        return f"{100 * row[field]:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")

    lines = [
        "| method | parameters | test accuracy, % | validation, % | training, s | search, s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in summary(rows):
        search = f"{row['search_seconds']:.0f}" if "search_seconds" in row else ""
        lines.append(
            f"| {row['method']} | {row['parameters']:,.0f} | {cell(row, 'test')} | "
            f"{cell(row, 'validation')} | {row['seconds']:.0f} | {search} |"
        )
    return "\n".join(lines)


def generations(rows: list[Row]) -> str:
    """Return the Markdown table of what searching gained over the first generation."""
    lines = [
        "| search | first generation's mean, % | its best, % | best found, % | tested, % |",
        "|---|--:|--:|--:|--:|",
    ]
    names = dict.fromkeys(row["method"] for row in rows if "limit" in row)
    for name in names:
        own = [row for row in rows if row["method"] == name]
        fields = ("first_generation_mean", "first_generation_best", "validation", "test")
        means = [sum(100 * row[field] for row in own) / len(own) for field in fields]
        lines.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def settings(setup: Setup) -> str:
    """Return the settings in words."""
    (train, validation, test), evolution = setup.digits, setup.evolution
    rates = ", ".join(f"{method.name} {method.rate:g}" for method in setup.methods)
    nets = [
        f"| rates of {name} | "
        + ", ".join(f"{LETTERS[operation]} {rate:g}" for operation, rate in own.rates.items())
        + " |"
        for name, own in setup.supernets.items()
    ]
    return "\n".join(
        (
            "| | |",
            "|---|---|",
            f"| images | {train:,} to train, {validation:,} to search and tune, "
            f"{test:,} to test, at {setup.resolution} px |",
            f"| seeds | {len(setup.seeds)}, each with its own images, order and start |",
            f"| methods of fixed form | {setup.steps(setup.epochs):,} steps of "
            f"{setup.batch_size} images |",
            f"| supernets | {setup.steps(setup.supernet_epochs):,} such steps, each with a new "
            "random configuration |",
            f"| search | {setup.trials} configurations: populations of {evolution.population}, "
            f"{evolution.parents} parents, {evolution.mutations} mutations, {evolution.crossovers} "
            "crossovers |",
            "| optimiser | AdamW without weight decay, a tenth of the steps to warm up, then a "
            f"cosine; gradients clipped at norm 1; the head's rate is {setup.head_rate:g} |",
            f"| rates | {rates} |",
            *nets,
        )
    )


def write(rows: list[Row], lab: Lab, output: Path, docs: Path | None) -> None:
    """Write rows and figures to the output, and to the docs where they are given."""
    about = measuring.facts() | {"setup": repr(lab.setup)}
    flat = [{k: v for k, v in row.items() if k != "configuration"} for row in rows]
    measuring.write(output, "glora-experiment", flat, about)
    (output / "glora-experiment.md").write_text(f"{table(rows)}\n\n{generations(rows)}\n", "utf-8")
    chosen = [row for row in rows if "configuration" in row]
    measuring.write(output, "glora-configurations", chosen, about)
    spaces = {name: space(lab, name) for name in lab.setup.supernets}
    for folder in [output] if docs is None else [output, docs / "_static"]:
        glora_plots.choices(chosen, folder / "glora-choices.svg")
        glora_plots.parameters(chosen, spaces, folder / "glora-parameters.svg")
    if docs is not None:
        page = docs / PAGE.name
        text = page.read_text("utf-8")
        parts = {
            "glora-settings": settings(lab.setup),
            "glora-table": table(rows),
            "glora-generations": generations(rows),
            "glora-machine": machine(about),
            "glora-figures": figures(chosen),
        }
        for marker, content in parts.items():
            between(text, marker)  # raises where the page lacks the marker
            text = replaced(text, marker, content)
        page.write_text(text, "utf-8")


def figures(rows: list[Row]) -> str:
    """Return the figures with what they show."""
    count, agreed, expected = glora_plots.agreement(rows)
    return FIGURES.format(count=count, agreed=agreed, expected=expected)


def machine(about: Row) -> str:
    """Return a line about what was measured with."""
    return (
        f"Measured with {about['threads']} threads of a {about['processor']} with "
        f"{about['cores']} cores, torch {about['torch']} and Python {about['python']}."
    )


def tune(lab: Lab, only: str) -> list[Row]:
    """Return validation accuracies at other learning rates, of the first seed.

    For a supernet, the rate is a share of all the operations' own.
    """
    seed = lab.setup.seeds[0]
    rows: list[Row] = []

    def add(name: str, rate: float, values: list[float]) -> None:
        rows.append({"method": name, "rate": rate, "validation": sum(values) / len(values)})
        lab.say(f"{name:40} {rate:9.2g} {rows[-1]['validation']:8.2%}")

    for method in (method for method in lab.setup.methods if only in method.name):
        for factor in FACTORS:
            other = dataclasses.replace(method, rate=factor * method.rate)
            add(method.name, other.rate, [baseline(lab, other, seed)["validation"]])
    for name, settings in lab.setup.supernets.items():
        if only not in f"supernet {name}":
            continue
        for factor in FACTORS:
            rates = {operation: factor * rate for operation, rate in settings.rates.items()}
            other = {name: dataclasses.replace(settings, rates=rates)}
            own = dataclasses.replace(lab, setup=dataclasses.replace(lab.setup, supernets=other))
            _, trained = supernet(own, name, seed)
            values = random_accuracy(own, trained, seed, RANDOM)
            add(f"supernet {name}, random configurations", factor, values)
    return rows


def main() -> None:
    """Measure one form of the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; the docs stay")
    parser.add_argument("--tune", action="store_true", help="other learning rates, seed 0 alone")
    parser.add_argument("--only", default="", help="a part of the names of what is tuned")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--threads", type=int, help="by default torch decides")
    parser.add_argument("--no-docs", action="store_true", help="leave the docs as they are")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    cache = Path(os.environ.get("SUPERLORA_CACHE") or _user_cache())
    setup = QUICK if options.quick else FULL
    digits = read_digits(fetch(MNIST, cache))

    @functools.cache
    def images(seed: int) -> Splits:
        train, validation, test = setup.digits
        return split(digits, train=train, validation=validation, test=test, seed=seed)

    say = functools.partial(print, flush=True)
    base = load_onnx(fetch(VIT, cache))
    lab = Lab(base, images, setup, cache / "glora-points", surroundings(), say)
    output = options.output / "quick" if options.quick else options.output
    try:
        if options.tune:
            measuring.write(output, "glora-tuning", tune(lab, options.only), measuring.facts())
        else:
            rows = all_points(lab)
            write(rows, lab, output, None if options.quick or options.no_docs else DOCS)
            print(f"\n{table(rows)}\n\n{generations(rows)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run it again to go on")
    print(f"{time.perf_counter() - start:.0f} s; results are in {output}")


def surroundings() -> Row:
    """Return what a point depends on besides its settings, as JSON values."""
    return {
        "superlora": superlora.__version__,
        "model_sha256": VIT.sha256,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _user_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("superlora")


if __name__ == "__main__":
    main()
