"""What the header of an adapter's file says, and whether it is that of a plan."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora.errors import some
from superlora.frozen import fingerprint
from superlora.plan import Plan
from superlora.spec import Spec
from superlora.supports import Supports, design_from_dict
from superlora.torch.files import Header, unfit_dtypes

FORMAT_VERSION = 1
# Before the names of the model's own parameters that come with the adapter.
MODEL = "model."
# One metadata key: safetensors writes several in no fixed order.
KEY = "superlora"
# What reading a header of other values than ours can raise.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Between fingerprints: rounding changes one by less.
TOLERANCE = 1e-3
# What the maps of a plan draw never changes.
_CHECKSUMS: weakref.WeakKeyDictionary[Plan, dict[str, int]] = weakref.WeakKeyDictionary()


def header_of(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return what a file's metadata says of its adapter.

    Parameters
    ----------
    metadata : mapping of str to str
        The metadata.
    path : pathlib.Path
        The file, for the message.

    Returns
    -------
    dict
        Of this format version; `spec`, `weights` and `scale` are not checked.

    Raises
    ------
    ValueError
        If it is no adapter's, of another version, or its numbers are none.
    """
    if KEY not in metadata:
        raise ValueError(f"{path} must be a superlora adapter: its header does not say so")
    try:
        header: dict[str, Any] = json.loads(metadata[KEY])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must have a readable superlora header: {error!r}") from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} must be of format version {FORMAT_VERSION}: got {version!r}")
    with valid_header(path):
        for number in header.get("frozen", {}).values():
            if isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"fingerprints must be numbers: got {number!r}")
        header.get("maps", {}).items()
    return header


@contextmanager
def valid_header(path: Path) -> Iterator[None]:
    """Say of which file the header is that made an error.

    Parameters
    ----------
    path : pathlib.Path
        The file.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    ValueError
        In place of what a value of another kind than ours raises.
    """
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{path} must have a valid superlora header: {error}") from None


def spec_of(header: Mapping[str, Any], path: Path) -> Spec | Supports:
    """Return the spec of a file's header, whose scale is found good too.

    Parameters
    ----------
    header : mapping
        What `header_of` gave.
    path : pathlib.Path
        The file, for the message.

    Returns
    -------
    Spec or Supports
        The spec, or those of merge operations.

    Raises
    ------
    ValueError
        If there is none, or a value is refused.
    """
    with valid_header(path):
        spec = design_from_dict(header["spec"])
        if "scale" in header:
            spec.scaled(0.0 + header["scale"])
        return spec


def scale_of(header: Mapping[str, Any], spec: Spec | Supports) -> float:
    """Return the scale that was in force when a file was saved.

    Parameters
    ----------
    header : mapping
        What `header_of` gave.
    spec : Spec or Supports
        What `spec_of` gave.

    Returns
    -------
    float
        That of the spec, where the header has no other.
    """
    return spec.scaled(0.0 + header["scale"]).scaling if "scale" in header else spec.scaling


def shapes_of(header: Mapping[str, Any], path: Path) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of the layers that a file's header gives.

    Parameters
    ----------
    header : mapping
        What `header_of` gave.
    path : pathlib.Path
        The file, for the message.

    Returns
    -------
    dict of str to (int, int)
        In order; the shapes are not checked.

    Raises
    ------
    ValueError
        If they are no pairs.
    """
    with valid_header(path):
        return {name: tuple(shape) for name, shape in header["weights"]}


def check_tensors(plan: Plan, header: Header, path: Path) -> None:
    """Refuse a file whose tensors are not the factors of a plan, all of one dtype.

    Parameters
    ----------
    plan : Plan
        The plan.
    header : dict of str to (tuple of int, str)
        Shape and dtype of every tensor.
    path : pathlib.Path
        The file, for the message.

    Raises
    ------
    ValueError
        If they are not; all that differs is listed.
    """
    expected = stored_shapes(plan)
    own = {key: shape for key, (shape, _) in header.items() if not key.startswith(MODEL)}
    dtypes = {key: dtype for key, (_, dtype) in header.items()}
    problems = [f"missing {key!r}" for key in expected if key not in own]
    problems += [f"extra {key!r}" for key in own if key not in expected]
    problems += [
        f"{key!r} of shape {own[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in own and own[key] != shape
    ]
    problems += unfit_dtypes(header)
    kinds = sorted({dtypes[key] for key in own})
    if len(kinds) > 1:
        problems.append(f"more than one dtype: {', '.join(kinds)}")
    if problems:
        raise ValueError(f"{path} must hold the factors of its spec: {some(problems, 20)}")


def stored_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the blocks that a file holds.

    Parameters
    ----------
    plan : Plan
        The plan.

    Returns
    -------
    dict of str to tuple of int
        By name: all but those that are made anew.
    """
    frozen = plan.layout.frozen
    shapes = plan.layout.input_shapes
    return {n: shape for n, shape in shapes.items() if frozen.get(n, "stored") == "stored"}


def check_frozen(
    found: Mapping[str, float], header: Mapping[str, Any], path: Path, tolerance: float = TOLERANCE
) -> None:
    """Refuse a file whose frozen blocks were others.

    Parameters
    ----------
    found : mapping of str to float
        The fingerprints of the blocks at hand.
    header : mapping
        What `header_of` gave.
    path : pathlib.Path
        The file, for the message.
    tolerance : float
        By how much fingerprints may differ.

    Raises
    ------
    ValueError
        If some differ; they are listed.
    """
    expected = header.get("frozen", {})
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
    """Return a frozen block's fingerprint.

    Parameters
    ----------
    block : torch.Tensor
        The block.

    Returns
    -------
    float
        That of `superlora.frozen.fingerprint`.
    """
    held = block.detach().cpu()  # numpy has no bfloat16
    return fingerprint((held.float() if held.dtype is torch.bfloat16 else held).numpy())


def checksums_of(plan: Plan) -> dict[str, int]:
    """Return a number for what each different map draws.

    Parameters
    ----------
    plan : Plan
        The plan.

    Returns
    -------
    dict of str to int
        By the map's first group or its vector.
    """
    if plan not in _CHECKSUMS:
        uses = plan.layout.map_uses()
        found = {name: use[0].checksum(*use[1:]) for use, name in uses.items()}
        _CHECKSUMS[plan] = {name: n for name, n in found.items() if n is not None}
    return _CHECKSUMS[plan]


def check_maps(plan: Plan, header: Mapping[str, Any], path: Path) -> None:
    """Refuse a file whose maps drew something else from their seeds.

    Parameters
    ----------
    plan : Plan
        A plan of the file's design.
    header : mapping
        What `header_of` gave.
    path : pathlib.Path
        The file, for the message.

    Raises
    ------
    ValueError
        If some differ; they are listed.
    """
    expected = header.get("maps", {})
    found = checksums_of(plan)
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"maps must be drawn from their seeds as they were when {path} was saved: those of the "
            f"groups or vectors {some(map(repr, sorted(wrong)), 20)} differ"
        )
