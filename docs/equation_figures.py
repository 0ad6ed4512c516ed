"""One figure for each stage of the equation, drawn from plans while the pages are built."""

from __future__ import annotations

import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import superlora as sl

# Two layers with two weights each, as on the pages.
SHAPES = {"0.query": (8, 6), "0.value": (4, 6), "1.query": (8, 6), "1.value": (4, 6)}
COLOURS = dict(zip(SHAPES, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), strict=True))
Factors = dict[str, numpy.ndarray]


def _drawn(plan: sl.Plan) -> Factors:
    """Return random factors of a plan."""
    rng = numpy.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in plan.factor_shapes.items()}


def _show(axes: Axes, matrix: numpy.ndarray, title: str, largest: float | None = None) -> None:
    """Draw the entries of a matrix: blue above zero, red below it."""
    largest = largest or float(numpy.abs(matrix).max())
    axes.imshow(matrix, cmap="RdBu", vmin=-largest, vmax=largest, interpolation="nearest")
    axes.set_title(title, size=9)
    axes.set(xticks=[], yticks=[])


def _sign(axes: Axes, text: str) -> None:
    """Write a sign of arithmetic in the place of a picture."""
    axes.text(0.5, 0.5, text, ha="center", va="center", size=16)
    axes.axis("off")


def _times(*matrices: numpy.ndarray) -> tuple[list[Axes], list[Axes]]:
    """Return places for matrices of one scale, and the narrow ones for the signs between them."""
    widths = [float(matrix.shape[1]) for matrix in matrices]
    ratios = [size for width in widths for size in (width, 1.5)][:-1]
    scale = 7 / sum(ratios)
    height = scale * max(len(matrix) for matrix in matrices) + 0.5
    _, places = pyplot.subplots(
        1, len(ratios), figsize=(7, height), width_ratios=ratios, layout="constrained"
    )
    return list(places[::2]), list(places[1::2])


def grouping() -> None:
    """Draw the vector of all updates, and where it is cut into groups."""
    choices: dict[str, int | str] = {
        'groups="weight"': "weight",
        'groups="layer"': "layer",
        "groups=3": 3,
        "groups=1": 1,
    }
    _, axes = pyplot.subplots(figsize=(9, 2.6), layout="constrained")
    for row, groups in enumerate(choices.values()):
        plan = sl.Plan(sl.Spec(rank=2, groups=groups, fold="balanced"), SHAPES)
        left = 0
        cuts = []
        for name in SHAPES:
            for place in plan.where(name):
                width = place.stop - place.start
                label = name if not row and place.start == 0 else None
                axes.barh(row, width, 0.6, left, color=COLOURS[name], label=label)
                if left and place.start == 0:
                    cuts.append(left)
                left += width
        axes.vlines(cuts, row - 0.45, row + 0.45, color="black", linewidth=4)
        axes.text(left + 2, row, f"{plan.num_parameters} parameters", va="center", size=9)
    axes.set_yticks(range(len(choices)), choices)
    axes.invert_yaxis()
    axes.set(xlim=(0, 172), xticks=[0, 48, 72, 120, 144], xlabel="entry of the joined vector")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def folding() -> None:
    """Draw which weight each entry of a fold belongs to."""
    shapes = {name: (12, 8) for name in SHAPES}
    designs = {
        '"natural"': sl.Spec(rank=2),
        '"stack"': sl.Spec(rank=2, groups=1, fold="stack"),
        '"balanced"': sl.Spec(rank=2, groups=1, fold="balanced"),
        '"balanced", order 3': sl.Spec(rank=2, groups=1, fold="balanced", order=3),
    }
    figure, places = pyplot.subplots(1, 4, figsize=(9, 3.6), layout="constrained")
    for axes, (name, spec) in zip(places, designs.items(), strict=True):
        plan = sl.Plan(spec, shapes)
        fold = plan.where("0.query")[0].fold
        colours = numpy.ones((*fold, 3))
        for weight in shapes:
            for place in plan.where(weight):
                if place.group == 0:
                    for box in place.boxes:
                        inside = tuple(slice(first, last) for first, last in box)
                        colour = COLOURS[weight].lstrip("#")
                        colours[inside] = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        if len(fold) == 3:  # the slices of the first mode below each other
            slices = [
                numpy.ones((1, fold[2], 3)) if odd else own for own in colours for odd in (0, 1)
            ]
            colours = numpy.concatenate(slices[:-1])
        axes.imshow(colours, interpolation="nearest")
        groups = len(plan.layout.groups)
        of_all = f", group 1 of {groups}" if groups > 1 else ""
        sizes = " × ".join(map(str, fold))
        axes.set_title(f"{name}{of_all}\n{sizes}\n{plan.num_parameters} parameters", size=9)
        axes.set(xticks=[], yticks=[])
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=4, frameon=False)


def tucker() -> None:
    """Draw the factors and the core of one weight, and their product."""
    plan = sl.Plan(sl.lora(rank=3, core="full"), {"weight": (12, 9)})
    factors = _drawn(plan)
    left, core, right = (factors[f"0.0.{leaf}"] for leaf in ("factor0", "core", "factor1"))
    update = plan.delta(factors, "weight")
    places, signs = _times(left, core, right.T, update)
    titles = ("factor $A_1$", "core $C$", r"factor $A_2^\mathsf{T}$", r"$\Delta W$")
    for axes, matrix, title in zip(places, (left, core, right.T, update), titles, strict=True):
        rows, columns = matrix.shape
        _show(axes, matrix, f"{title}\n{rows} × {columns}")
    for axes, sign in zip(signs, ("·", "·", "="), strict=True):
        _sign(axes, sign)


def kronecker() -> None:
    """Draw two splits and their Kronecker product."""
    plan = sl.Plan(sl.Spec(rank="full", splits=2), {"weight": (8, 9)})
    factors = _drawn(plan)
    first, second = factors["0.0.core"], factors["0.1.core"]
    update = plan.delta(factors, "weight")
    places, signs = _times(first, second, update)
    for axes, matrix, title in zip(
        places, (first, second, update), ("$X_1$", "$X_2$", r"$X_1 \otimes X_2$"), strict=True
    ):
        rows, columns = matrix.shape
        _show(axes, matrix, f"{title}: {rows} × {columns}")
    rows, columns = second.shape
    for row in range(1, len(first)):
        places[2].axhline(rows * row - 0.5, color="black", linewidth=1)
    for column in range(1, first.shape[1]):
        places[2].axvline(columns * column - 0.5, color="black", linewidth=1)
    for axes, sign in zip(signs, ("⊗", "="), strict=True):
        _sign(axes, sign)


def fixed_map() -> None:
    """Draw the matrices of maps, as a plan has them."""
    fixed = {
        "one-hot": sl.maps.OneHot(),
        "fastfood": sl.maps.Fastfood(),
        "fastfood, signs": sl.maps.Fastfood(values="sign"),
        "separable": sl.maps.Separable(),
    }
    _, places = pyplot.subplots(1, len(fixed), figsize=(9, 3.9), layout="constrained")
    for axes, (name, each) in zip(places, fixed.items(), strict=True):
        spec = sl.Spec(rank="full", groups=1, fold="balanced", ratio=0.25, map=each)
        plan = sl.Plan(spec, {"weight": (8, 6)})
        (fold,) = plan.factor_shapes.values()  # of full rank: the folded tensor itself is trained
        units = numpy.eye(plan.num_parameters).reshape(-1, *fold)
        columns = [plan.delta({"0.0.core": unit}, "weight").ravel() for unit in units]
        matrix = numpy.stack(columns, axis=1)
        size, before = matrix.shape
        _show(axes, matrix, f"{name}: {size} × {before}")


def scatter() -> None:
    """Draw one folded tensor, and the updates that are cut from it."""
    plan = sl.Plan(sl.Spec(rank=2, groups=1, fold="balanced"), SHAPES)
    factors = _drawn(plan)
    folded = sl.tucker(None, [factors["0.0.factor0"], factors["0.0.factor1"]])
    largest = float(numpy.abs(folded).max())
    figure = pyplot.figure(figsize=(9, 3.4), layout="constrained")
    parts = figure.add_gridspec(2, 3, width_ratios=[1.6, 1, 1])
    whole = figure.add_subplot(parts[:, 0])
    _show(whole, folded, "the folded tensor of one group: 12 × 12", largest)
    for name in SHAPES:
        for place in plan.where(name):
            for (top, bottom), (first, last) in place.boxes:
                corner = first - 0.4, top - 0.4  # inside of its entries
                sides = last - first - 0.2, bottom - top - 0.2
                outline = Rectangle(corner, *sides, fill=False, ec=COLOURS[name], lw=3)
                whole.add_patch(outline)
    updates = plan.deltas(factors)
    for index, (name, update) in enumerate(updates.items()):
        axes = figure.add_subplot(parts[index // 2, 1 + index % 2])
        rows, columns = update.shape
        _show(axes, update, f"{name}: {rows} × {columns}", largest)
        for spine in axes.spines.values():
            spine.set(color=COLOURS[name], linewidth=3)


def merge() -> None:
    """Draw a weight, its change by two merge operations, and the merged weight."""
    rng = numpy.random.default_rng(1)
    weight, bias = rng.normal(size=(8, 12)), numpy.zeros(8)
    designs = {
        "add_weight": (sl.lora(rank=1), "+", r"$S$, of rank 1", "$W_0 + S$"),
        "scale_weight": (
            sl.dense(map=sl.maps.Broadcast(along="inputs")),
            "+",
            r"$W_0 \circ S$, a number for each row",
            r"$W_0 + W_0 \circ S$",
        ),
    }
    ratios = [12, 1.5, 12, 1.5, 12]
    _, rows = pyplot.subplots(2, 5, figsize=(9, 4.2), width_ratios=ratios, layout="constrained")
    for places, (operation, (spec, sign, change, result)) in zip(
        rows, designs.items(), strict=True
    ):
        plan = sl.Plan({operation: spec}, {"layer": weight.shape})
        merged, _ = plan.merge(_drawn(plan), "layer", weight, bias)
        largest = float(numpy.abs(merged).max())
        _show(places[0], weight, "$W_0$", largest)
        _sign(places[1], sign)
        _show(places[2], merged - weight, f"{operation}: {change}", largest)
        _sign(places[3], "=")
        _show(places[4], merged, f"merged: {result}", largest)
