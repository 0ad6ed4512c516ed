"""Several processes that train, save and merge one adapted model equal a single one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import superlora.torch as slt
from tests.torch.helpers import assert_near, make_net

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

from tests.torch import distributed_worker as worker

ROOT = Path(__file__).parents[2]
MOMENTS = ("before", "between", "after", "evaluated")
KEYS = list(worker.DESIGNS)
QUICK = ["ddp", "fsdp:one-group", "checkpoint", "resume", "tensor_parallel:lora"]
SLOW = ["fsdp:lora", "fsdp:glora", "fsdp_rest", "tensor_parallel"]


def launch(folder, count, cases):
    """Run cases in so many processes, and return the folder that they write to."""
    run([worker.__file__, str(folder), *cases], count)
    return folder


def run(script, count):
    """Run a script with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", *script]
    # The processes do not count as pytest's, which may be several.
    environment = {name: own for name, own in os.environ.items() if "PYTEST" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2, QUICK)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("more"), 2, SLOW)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four"), 4, [*QUICK, *SLOW, "both"])


def of_two(*cases):
    """Return which runs of two processes a test looks at: but for the first kind it is slow."""
    return [
        pytest.param(*case, marks=[] if case[0] == "quick" else pytest.mark.slow) for case in cases
    ]


def found_in(request, run, name):
    return torch.load(request.getfixturevalue(run) / f"{name}.pt")


def assert_all_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value)


EVERY_DDP = of_two(*[(run, key) for run in ("quick", "four") for key in KEYS])
EVERY_FSDP = of_two(
    ("quick", "one-group"),
    ("two", "lora"),
    ("two", "glora"),
    *[("four", key) for key in KEYS],
)


@pytest.mark.parametrize(("run", "key"), EVERY_DDP)
@pytest.mark.filterwarnings("ignore:the update of:UserWarning")
def test_distributed_data_parallel_equals_the_whole_batch(request, run, key):
    model, adapter = worker.make(key)
    if key == "lora":
        worker.leave_out(model)
    assert_all_near(
        found_in(request, run, f"ddp {key}"), worker.train(model, adapter, worker.batch())
    )
    check_file(request.getfixturevalue(run) / f"ddp {key}.safetensors", adapter)


@pytest.mark.parametrize(("run", "key"), EVERY_FSDP)
def test_fully_shard_equals_the_whole_batch(request, run, key):
    model, adapter = worker.make(key)
    assert_all_near(
        found_in(request, run, f"fsdp {key}"), worker.train(model, adapter, worker.batch())
    )
    assert_near(found_in(request, run, f"fsdp output {key}"), worker.evaluate(model))
    check_file(request.getfixturevalue(run) / f"fsdp {key}.safetensors", adapter)


def check_file(path, adapter):
    """Check that what several processes wrote is what one has trained."""
    loaded = slt.load(make_net(dtype=torch.float64), path)
    assert_all_near(dict(loaded.named_parameters()), dict(adapter.named_parameters()))


@pytest.mark.parametrize(("run", "key"), EVERY_FSDP)
def test_what_is_read_at_any_moment_of_a_step(request, run, key):
    folder = request.getfixturevalue(run)
    model, adapter = worker.make(key)
    x, y = worker.batch(), worker.evaluate(model)
    for when in MOMENTS:
        assert_all_near(found_in(request, run, f"deltas {key} {when}"), adapter.deltas())
        again = make_net(dtype=torch.float64)
        slt.load(again, folder / f"{key} {when}.safetensors")
        assert torch.equal(again(x), model(x))
        if key == "glora":
            continue
        for read, name in (
            (slt.from_peft, when),
            (slt.from_lycoris, f"{when}.lycoris.safetensors"),
        ):
            again = make_net(dtype=torch.float64)
            read(again, folder / f"{key} {name}")
            if key == "lora":  # the other's is truncated
                assert_near(again(x), y)
    assert not [*folder.glob(".*.part")]


@pytest.mark.parametrize(("run", "key"), EVERY_FSDP)
def test_merged_weights_are_those_of_one_process(request, run, key):
    model, adapter = worker.make(key)
    worker.train(model, adapter, worker.batch())
    adapter.merge()
    assert_all_near(found_in(request, run, f"merged {key}"), worker.values_of(model))


@pytest.mark.parametrize("run", of_two(("two",), ("four",)))
def test_half_precision_of_a_pass_is_in_no_file(request, run):
    expected = found_in(request, run, "mixed")
    loaded = slt.load(make_net(), request.getfixturevalue(run) / "mixed.safetensors")
    held = dict(loaded.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_checkpoints_of_four_processes_are_loaded_by_fewer(four, count):
    launch(four, count, ["resume"])
    expected = worker.evaluate(worker.make("one-group")[0])
    for kind in ("adapter", "model"):
        assert torch.equal(torch.load(four / f"{kind} of 4 in {count}.pt"), expected)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_loaded_by_four(tmp_path):
    launch(tmp_path, 1, ["checkpoint"])
    launch(tmp_path, 4, ["resume"])
    expected = worker.evaluate(worker.make("one-group")[0])
    for kind in ("adapter", "model"):
        assert torch.equal(torch.load(tmp_path / f"{kind} of 1 in 4.pt"), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_two_processes_is_loaded_by_one_that_is_not_distributed(quick):
    import torch.distributed.checkpoint as dcp

    expected = worker.evaluate(worker.make("one-group")[0])
    for kind in ("adapter", "model"):
        model, adapter = worker.make("one-group", seed=9)
        held = {"adapter": adapter.state_dict()} if kind == "adapter" else model.state_dict()
        dcp.load(held, checkpoint_id=quick / f"{kind} of 2", no_dist=True)
        assert torch.equal(worker.evaluate(model), expected)
        assert torch.equal(torch.load(quick / f"{kind} of 2 in 2.pt"), expected)


PARALLEL = of_two(
    *[("quick", "lora", order) for order in ("first", "then")],
    *[(run, key, o) for run in ("two", "four") for key in worker.PAIR for o in ("first", "then")],
)


@pytest.mark.parametrize(("run", "key", "order"), PARALLEL)
def test_tensor_parallel_layers_equal_whole_ones(request, run, key, order):
    model, adapter = worker.make_pair(key)
    expected = worker.train(model, adapter, worker.pair_input())
    y = expected["output"] = expected["evaluated"] = model(worker.pair_input()).detach()
    assert_all_near(found_in(request, run, f"tensor parallel {key} {order}"), expected)
    again, _ = worker.make_pair(key)
    again.superlora.detach()
    slt.load(again, request.getfixturevalue(run) / f"tensor parallel {key}.safetensors")
    assert_near(again(worker.pair_input()), y)


@pytest.mark.parametrize("run", of_two(("two",), ("four",)))
def test_inputs_split_along_the_tokens(request, run):
    model, adapter = worker.make_pair("lora")
    y = model.down(torch.nn.functional.silu(model.up(worker.batch_of_tokens())))
    y.square().mean().backward()
    found = found_in(request, run, "sequence parallel")
    assert_all_near(found, {"output": y.detach(), **worker.gradients(adapter)})


@pytest.mark.slow
def test_parts_that_several_processes_have_alike(four):
    model, adapter = worker.make("one-group")
    assert_all_near(torch.load(four / "hybrid.pt"), worker.train(model, adapter, worker.batch()))
    check_file(four / "hybrid.safetensors", adapter)
    adapter.merge()
    assert_all_near(torch.load(four / "merged hybrid.pt"), worker.values_of(model))


@pytest.mark.parametrize("run", of_two(("two",), ("four",)))
def test_a_head_that_came_with_the_adapter_is_saved_whole(request, run):
    from safetensors.torch import load_file

    head = load_file(request.getfixturevalue(run) / "head.safetensors")["model.head.weight"]
    assert torch.equal(head, torch.arange(48.0).reshape(3, 16).double())


@pytest.mark.slow
def test_two_ways_to_share_at_once(four):
    model, adapter = worker.make_pair("lora")
    expected = worker.train(model, adapter, worker.pair_input())
    assert_all_near(torch.load(four / "both.pt"), expected)
    again, _ = worker.make_pair("lora")
    again.superlora.detach()
    slt.load(again, four / "both.safetensors")
    assert_near(again(worker.pair_input()), model(worker.pair_input()))
    adapter.merge()
    assert_all_near(torch.load(four / "both merged.pt"), worker.values_of(model))


@pytest.mark.slow
def test_the_script_of_the_page(tmp_path, monkeypatch):
    """Run as the page says, and its file is a whole adapter's."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    script = page.partition("```{code-block} python\n")[2].partition("```")[0]
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run([str(tmp_path / "train.py")], 2)
    names: dict = {}
    exec(script.partition("dist.init_process_group")[0], names)
    model = names["Model"]()
    adapter = slt.load(model, tmp_path / "adapter.safetensors")
    assert all(own.any() for own in adapter.deltas().values())
