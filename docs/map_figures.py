"""The figures of `maps.md`: ``python docs/map_figures.py`` draws them anew.

The one of costs is drawn from what ``python benchmarks/bench_maps.py --csv FILE`` measured:
``python docs/map_figures.py FILE``.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes

from superlora import maps

HERE = Path(__file__).parent / "_static"
BEFORE, AFTER = 250, 1000
SEEDS = 200


def matrix(fixed: maps.Map, before: int, after: int) -> numpy.ndarray:
    """Return a map's matrix, (after, before)."""
    return numpy.stack([fixed.apply(column, after) for column in numpy.eye(before)], axis=1)


def separable(seed: int, ratio: int = 4, **fields: object) -> maps.Separable:
    """Return a separable map of two modes to the size above, and nearly from its share."""
    inner = maps.Fastfood(seed=seed, **fields)  # type: ignore[arg-type]
    shares = {8: (9, 14), 4: (10, 25), 2: (20, 25), 1: (25, 40)}
    return maps.Separable(inner=inner, before=shares[ratio], after=(25, 40))


FAMILIES = {
    "Fastfood, paper": lambda seed: maps.Fastfood(seed=seed),
    "Fastfood, Le et al.": lambda seed: maps.Fastfood(seed=seed, order="le"),
    "Fastfood, stacked": lambda seed: maps.Fastfood(seed=seed, blocks="stacked"),
    "Fastfood, signs": lambda seed: maps.Fastfood(seed=seed, values="sign"),
    "Gaussian": lambda seed: maps.Gaussian(seed=seed),
    "Separable": separable,
    "Separable, signs": lambda seed: separable(seed, values="sign"),
    "OneHot": lambda seed: maps.OneHot(seed=seed),
}


def table() -> str:
    """Return the distortions and condition numbers, a row for each family."""
    generator = numpy.random.default_rng(0)
    inputs = {
        "random": generator.standard_normal(BEFORE),
        "constant": numpy.ones(BEFORE),
        "rank one": numpy.kron(generator.standard_normal(10), generator.standard_normal(25)),
    }
    lines = [
        "| map | " + " | ".join(inputs) + " | condition at 1/8 | at 1/4 | at 1/2 | at 1 |",
        "|---|" + "--:|" * (len(inputs) + 4),
    ]
    for name, family in FAMILIES.items():
        cells = []
        for x in inputs.values():
            norms = []
            for seed in range(SEEDS):
                y = family(seed).apply(x, AFTER)
                norms.append((y @ y) / (x @ x))
            cells.append(f"{numpy.mean(norms):.3f} ± {numpy.std(norms):.3f}")
        for ratio in (8, 4, 2, 1):
            cells.append(_condition(family, ratio))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _condition(family: object, ratio: int) -> str:
    before = AFTER // ratio
    found = []
    for seed in range(5):
        fixed = family(seed)  # type: ignore[operator]
        if isinstance(fixed, maps.Separable):
            fixed = separable(seed, ratio, values=fixed.inner.values)  # type: ignore[attr-defined]
            before = numpy.prod(fixed.before)
        values = numpy.linalg.svd(matrix(fixed, before, AFTER), compute_uv=False)
        found.append(values[0] / values[-1])
    return f"{numpy.median(found):.3g}"


def draw_figure_three(path: Path) -> None:
    """Draw the paper's Figure 3, fastfood and its variants, from the library's own draws."""
    before, after = 6, 14
    fixed = maps.Fastfood(seed=1)
    figure, rows = pyplot.subplots(4, 1, figsize=(8.5, 8.2), height_ratios=[16, 12, 14, 9])
    _chain(rows[0], "fastfood, single (SuperLoRA, Fig. 3)", fixed, before, after)
    _chain(
        rows[1],
        "fastfood, stacked: the first of two blocks",
        maps.Fastfood(seed=1, blocks="stacked"),
        before,
        after,
    )
    _products(
        rows[2],
        "one-hot, signed and tiled (left), separable (middle), shuffle (right)",
        [
            matrix(maps.OneHot(seed=1), before, after).T,
            matrix(
                maps.Separable(inner=maps.Fastfood(values="sign"), before=(2, 3), after=(4, 4)),
                before,
                after,
            ).T,
            matrix(maps.Shuffle(seed=1), after, after).T,
        ],
    )
    _products(
        rows[3],
        "the whole maps of the first row (left) and the second (right), their blocks side by side",
        [
            matrix(fixed, before, after).T,
            matrix(maps.Fastfood(seed=1, blocks="stacked"), before, after).T,
        ],
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _chain(axes: Axes, title: str, fixed: maps.Fastfood, before: int, after: int) -> None:
    """Draw the row-vector product vec(x) H' diag(G) Π H diag(B), for the first block."""
    width, _ = fixed._blocks(before, after)
    hadamard = numpy.array(
        [[(-1) ** bin(i & j).count("1") for j in range(width)] for i in range(width)], dtype=float
    )
    drawn = fixed.constants(before, after)
    order = drawn["positions"]
    kept = min(after, width)
    factors = [
        numpy.linspace(0.2, 1, before)[None],
        hadamard[:before],
        numpy.diag(drawn["values"].astype(float)),
        numpy.eye(width)[:, order],
        hadamard[:, :kept],
        numpy.diag(drawn["signs"][:kept].astype(float)),
    ]
    _products(axes, title, factors, ["x", "H'", "diag G", "Π", "H", "diag B"])


def _products(
    axes: Axes, title: str, factors: list[numpy.ndarray], names: list[str] | None = None
) -> None:
    left, highest = 0.0, max(len(factor) for factor in factors)
    for index, factor in enumerate(factors):
        rows, columns = factor.shape
        largest = numpy.abs(factor).max()
        axes.imshow(
            factor,
            extent=(left, left + columns, -rows, 0),
            cmap="RdBu",
            vmin=-largest,
            vmax=largest,
            interpolation="nearest",
        )
        if names:
            axes.text(left + columns / 2, 0.4, names[index], ha="center", fontsize=9)
        left += columns + 3
    axes.set_xlim(-1, left)
    axes.set_ylim(-highest - 0.5, 2)
    axes.set_title(title, fontsize=9, loc="left")
    axes.axis("off")


def draw_costs(source: Path, path: Path) -> None:
    """Draw time against size from the rows of the benchmark."""
    with source.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(7, 4.3))
    for name in dict.fromkeys(row["map"] for row in rows):
        own = [(int(r["size"]), float(r["apply_ms"])) for r in rows if r["map"] == name]
        axes.loglog(*zip(*own, strict=True), "o-", label=name)
    axes.set_xlabel("entries of the group")
    axes.set_ylabel("apply, ms")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Draw all figures and print the table."""
    draw_figure_three(HERE / "maps-fastfood.png")
    if len(sys.argv) > 1:
        draw_costs(Path(sys.argv[1]), HERE / "maps-costs.png")
    print(table())


if __name__ == "__main__":
    main()
