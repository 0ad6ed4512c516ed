"""Which layers can be adapted, and how each holds its weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from superlora.errors import AdapterError


def is_transposed(module: nn.Module) -> bool:
    """Return whether `module` is GPT-2's ``Conv1D``, whose weight is (input, output)."""
    # By name, so that transformers need not be installed.
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def is_adaptable(module: nn.Module) -> bool:
    """Return whether `module` is a layer that an adapter can be attached to."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def parameter_of(module: nn.Module) -> Tensor:
    """Return the layer's weight as the layer stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_of(module: nn.Module) -> Tensor:
    """Return the layer's weight as (output, input), a view that writes through."""
    weight = parameter_of(module)
    return weight.t() if is_transposed(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the layer's bias, if it has one."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return the output and the input width of an adaptable layer."""
    rows, columns = weight_of(module).shape
    return rows, columns


def input_name(module: nn.Module) -> str:
    """Return what the layer's own forward calls its input."""
    return "x" if is_transposed(module) else "input"


def computes_plainly(module: nn.Module) -> bool:
    """Return whether the layer's own forward is ``x @ weightᵀ + bias`` and nothing else."""
    return type(module).forward is nn.Linear.forward or (
        is_transposed(module) and type(module).__name__ == "Conv1D"
    )


def refuse_empty(rule: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise with a rule if tensors have no memory."""
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterError(f"{rule}: {len(empty)} lie on the meta device, first {empty[0]!r}")
