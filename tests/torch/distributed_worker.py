"""What several processes do with an adapted model; run by torchrun, one process each.

``torchrun distributed_worker.py FOLDER CASE...`` runs each case in every process. The tests compare
the files that the first one leaves in FOLDER with what a single process makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import superlora as sl
import superlora.torch as slt
from superlora.errors import AdapterError
from superlora.search import Supernet
from superlora.torch.replaced import Replaced
from tests.torch.helpers import Net, fill, make_input, make_net

DESIGNS = {
    "lora": sl.lora(2, alpha=5),
    # Groups of tensors that cross units: each layer reads the same factors.
    "one-group": sl.Spec(rank=2, groups=1, fold="balanced", scale=0.7),
    "glora": sl.glora(2),
}
TARGETS = ["q", "v", "o"]
STEPS, ROWS = 2, 8


def make(key: str = "lora", seed: int = 0, **to) -> tuple[Net, slt.Adapter]:
    """Return a model of float64 and its adapter, whose update is not zero."""
    model = make_net(dtype=torch.float64, **to)
    return model, fill(slt.attach(model, DESIGNS[key], TARGETS), seed=seed)


def batch() -> Tensor:
    return make_input(ROWS, 3, dtype=torch.float64)


def own_batch() -> Tensor:
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def optimizer_of(adapter: slt.Adapter) -> torch.optim.Optimizer:
    return torch.optim.SGD(adapter.parameters(), lr=1e-3, momentum=0.9)


def train(call: Callable[[Tensor], Tensor], adapter: slt.Adapter, x: Tensor) -> dict[str, Tensor]:
    """Take steps, and return the gradients of the last one and the factors after it."""
    optimizer = optimizer_of(adapter)
    for _ in range(STEPS):
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    found = {f"gradient of {n}": p.grad for n, p in adapter.named_parameters()}
    found |= {n: p.detach() for n, p in adapter.named_parameters()}
    return {n: whole(own) for n, own in found.items() if own is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def keep(folder: Path, name: str, found: object) -> None:
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{name}.pt")


def shard(model: Net, units: bool = True, **options) -> None:
    """Shard each block, and the rest of the model, in which the factors are."""
    for block in model.blocks if units else ():
        fully_shard(block, **options)
    fully_shard(model, **options)


def leave_out(model: Net) -> None:
    """Let a pass leave out the layers of a block, whose factors get no gradient."""
    model.blocks[1].forward = lambda x: x


def ddp(folder: Path) -> None:
    for key, options in {
        "lora": {"find_unused_parameters": True},
        "one-group": {"static_graph": True},
        "glora": {},
    }.items():
        model, adapter = make(key)
        if key == "lora":
            leave_out(model)
        wrapped = DistributedDataParallel(model, **options)
        keep(folder, f"ddp {key}", train(wrapped, adapter, own_batch()))
        if dist.get_rank() == 0:  # one process alone may write
            adapter.save(folder / f"ddp {key}.safetensors")
    with pytest.raises(AdapterError, match="must be attached before DistributedDataParallel"):
        slt.attach(wrapped, sl.lora(1), TARGETS, name="late")


def moments(folder: Path, key: str, adapter: slt.Adapter, when: str) -> None:
    """Read and write the adapter at one moment of a step: all of it is the same at each."""
    path = folder / f"{key} {when}.safetensors"
    adapter.save(path)
    assert path.is_file()
    if key != "glora":
        exported = adapter.to_peft(folder / f"{key} {when}", rank=8)
        assert len(exported.methods) == len(adapter.plan.shapes)
        adapter.to_lycoris(folder / f"{key} {when}.lycoris.safetensors", rank=8)
    deltas = {name: own.detach() for name, own in adapter.deltas().items()}
    for name, delta in deltas.items():
        assert torch.equal(adapter.delta(name), delta), name
    with torch.no_grad():
        keep(folder, f"deltas {key} {when}", deltas)


def fsdp(folder: Path, key: str) -> None:
    """Train, and read, write and merge at every moment of a step."""
    model, adapter = make(key)
    shard(model, units=key != "glora")  # without them all weights stay whole after a pass
    x = own_batch()
    moments(folder, key, adapter, "before")
    y = model(x)
    moments(folder, key, adapter, "between")
    y.square().mean().backward()
    moments(folder, key, adapter, "after")
    for parameter in adapter.parameters():
        parameter.grad = None
    with torch.no_grad():
        model(x)
    moments(folder, key, adapter, "evaluated")
    keep(folder, f"fsdp {key}", train(model, adapter, x))
    adapter.save(folder / f"fsdp {key}.safetensors")
    keep(folder, f"fsdp output {key}", evaluate(model))
    merge(folder, key, model, adapter)


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch())


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies: FSDP2 takes back the memory of what it made whole."""
    every = {n: whole(p).detach().clone() for n, p in model.named_parameters()}
    return {n: own for n, own in every.items() if not n.startswith("superlora")}


def merge(folder: Path, key: str, model: Net, adapter: slt.Adapter) -> None:
    """Merge into a sharded model and back, bit for bit."""
    before = evaluate(model)
    weights = values_of(model)
    for _ in range(2):
        adapter.merge()
        torch.testing.assert_close(evaluate(model), before, rtol=0, atol=1e-10)
        held = values_of(model)
        keep(folder, f"merged {key}", held)
        assert any(not torch.equal(held[n], own) for n, own in weights.items())
        adapter.unmerge()
        now = values_of(model)
        assert all(torch.equal(now[n], own) for n, own in weights.items())
        assert torch.equal(evaluate(model), before)
    with adapter.disabled():
        assert not torch.equal(evaluate(model), before)


def fsdp_rest(folder: Path) -> None:
    """Swap, draw anew, load, other precisions, and what is refused."""
    model, adapter = make("one-group")
    other, its = make("one-group", seed=5)
    expected = evaluate(other)
    its.save(folder / f"other {dist.get_rank()}.safetensors")
    shard(model)
    path = folder / f"other {dist.get_rank()}.safetensors"
    evaluate(model)  # the factors are whole now
    adapter.swap(path)
    torch.testing.assert_close(evaluate(model), expected, rtol=0, atol=1e-10)
    adapter.reset(seed=3)
    again, fresh = make_net(dtype=torch.float64), None
    fresh = slt.attach(again, DESIGNS["one-group"], TARGETS, seed=3)
    torch.testing.assert_close(evaluate(model), evaluate(again), rtol=0, atol=1e-10)
    # Whole values into parts, and parts into whole values.
    adapter.load_state_dict(its.state_dict())
    torch.testing.assert_close(evaluate(model), expected, rtol=0, atol=1e-10)
    fresh.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(evaluate(again), expected, rtol=0, atol=1e-10)
    with pytest.raises(AdapterError, match="must be attached before fully_shard"):
        slt.attach(model, sl.lora(1), TARGETS, name="late")
    with pytest.raises(FileNotFoundError, match="existing folder"):
        adapter.save(folder / "none" / "adapter.safetensors")
    infinite, one = make("lora")
    with torch.no_grad():  # in the rows of one process alone
        infinite.blocks[1].o.weight[-1] = float("inf")
    shard(infinite)
    with pytest.raises(ValueError, match="must be finite to be merged"):
        one.merge()
    assert not one.merged
    # Units without the layers that read the factors.
    for wrong in (lambda m, a: fully_shard(a), lambda m, a: fully_shard(m[0])):
        net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        late = slt.attach(net, sl.lora(2))
        wrong(net, late)
        fully_shard(net)
        with pytest.raises(AdapterError, match="must be gathered for all its layers"):
            net(torch.ones(2, 16))
    with_a_head(folder)
    with_a_penalty(folder)
    nets(folder)
    # In half precision during passes, single in files.
    mixed = make_net()
    mixed.shift = mixed.shift.bfloat16()
    half = fill(slt.attach(mixed, DESIGNS["lora"], TARGETS))
    values = {n: p.detach().clone() for n, p in half.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(mixed, mp_policy=policy)
    with torch.no_grad():
        mixed(make_input())
    half.save(folder / "mixed.safetensors")
    keep(folder, "mixed", values)
    # Memory after the model was sharded on the meta device.
    with torch.device("meta"):
        empty = make_net(dtype=torch.float64)
    late = slt.attach(empty, DESIGNS["one-group"], TARGETS, seed=3)
    shard(empty)
    empty.to_empty(device="cpu")
    for name, factor in late.named_parameters():
        assert torch.equal(whole(factor), dict(fsdp_fresh(3).named_parameters())[name]), name


def with_a_head(folder: Path) -> None:
    """Parameters of the model that came with the adapter are saved whole."""
    model = make_net(dtype=torch.float64)
    values = {"head.weight": torch.arange(48.0).reshape(3, 16).double()}
    adapter = slt.attach(model, DESIGNS["lora"], TARGETS)
    adapter.replaced = Replaced(model, values)
    adapter.replaced.use(True)
    shard(model)
    evaluate(model)
    adapter.save(folder / "head.safetensors")
    with (
        pytest.raises(AdapterError, match="must not be sharded while parameters"),
        adapter.disabled(),
    ):
        pass
    adapter.swap(folder / "head.safetensors")
    assert torch.equal(whole(model.head.weight), values["head.weight"])


def penalised(call: Callable[[Tensor], Tensor], adapter: slt.Adapter, x: Tensor, save: Path | None):
    """Take a step whose loss has the updates too, whether these are whole or in parts by then."""
    loss = call(x).square().mean()
    if save is not None:
        adapter.save(save)
    sum((loss, *(0.1 * delta.square().sum() for delta in adapter.deltas().values()))).backward()
    return gradients(adapter)


def with_a_penalty(folder: Path) -> None:
    for save in (None, folder / "penalty.safetensors"):
        model, adapter = make("one-group")
        expected = penalised(model, adapter, batch(), None)
        model, adapter = make("one-group")
        shard(model)
        found = penalised(model, adapter, own_batch(), save)
        for name, value in expected.items():
            torch.testing.assert_close(whole(found[name]), value, rtol=1e-10, atol=1e-10)


def nets(folder: Path) -> None:
    """A supernet trains, and is extracted before it is sharded alone; and FSDP1."""
    model = make_net()
    supernet = Supernet(model, TARGETS, ranks=(4, 2))
    shard(model)
    supernet.draw(0)
    model(make_input()).sum().backward()
    supernet.save(folder / "supernet.safetensors")
    with pytest.raises(AdapterError, match="must be attached before fully_shard"):
        supernet.extract(supernet.configuration)
    assert supernet.attached
    model, adapter = make("lora")
    flat = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(AdapterError, match="cannot be saved: layers were changed"):
        adapter.save(folder / "flat.safetensors")
    assert not (folder / "flat.safetensors").exists()
    with pytest.raises(AdapterError, match="must be attached before FullyShardedDataParallel"):
        slt.attach(flat, sl.lora(1), name="late")


def fsdp_fresh(seed: int) -> slt.Adapter:
    return slt.attach(make_net(dtype=torch.float64), DESIGNS["one-group"], TARGETS, seed=seed)


def checkpoint(folder: Path) -> None:
    """Save what each process holds, and load what processes of another number held."""
    count = dist.get_world_size()
    model, adapter = make("one-group")
    shard(model)
    dcp.save({"adapter": adapter.state_dict()}, checkpoint_id=folder / f"adapter of {count}")
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / f"model of {count}")


def resume(folder: Path) -> None:
    for count in (1, 2, 4):
        for kind in ("adapter", "model"):
            where = folder / f"{kind} of {count}"
            if not where.is_dir():
                continue
            model, adapter = make("one-group", seed=9)
            shard(model)
            held = {"adapter": adapter.state_dict()} if kind == "adapter" else model.state_dict()
            dcp.load(held, checkpoint_id=where)
            keep(folder, f"{kind} of {count} in {dist.get_world_size()}", evaluate(model))


class Pair(nn.Module):
    """Layers split by columns and by rows, an embedding before them and a whole one after."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        return self.out(x + self.down(nn.functional.silu(self.up(x))))


PAIR = {
    "lora": sl.lora(2, scale=0.1),
    "dense": sl.dense(scale=0.1),
    "lokr": sl.lokr(2, scale=0.1),
    "one-group": sl.Spec(rank=2, groups=1, fold="balanced", scale=0.1),
}
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def make_pair(key: str, parallel: str = "", mesh=None) -> tuple[Pair, slt.Adapter]:
    torch.manual_seed(0)
    model = Pair().double()

    def split() -> None:
        plan = {name: style() for name, style in PLAN.items()}
        plan["words"] = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh, plan)

    if parallel == "first":
        split()
    adapter = fill(slt.attach(model, PAIR[key], ["words", "up", "down", "out"]))
    if parallel == "then":
        split()
    return model, adapter


def pair_input() -> Tensor:
    return torch.arange(32).reshape(4, 8) % 12


def batch_of_tokens() -> Tensor:
    return make_input(2, 8, dtype=torch.float64)


def tensor_parallel(folder: Path, *keys: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for key in keys or PAIR:
        for order in ("first", "then"):
            model, adapter = make_pair(key, order, mesh)
            found = train(model, adapter, pair_input())
            found["output"] = model(pair_input()).detach()
            with torch.no_grad():
                found["evaluated"] = model(pair_input())
            keep(folder, f"tensor parallel {key} {order}", found)
            adapter.save(folder / f"tensor parallel {key}.safetensors")
            weight = whole(model.up.weight)
            adapter.merge(unreached="merge")
            with torch.no_grad():
                torch.testing.assert_close(model(pair_input()), found["output"])
            adapter.unmerge()
            assert torch.equal(whole(model.up.weight), weight)
    # Distributed outputs, and inputs that are split along the tokens.
    model, adapter = make_pair("lora")
    parallelize_module(
        model,
        mesh,
        {
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        },
    )
    x = batch_of_tokens().chunk(mesh.size(), 1)[mesh.get_rank()]
    y = model.down(nn.functional.silu(model.up(x))).full_tensor()
    y.square().mean().backward()
    keep(folder, "sequence parallel", {"output": y.detach(), **gradients(adapter)})
    other = Pair().double()
    parallelize_module(other, mesh, {"up": ColwiseParallel()})
    late = fill(slt.attach(other, sl.glora(2), ["up"]))
    with pytest.raises(AdapterError, match="must have no other operation"):
        other(pair_input())
    late.detach()


def gradients(adapter: slt.Adapter) -> dict[str, Tensor]:
    every = {f"gradient of {n}": p.grad for n, p in adapter.named_parameters()}
    return {name: own for name, own in every.items() if own is not None}


def both(folder: Path) -> None:
    """Split the weights along one side of a mesh, and the batch along the other."""
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model")
    )
    model, adapter = make_pair("lora", "then", mesh["model"])
    fully_shard(model, mesh=mesh["data"])
    x = pair_input().chunk(mesh["data"].size())[mesh["data"].get_local_rank()]
    keep(folder, "both", train(model, adapter, x))
    adapter.save(folder / "both.safetensors")
    weights = {n: own for n, own in values_of(model).items() if "weight" in n}
    adapter.merge()
    keep(folder, "both merged", values_of(model))
    adapter.unmerge()
    now = values_of(model)
    assert all(torch.equal(now[name], own) for name, own in weights.items())
    # Each part in two processes.
    model, adapter = make("one-group")
    shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part")))
    keep(folder, "hybrid", train(model, adapter, own_batch()))
    adapter.save(folder / "hybrid.safetensors")
    merge(folder, "hybrid", model, adapter)


CASES = {
    case.__name__: case
    for case in (ddp, fsdp, fsdp_rest, checkpoint, resume, tensor_parallel, both)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        case, _, key = name.partition(":")
        CASES[case](Path(sys.argv[1]), *filter(None, [key]))
        dist.barrier()
    dist.destroy_process_group()
