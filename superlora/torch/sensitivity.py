"""How much a loss depends on each weight of a model: mean gradients, and Fisher scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import some
from superlora.torch.attach import checked_model
from superlora.torch.layers import Weight
from superlora.torch.rounding import is_finite
from superlora.torch.sharded import whole
from superlora.torch.targets import ALL_LINEAR, Targets, find_targets

Loss = Callable[[nn.Module, Any], Tensor]


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    targets: Targets = ALL_LINEAR,
    exclude: Targets | None = None,
    layers: Any = None,
    tied: str = "refuse",
) -> dict[str, float]:
    """Score each weight by the empirical Fisher information of some batches.

    Parameters
    ----------
    model : torch.nn.Module
        The model, which stays as it is: its modes, gradients, what requires them, and torch's
        random numbers too. It is in evaluation mode meanwhile.
    batches : iterable
        Batches on the model's device; a few say much.
    loss : callable, optional
        ``loss(model, batch) -> tensor`` of one number. By default ``model(**batch).loss``, as
        models of transformers have it.
    targets, exclude, layers, tied : optional
        Which weights, as `attach` takes them.

    Returns
    -------
    dict of str to float
        For every weight, under the name that an adapter's plan has, the mean over the batches of
        ``‖∂ loss / ∂ W‖²``; 0 where the loss does not depend on it. To be given to
        `superlora.suggest`.

    Raises
    ------
    TypeError
        If the model, the loss or its value is of another kind.
    ValueError
        If there are no batches, a weight can have no gradient, or a loss or a gradient is not
        finite.

    Notes
    -----
    With batches of one example this is the trace of the weight's block of the empirical Fisher
    matrix; with larger ones examples cancel. A layer's score rises with its size.

    Examples
    --------
    >>> import torch, superlora.torch as slt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> batches = [torch.ones(3, 4)]
    >>> scores = slt.sensitivity(
    ...     model, batches, loss=lambda model, x: model(x).square().mean(), targets=["0", "1"]
    ... )
    >>> list(scores)
    ['0', '1']
    """
    totals: dict[str, float] = {}

    def add(name: str, gradient: Tensor) -> None:
        totals[name] = totals.get(name, 0.0) + float(torch.linalg.vector_norm(gradient)) ** 2

    weights = _weights(model, targets, exclude=exclude, layers=layers, tied=tied)
    count = _each_gradient(model, weights, batches, loss, add)
    return {name: totals.get(name, 0.0) / count for name in weights}


def mean_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    targets: Targets = ALL_LINEAR,
    exclude: Targets | None = None,
    layers: Any = None,
    tied: str = "refuse",
) -> dict[str, Tensor]:
    """Return the mean gradient of each weight over some batches: a dense step, but for its sign.

    Parameters
    ----------
    model : torch.nn.Module
        The model, which stays as it is, as for `sensitivity`.
    batches : iterable
        Batches on the model's device.
    loss : callable, optional
        ``loss(model, batch) -> tensor`` of one number. By default ``model(**batch).loss``.
    targets, exclude, layers, tied : optional
        Which weights, as `attach` takes them.

    Returns
    -------
    dict of str to torch.Tensor, each of its weight's axes
        In single precision where the weight's is half, zero where the loss does not depend on the
        weight. `superlora.suggest` takes them as updates, and their negative `Plan.fit`: factors of
        the steepest descent, LoRA-GA's idea [1]_.

    Raises
    ------
    TypeError
        If the model, the loss or its value is of another kind.
    ValueError
        If there are no batches, a weight can have no gradient, or a loss or a gradient is not
        finite.

    References
    ----------
    .. [1] S. Wang, L. Yu, J. Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024.

    Examples
    --------
    >>> import torch, superlora as sl, superlora.torch as slt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> batches = [torch.ones(3, 4)]
    >>> found = slt.mean_gradients(
    ...     model, batches, loss=lambda model, x: model(x).square().mean(), targets=["0", "1"]
    ... )
    >>> {name: tuple(gradient.shape) for name, gradient in found.items()}
    {'0': (4, 4), '1': (2, 4)}
    """
    weights = _weights(model, targets, exclude=exclude, layers=layers, tied=tied)
    totals: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        totals[name] = totals[name] + gradient if name in totals else gradient

    count = _each_gradient(model, weights, batches, loss, add)
    found = {}
    for name, (weight, rows) in weights.items():
        total = totals.get(name)
        if total is None:
            total = _matrix(torch.zeros_like(weight.parameter), weight, rows)
        axes = weight.axes
        found[name] = (total / count).reshape(total.shape if axes.plain else axes.shape)
    return found


# A weight, and which rows of it.
_Weights = dict[str, tuple[Weight, slice]]


def _weights(model: nn.Module, targets: Targets, **which: Any) -> _Weights:
    selection = find_targets(checked_model(model), targets, **which)
    unfit = [name for name, weight in selection.weights.items() if not weight.addable]
    if unfit:
        raise ValueError(
            "targets must match weights that can have gradients: quantised are "
            f"{some(map(repr, unfit))}"
        )
    return {
        name: (weight, slice(*selection.rows.get(name, (None,))))
        for name, weight in selection.weights.items()
    }


def _matrix(gradient: Tensor, weight: Weight, rows: slice) -> Tensor:
    """Return a gradient as the matrix that a plan has, in single precision or double."""
    matrix = weight.form().matrix(whole(gradient.detach()))[rows]
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _each_gradient(
    model: nn.Module,
    weights: _Weights,
    batches: Iterable[Any],
    loss: Loss | None,
    add: Callable[[str, Tensor], None],
) -> int:
    """Hand on the gradients of every batch, and return how many batches there were."""
    count = 0
    parameters = list(
        {id(weight.parameter): weight.parameter for weight, _ in weights.values()}.values()
    )
    with _untouched(model, parameters):
        for count, batch in enumerate(batches, 1):
            value = _loss(model, batch, loss, count - 1)
            given = torch.autograd.grad(value, parameters, allow_unused=True)
            gradients = {id(p): own for p, own in zip(parameters, given, strict=True)}
            for name, (weight, rows) in weights.items():
                gradient = gradients[id(weight.parameter)]
                if gradient is not None:
                    gradient = _matrix(gradient, weight, rows)
                    if not is_finite(gradient):
                        raise ValueError(
                            f"gradients must be finite: that of {name!r} is not, "
                            f"in batch {count - 1}"
                        )
                    add(name, gradient)
    if not count:
        raise ValueError("batches must be one at least: got none")
    return count


def _loss(model: nn.Module, batch: Any, loss: Loss | None, index: int) -> Tensor:
    value: Any
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        value = getattr(model(**batch), "loss", None)
    else:
        raise TypeError(
            f"loss must be given where batches are no mappings: got a {type(batch).__name__}"
        )
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must return a tensor of one number: got {got} in batch {index}")
    if not value.requires_grad:
        raise ValueError(f"loss must depend on the weights: it has no gradient in batch {index}")
    number = float(value.detach())
    if not math.isfinite(number):
        raise ValueError(f"loss must be finite: got {number} in batch {index}")
    found: Tensor = value
    return found


@contextlib.contextmanager
def _untouched(model: nn.Module, parameters: list[Tensor]) -> Iterator[None]:
    """Let parameters have gradients inside, in evaluation mode, and put all back after it."""
    modes = {module: module.training for module in model.modules()}
    required = [parameter.requires_grad for parameter in parameters]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            for module in modes:
                module.training = False
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, own in zip(parameters, required, strict=True):
                parameter.requires_grad_(own)
