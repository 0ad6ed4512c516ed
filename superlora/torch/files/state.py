"""An adapter's file: every factor once, beside the design; its header written, read and checked."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora.algebra.frozen import fingerprint
from superlora.checks import check_count
from superlora.design.axes import Axes
from superlora.design.patterns import check_cost
from superlora.design.spec import Spec
from superlora.design.supports import OF_BIAS, OPERATIONS, Supports, design_from_dict
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.blocks import Blocks, scale_in_force
from superlora.torch.dropout import Dropout
from superlora.torch.files import strict_json
from superlora.torch.files.safetensors_file import (
    Header,
    other_shapes,
    short,
    unfit_dtypes,
    write_tensors,
)
from superlora.torch.layers import Weight
from superlora.torch.replaced import Replaced
from superlora.torch.site import Site
from superlora.torch.walk import plain_name

FORMAT_VERSION = 1
# Before the names of the model's own parameters that come with the adapter.
MODEL = "model."
# One metadata key: safetensors writes several in no fixed order.
KEY = "superlora"
# In it, of a supernet.
SUPERNET = "supernet"
# All that a header may say. A field that is not here is refused: it would be lost in silence.
FIELDS = (
    "format_version",
    "spec",
    "weights",
    "scale",
    "without_bias",
    "frozen",
    "maps",
    SUPERNET,
    "rows",
    "tied",
    "shared",
    "dropout",
    "transposed",
)
# Characters of a header: of any, and for each weight that the model could have adapted.
_CHARACTERS = (1 << 16, 1 << 12)
# What reading a header of other values than ours can raise.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Between fingerprints: rounding changes one by less.
TOLERANCE = 1e-3
# What the maps of a plan draw never changes.
_CHECKSUMS: weakref.WeakKeyDictionary[Plan, dict[str, int]] = weakref.WeakKeyDictionary()


def save_blocks(
    blocks: Blocks,
    bare: list[str],
    replaced: Replaced | None,
    beside: Mapping[str, Any],
    path: Path,
) -> None:
    """Write an adapter's factors and description to `path`, atomically."""
    plan = blocks.plan
    held = {name: block.detach().cpu() for name, block in blocks.items()}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "spec": plan.spec.to_dict(),
        "weights": [[name, _written(axes)] for name, axes in plan.layout.layer_axes.items()],
        **beside,
    }
    if blocks.scale != plan.scale:
        header["scale"] = blocks.scale
    if bare:
        header["without_bias"] = bare
    tensors = {name: held[name] for name in stored_shapes(plan)}
    made = {name: block for name, block in held.items() if name not in tensors}
    if made:
        header["frozen"] = {name: print_of(block) for name, block in made.items()}
    checksums = checksums_of(plan)
    if checksums:
        header["maps"] = checksums
    if replaced is not None:
        tensors |= {MODEL + name: value for name, value in replaced.tensors().items()}
        if replaced.shared:
            header["shared"] = replaced.shared
    write_tensors(path, tensors, {KEY: json.dumps(header, separators=(",", ":"))})


@dataclass
class Description:
    """What a file's header says of its adapter: the scale and the layers' shapes as saved.

    `supernet` has what a supernet says of itself; None for another adapter. `rows` are those of
    weights that are some rows of a layer's, `tied` the weights that several layers share; `shared`
    are other names of parameters of the model that come with it; `transposed` are weights stored
    with the inputs first, None where an older file does not say it.
    """

    spec: Spec | Supports
    scale: float
    layers: dict[str, Axes]
    without_bias: set[str]
    prints: dict[str, float]
    checksums: dict[str, int]
    supernet: dict[str, Any] | None
    rows: dict[str, tuple[int, int]]
    tied: list[str]
    shared: dict[str, list[str]]
    dropout: Dropout
    transposed: list[str] | None


def _written(axes: Axes) -> list[int] | dict[str, Any]:
    """Return axes as a header has them."""
    return [*axes.shape] if axes.plain else dataclasses.asdict(axes)


def _read(axes: Any) -> Axes:
    return Axes(**axes) if isinstance(axes, dict) else Axes.of(tuple(axes))


def description_of(metadata: Mapping[str, str], path: Path, most: int) -> Description:
    """Return what a file's metadata says; a model of `most` weights bounds what it may cost."""
    if KEY not in metadata:
        raise ValueError(f"{path} must be a superlora adapter: its header does not say so")
    text, longest = metadata[KEY], _CHARACTERS[0] + _CHARACTERS[1] * most
    if len(text) > longest:
        raise ValueError(
            f"{path} must have a superlora header of at most {longest:,} characters for such a "
            f"model: got {len(text):,}"
        )
    try:
        header: dict[str, Any] = strict_json.parse(text)
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if type(error) is ValueError:  # JSON, but not of ours
            raise ValueError(f"{path} must have a valid superlora header: {error}") from None
        raise ValueError(
            f"{path} must have a readable superlora header: {short(repr(error))}"
        ) from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path} must be of format version {FORMAT_VERSION}: got {short(repr(version))}"
        )
    with valid_header(path):
        unknown = [key for key in header if key not in FIELDS]
        if unknown:
            raise ValueError(
                f"it must have only the fields {', '.join(FIELDS)}: got also "
                f"{some(map(repr, unknown))}, perhaps of a later version"
            )
        _check_overrides(header["spec"], most)
        spec = design_from_dict(header["spec"])
        layers = [(plain_name(name), _read(axes)) for name, axes in header["weights"]]
        names = [name for name, _ in layers]
        if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError("weights must have names, every one once")
        _check_patterns(spec, names)
        rows = {plain_name(name): _range(own) for name, own in header.get("rows", {}).items()}
        known = {*names, *(name.rpartition(".")[0] for name in rows)}
        for key in ("rows", "without_bias", "transposed"):
            strangers = [own for own in header.get(key, ()) if plain_name(own) not in known]
            if strangers:
                raise ValueError(f"{key} must be of weights: got {some(map(repr, strangers))}")
        in_force: Spec | Supports = spec
        if "scale" in header:
            if header["scale"] is None:
                raise ValueError("scale must be a number: got None")
            in_force = Spec(scale=header["scale"])
        prints = dict(header.get("frozen", {}))
        for number in prints.values():
            if isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"fingerprints must be numbers: got {number!r}")
        return Description(
            spec,
            in_force.scaling,
            dict(layers),
            set(map(plain_name, header.get("without_bias", ()))),
            prints,
            dict(header.get("maps", {})),
            header.get(SUPERNET),
            rows,
            [plain_name(name) for name in header.get("tied", ())],
            {name: [*map(str, own)] for name, own in header.get("shared", {}).items()},
            Dropout(header.get("dropout")),
            [*map(plain_name, header["transposed"])] if "transposed" in header else None,
        )


def _range(bounds: Any) -> tuple[int, int]:
    start, stop = bounds
    return check_count("rows", start, least=0), check_count("rows", stop)


@contextmanager
def valid_header(path: Path) -> Iterator[None]:
    """Name the file in the error that a value of another kind than ours raises."""
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{path} must have a valid superlora header: {short(error)}") from None


def _specs_in(design: Any) -> list[Any]:
    """Return the plain specs of a plain design."""
    if isinstance(design, dict) and set(design) == {"supports"}:
        return [own for _, own in design["supports"]]
    return [design]


def _check_overrides(design: Any, most: int) -> None:
    """Refuse overrides that cannot match a weight each, before they are read."""
    for own in _specs_in(design):
        overrides = own.get("overrides") if isinstance(own, dict) else None
        if overrides is not None and len(overrides) > len(OPERATIONS) * most:
            raise ValueError(
                f"overrides must match weights of their own, {len(OPERATIONS) * most} at most: got "
                f"{len(overrides)}"
            )


def _check_patterns(design: Spec | Supports, names: list[str]) -> None:
    """Refuse patterns that cost too much to match with weights."""
    designs = [((), design)] if isinstance(design, Spec) else design.designs
    for operations, own in designs:
        every = [f"{op}.{name}" for op in operations for name in names] or names
        check_cost([pattern for pattern, _ in own.overrides], every)


def check_biases(
    plan: Plan, weights: Mapping[str, Weight], description: Description, path: Path
) -> None:
    """Refuse layers whose bias an operation changes and that have one only here or in the file."""
    found = set(without_bias(plan, weights))
    problems = [
        f"{name!r} has {'no' if name in found else 'a'} bias"
        for name in plan.layout.layers
        if (name in found) != (name in description.without_bias)
    ]
    if problems:
        raise ValueError(
            f"layers must have a bias where they had one in {path}: {some(problems, 20)}"
        )


def without_bias(plan: Plan, weights: Mapping[str, Weight]) -> list[str]:
    """Return the layers that have no bias where an operation would change it."""
    return [
        name
        for name, own in plan.layout.supports.items()
        if not OF_BIAS.isdisjoint(own) and Site.bias_below(weights[name]) is None
    ]


def check_scales(plan: Plan, scale: float, dtype: torch.dtype, path: Path) -> None:
    """Refuse a scale that is no number of the factors' type, for any weight."""
    for layer in plan.layout.shapes:
        own = scale_in_force(plan.layout.scaling(layer), plan.scale, scale)
        if not abs(own) <= torch.finfo(dtype).max:
            raise ValueError(
                f"{path} must have scales that are numbers of {dtype}: got {own:g} for {layer!r}"
            )


def check_tensors(plan: Plan, header: Header, path: Path) -> None:
    """Refuse a file whose tensors are not the factors of a plan, all of one dtype."""
    own = {key: value for key, value in header.items() if not key.startswith(MODEL)}
    problems = other_shapes(stored_shapes(plan), {key: shape for key, (shape, _) in own.items()})
    problems += unfit_dtypes(own)
    kinds = sorted({dtype for _, dtype in own.values()})
    if len(kinds) > 1:
        problems.append(f"more than one dtype: {', '.join(kinds)}")
    if problems:
        raise ValueError(f"{path} must hold the factors of its spec: {short(some(problems, 20))}")


def stored_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the blocks that a file holds: all but those that are made anew."""
    frozen = plan.layout.frozen
    shapes = plan.layout.input_shapes
    return {n: shape for n, shape in shapes.items() if frozen.get(n, "stored") == "stored"}


def check_frozen(
    found: Mapping[str, float],
    description: Description,
    path: Path,
    tolerance: float = TOLERANCE,
) -> None:
    """Refuse a file whose frozen blocks had other fingerprints than those at hand."""
    expected = description.prints
    wrong = [
        name
        for name, number in found.items()
        if not abs(number - expected.get(name, math.nan)) < tolerance
    ]
    if wrong:
        raise ValueError(
            f"frozen blocks must be made as they were when {path} was saved, from a seed or from "
            f"the model's weights, which must be the same: {some(wrong, 20)} differ"
        )


def print_of(block: Tensor) -> float:
    """Return a frozen block's fingerprint."""
    held = block.detach().cpu()  # numpy has no bfloat16
    return fingerprint((held.float() if held.dtype is torch.bfloat16 else held).numpy())


def checksums_of(plan: Plan) -> dict[str, int]:
    """Return a number for what each different map draws, by its first group or its vector."""
    if plan not in _CHECKSUMS:
        uses = plan.layout.map_uses()
        found = {name: use[0].checksum(*use[1:]) for use, name in uses.items()}
        _CHECKSUMS[plan] = {name: n for name, n in found.items() if n is not None}
    return _CHECKSUMS[plan]


def check_maps(plan: Plan, description: Description, path: Path) -> None:
    """Refuse a file whose maps drew something else from their seeds."""
    expected, found = description.checksums, checksums_of(plan)
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"maps must be drawn from their seeds as they were when {path} was saved: those of the "
            f"groups or vectors {some(map(repr, sorted(wrong)), 20)} differ"
        )
