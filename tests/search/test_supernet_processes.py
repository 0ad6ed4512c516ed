"""A supernet trained by several processes: what each step draws, and what they learn together."""

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as distributed  # noqa: E402
from torch import multiprocessing  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from superlora.search import Supernet  # noqa: E402
from tests.search.supernets import RANKS, TARGETS, fill  # noqa: E402
from tests.torch.helpers import assert_near, make_input, make_net  # noqa: E402

STEPS, PROCESSES = 6, 2


def _train(model, supernet, x, call=None):
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        supernet.draw(step)
        (call or model)(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _make(depth=2):
    model = make_net(depth=depth, dtype=torch.float64)
    return model, fill(Supernet(model, TARGETS, ranks=RANKS, seed=4))


def _work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(rank)  # what a process draws for itself must not count
    model, supernet = _make()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    x = make_input(4, 5, dtype=torch.float64).chunk(PROCESSES)[rank]
    _train(model, supernet, x, wrapped)
    torch.save(supernet.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    """Each with half of the batch; all draw the same configurations without a word."""
    multiprocessing.spawn(_work, (str(tmp_path),), nprocs=PROCESSES)
    model, supernet = _make()
    before = [parameter.detach().clone() for parameter in supernet.parameters()]
    _train(model, supernet, make_input(4, 5, dtype=torch.float64))
    expected = supernet.state_dict()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        assert_near(found[0][name], value)
    changed = zip(before, supernet.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in changed)
