"""Tensors that several processes hold together: read whole, and written in parts.

They are torch's `DTensor`, of FSDP2 or of tensor parallelism. The modules that have it are imported
only where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some

Value = TypeVar("Value")
# A module, and the name of one of its parameters or buffers.
Owned = tuple[nn.Module, str]
# What may have taken over a model's parameters before an adapter's are added, by class.
_ENGINES = {
    "FSDPModule": "fully_shard(model)",
    "FullyShardedDataParallel": "FullyShardedDataParallel(model)",
    "DistributedDataParallel": "DistributedDataParallel(model)",
    "DataParallel": "DataParallel(model)",
}


def is_distributed(tensor: object) -> bool:
    """Return whether several processes hold a tensor together."""
    # By name, since to import the class takes a second.
    return type(tensor).__name__ == "DTensor"


def whole(value: Any) -> Any:
    """Return a tensor with all its entries, differentiably; anything else as it is."""
    return value.full_tensor() if is_distributed(value) else value


def local(tensor: Any) -> Tensor:
    """Return the entries of a tensor that this process holds, to be written to."""
    found: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return found


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """Return a tensor that all processes have alike as one of another's mesh, differentiably."""
    if is_distributed(tensor) or not is_distributed(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    # Its backward pass adds up what each process has of the gradient.
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def spread(tensor: Any, like: Any) -> Tensor:
    """Return a tensor that all processes have alike as another one is held: whole, or in parts."""
    if is_distributed(tensor) and not is_distributed(like):
        tensor = whole(tensor)
    elif is_distributed(like) and not is_distributed(tensor):
        tensor = replicated(tensor, like).redistribute(placements=like.placements)  # type: ignore[attr-defined]
    found: Tensor = tensor
    return found


def agreed(answer: bool, tensor: Any) -> bool:
    """Return whether the answer is yes in every process that holds a tensor."""
    if not is_distributed(tensor):
        return answer
    mesh = tensor.device_mesh
    found = torch.tensor(int(answer), device=mesh.device_type)
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group)
    return bool(found)


def is_running() -> bool:
    """Return whether there are processes to share tensors with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let FSDP2 take back the parameters that it made whole for a pass: what is written stays."""
    if is_running():
        for module in modules:
            if module._parameters and module._state_dict_pre_hooks:
                module.state_dict()  # it does so before one is taken, whichever unit has the module


@contextmanager
def gathered(owned: Iterable[Owned]) -> Iterator[Any]:
    """Let tensors be whole inside a ``with`` block; give the mesh that holds them, if any does."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, leaf in owned if is_running() else ():
            own: dict[str, Any] = module._parameters
            own = own if leaf in own else module._buffers
            block: Any = own[leaf]
            if is_distributed(block):
                held.append((own, leaf, block))
                found = block.full_tensor()
                own[leaf] = found if torch.is_grad_enabled() else nn.Parameter(found, False)
        yield held[0][2].device_mesh if held else None
    finally:
        for own, leaf, tensor in held:
            own[leaf] = tensor


def once(mesh: Any, function: Callable[[], Value]) -> Value:
    """Call a function in the first process of a mesh; all get what it returns, or its error."""
    if mesh is None:
        return function()
    group = mesh.get_group() if mesh.ndim == 1 else None  # else all processes
    first = torch.distributed.get_process_group_ranks(group)[0]
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == first:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    device = torch.device(mesh.device_type)
    torch.distributed.broadcast_object_list(answer, first, group, device)
    if answer[1] is not None:
        raise answer[1]
    found: Value = answer[0]
    return found


def refuse_engines(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to add parameters to a model whose engine would not add up their gradients."""
    for name, module in modules:
        kinds = (_ENGINES.get(base.__name__, "") for base in type(module).__mro__)
        found = next(filter(None, kinds), "")
        if found:
            raise AdapterError(
                f"an adapter must be attached before {found}, which would not know its factors: "
                f"{repr(name) + ' of the model' if name else 'the model'} is a "
                f"{type(module).__name__} already"
            )


def refuse_plans(layers: Iterable[tuple[str, nn.Module, Any]]) -> None:
    """Refuse layers that a plan of transformers made parallel, before attach or since."""
    found = [
        repr(name)
        for name, module, weight in layers
        if module.__dict__.get("_is_hooked") and is_distributed(weight)
    ]
    if found:
        raise AdapterError(
            "layers must not be made tensor parallel by transformers' tp_plan to be adapted: "
            f"{some(found)} are. It puts functions in the place of their forward that take and "
            "give a part of inputs and outputs, where the update would have to be cut likewise; "
            "torch's parallelize_module does, before or after attach"
        )


def refuse_copy(module: nn.Module) -> None:
    """Refuse a pass of a copy that `nn.DataParallel` made: its layers compute as the original's."""
    if getattr(module, "_is_replica", False):
        raise AdapterError(
            "an adapted model must not be copied by nn.DataParallel, whose copies would read the "
            "original's weights: use DistributedDataParallel or one device, or merge() and "
            "detach(keep_merged=True)"
        )


def check_gathers(adapter: Any) -> None:
    """Refuse a pass in which FSDP2 gathers the factors for a part of their layers alone."""
    model, host = adapter._homes
    for unit in {host, adapter, adapter.blocks.first.owner} - {model}:
        if all(base.__name__ != "FSDPModule" for base in type(unit).__mro__):
            continue
        inside = set(unit.modules())
        outside = [repr(name) for name, own in adapter.layers().items() if own not in inside]
        if outside:
            raise AdapterError(
                f"the factors of adapter {adapter.name!r} must be gathered for all its layers: "
                f"fully_shard was called on the {type(unit).__name__} that has the factors, and "
                f"not {some(outside)}. Call it on the model, and on parts without the adapter; a "
                "container such as nn.Sequential has it in its first adapted layer, so wrap it in "
                "a module before attach"
            )
