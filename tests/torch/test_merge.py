"""Merge, unmerge, disable, detach: exact, all or nothing, and refused out of turn."""

import contextlib
import threading

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.torch.support import Support
from tests.pairs import in_turn, pairwise
from tests.torch.helpers import (
    LAYERS,
    SPECS,
    assert_near,
    attach_filled,
    base_bits,
    every_layer,
    fill,
    make_input,
    make_net,
    snapshot,
    some_specs,
    targets_of,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pairwise({"key": list(SPECS), "layer": LAYERS, "dtype": DTYPES})
def test_unmerge_restores_every_bit(key, layer, dtype):
    model = make_net(layer, dtype=dtype)
    before = base_bits(model)
    adapter = attach_filled(model, key)
    for _ in range(2):
        adapter.merge()
        assert adapter.merged
        assert not adapter.active
        changed = base_bits(model)
        assert {name for name in before if changed[name] != before[name]} == {
            f"{name}.weight" for name in adapter.plan.shapes
        }
        adapter.unmerge()
        assert not adapter.merged
        assert adapter.active
        assert base_bits(model) == before


@in_turn("key", SPECS, "layer", LAYERS)
def test_detach_leaves_the_very_model(key, layer):
    model = make_net(layer)
    model.blocks[1].requires_grad_(False)
    model.blocks[0].q.forward_note = "an attribute of the user"
    x = make_input()
    expected = model(x)
    with unchanged(model):
        adapter = attach_filled(model, key)
        model(x).sum().backward()
        adapter.merge()
        adapter.unmerge()
        adapter.detach()
    assert torch.equal(model(x), expected)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not hasattr(model, "superlora")


@some_specs
def test_detach_puts_back_a_forward_of_another_library(key):
    model = make_net()
    layer = model.blocks[0].q
    plain = type(layer).forward
    layer.forward = lambda input: plain(layer, input) + 1
    x = make_input()
    expected = model(x)
    with unchanged(model):
        adapter = slt.attach(model, SPECS[key])
        assert torch.equal(model(x), expected)
        fill(adapter)
        y = model(x)
        adapter.merge()
        assert_near(model(x), y)
        adapter.unmerge()
        adapter.detach()
    assert torch.equal(model(x), expected)


def test_detach_does_not_take_a_later_wrapper_away():
    """Another library's wrapper, put on after the adapter, must not vanish without a word."""
    model = make_net()
    adapter = slt.attach(model, sl.lora(2), ["q"])
    layer = model.blocks[0].q
    inner = layer.forward
    layer.forward = lambda input: inner(input) + 1
    x = make_input()
    expected = model(x)
    with contextlib.suppress(sl.AdapterError):
        adapter.detach()
    assert torch.equal(model(x), expected)


@some_specs
def test_detach_keeping_merged_weights(key):
    model = make_net(dtype=torch.float64)
    model.blocks[0].v.weight.requires_grad_(False)
    untouched = [tensor.requires_grad for tensor in model.parameters()]
    adapter = attach_filled(model, key)
    x = make_input(dtype=torch.float64)
    y = model(x)
    adapter.merge()
    merged = model(x)
    adapter.detach(keep_merged=True)
    assert torch.equal(model(x), merged)
    assert_near(merged, y)
    assert [tensor.requires_grad for tensor in model.parameters()] == untouched
    assert all("forward" not in vars(module) for module in model.modules())


OUT_OF_TURN = {
    "merge twice": (["merge"], "merge", {}, "merged already"),
    "unmerge unmerged": ([], "unmerge", {}, "must be merged"),
    "unmerge twice": (["merge", "unmerge"], "unmerge", {}, "must be merged"),
    "merge detached": (["detach"], "merge", {}, "must be attached"),
    "unmerge detached": (["detach"], "unmerge", {}, "must be merged"),
    "detach twice": (["detach"], "detach", {}, "must be attached"),
    "detach merged": (["merge"], "detach", {}, "keep_merged=True"),
}


@pytest.mark.parametrize(
    ("before", "call", "options", "message"), OUT_OF_TURN.values(), ids=OUT_OF_TURN
)
def test_out_of_turn(before, call, options, message):
    model = make_net()
    adapter = attach_filled(model, "lora")
    for step in before:
        getattr(adapter, step)()
    with unchanged(model), pytest.raises(sl.AdapterError, match=message):
        getattr(adapter, call)(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@some_specs
def test_update_that_is_not_finite_is_not_merged(key, value):
    model = make_net()
    adapter = attach_filled(model, key)
    with torch.no_grad():
        list(adapter.parameters())[-1].view(-1)[-1] = value
    bits = base_bits(model)
    block = 0 if key == "fastfood" else 1  # its map spreads one number over all weights
    with pytest.raises(ValueError, match=rf"'blocks\.{block}\.\w'.* finite"):
        adapter.merge()
    assert base_bits(model) == bits
    assert not adapter.merged
    fill(adapter).merge()
    adapter.unmerge()
    assert base_bits(model) == bits


def test_sum_that_overflows_half_precision_is_not_merged():
    """ΔW is finite in float32; W₀ + ΔW is infinite in float16."""
    model = make_net(dtype=torch.float16)
    adapter = slt.attach(model, sl.dense(), ["q"])
    with torch.no_grad():
        list(adapter.parameters())[-1].fill_(1e6)
    bits = base_bits(model)
    with pytest.raises(ValueError, match="finite"):
        adapter.merge()
    assert base_bits(model) == bits
    assert not adapter.merged


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("owner", [Support, torch.Tensor], ids=["forming", "half-written"])
def test_interrupted_merge_changes_nothing(owner, place, fault, monkeypatch):
    model = make_net()
    adapter = attach_filled(model, "cut")
    bits, x = base_bits(model), make_input()
    expected = model(x)
    name, calls = {Support: "delta", torch.Tensor: "add_"}[owner], iter(range(100))
    plain = getattr(owner, name)

    def interrupted(self, *args, **kwargs):
        if next(calls) != place:
            return plain(self, *args, **kwargs)
        if owner is torch.Tensor:
            plain(self[:1], args[0][:1])
        raise fault

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(fault):
        adapter.merge()
    monkeypatch.undo()
    assert base_bits(model) == bits
    assert not adapter.merged
    assert torch.equal(model(x), expected)
    adapter.merge()
    adapter.unmerge()
    assert base_bits(model) == bits


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_disabled_ends_after_an_error_in_its_body(merged):
    model = make_net()
    x = make_input()
    base = model(x)
    adapter = attach_filled(model, "lora")
    if merged:
        adapter.merge()
    adapted = model(x)

    def fail():
        with adapter.disabled():
            assert torch.equal(model(x), base)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert adapter.merged == merged
    assert torch.equal(model(x), adapted)


def test_disabled_blocks_may_end_in_any_order():
    """As those of two generators do."""
    model = make_net()
    adapter = attach_filled(model, "lora")
    first, second = adapter.disabled(), adapter.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not adapter.active
    second.__exit__(None, None, None)
    assert adapter.active


def test_merge_inside_disabled_does_not_leave_the_adapter_disabled():
    model = make_net()
    adapter = attach_filled(model, "lora")
    x = make_input()
    adapted = model(x)
    adapter.merge()
    with contextlib.suppress(sl.AdapterError), adapter.disabled():
        adapter.merge()
    if adapter.merged:
        adapter.unmerge()
    assert adapter.active
    assert torch.equal(model(x), adapted)


def test_detach_inside_disabled_ends_quietly():
    model = make_net()
    adapter = attach_filled(model, "lora")
    adapter.merge()
    bits = make_net().state_dict()
    with adapter.disabled():
        adapter.detach()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in bits.items())


@some_specs
def test_merge_works_on_weights_that_were_unfrozen(key):
    model = make_net()
    adapter = attach_filled(model, key)
    model.requires_grad_(True)
    x = make_input()
    y = model(x)
    adapter.merge()
    assert_near(model(x), y)
    assert model.blocks[0].q.weight.is_leaf
    adapter.unmerge()
    assert torch.equal(model(x), y)


def test_merged_model_costs_what_its_base_does():
    """A merged layer runs its own forward once, and nothing else."""
    model = make_net()
    adapter = attach_filled(model, "dense")
    adapter.merge()
    x = make_input()
    with torch.profiler.profile() as profile:
        model(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::linear"] == 7
    assert "FormedLinear" not in counts


@some_specs
def test_state_dict_of_merged_model_is_not_applied_twice(key):
    """It has the update in the weights and in the factors: right, or refused."""
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    x = make_input(dtype=torch.float64)
    y = model(x)
    adapter.merge()
    other = make_net(seed=5, dtype=torch.float64)
    slt.attach(other, SPECS[key], targets_of(key))
    before = snapshot(other)
    try:
        other.load_state_dict(model.state_dict())
    except sl.AdapterError:
        assert snapshot(other) == before
    else:
        assert_near(other(x), y)


def test_state_loaded_while_merged_is_not_undone_by_unmerge():
    model = make_net()
    adapter = attach_filled(model, "lora")
    adapter.merge()
    loaded = make_net(seed=9).state_dict()
    before = snapshot(model)
    try:
        model.load_state_dict(loaded, strict=False)
    except sl.AdapterError:
        assert snapshot(model) == before
    else:
        adapter.unmerge()
        assert torch.equal(model.blocks[0].q.weight, loaded["blocks.0.q.weight"])


def test_meta_model_attaches_and_refuses_to_merge():
    with torch.device("meta"):
        model = make_net()
    adapter = slt.attach(model, sl.lora(2), ["q"])
    assert adapter.num_parameters == 2 * 2 * (16 + 8)
    assert {factor.device.type for factor in adapter.parameters()} == {"meta"}
    assert model(torch.empty(2, 16, device="meta")).shape == (2, 3)
    with unchanged(model), pytest.raises(sl.AdapterError, match=r"meta device.*blocks\.0\.q"):
        adapter.merge()


def test_one_meta_weight_among_others_refuses_the_whole_merge():
    model = make_net()
    adapter = attach_filled(model, "lora")
    layer = model.blocks[1].v
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    with unchanged(model), pytest.raises(sl.AdapterError, match=r"meta device.*blocks\.1\.v"):
        adapter.merge()


def test_snapshot_sees_changes():
    """The measure itself: a bit, a flag, an attribute, a hook."""
    for change in (
        lambda m: m.head.weight.data[0, 0].add_(1e-6),
        lambda m: m.head.requires_grad_(False),
        lambda m: setattr(m.head, "extra", 1),
        lambda m: m.head.register_forward_hook(lambda *_: None),
        lambda m: m.add_module("extra", nn.Identity()),
        lambda m: setattr(m.head, "forward", m.head.forward),
        lambda m: m.eval(),
    ):
        model = make_net()
        before = snapshot(model)
        change(model)
        assert snapshot(model) != before


@every_layer
@pytest.mark.parametrize("factors", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_made_in_the_wider_dtype_and_rounded_once(layer, dtype, factors):
    model = make_net(layer, dtype=dtype)
    adapter = attach_filled(model, "lora", dtype=factors)
    expected = {}
    for name, module in adapter.layers().items():
        delta = adapter.delta(name).detach()
        delta = delta.t() if layer == "conv1d" else delta
        wide = torch.promote_types(dtype, factors)
        expected[name] = (module.weight.to(wide) + delta.to(wide)).to(dtype)
    adapter.merge()
    for name, module in adapter.layers().items():
        assert torch.equal(module.weight, expected[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 8, 127])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, place, value):
    model = make_net(dtype=dtype)
    adapter = slt.attach(model, sl.dense(), ["blocks.1.q"])
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[place] = value
    bits = base_bits(model)
    with pytest.raises(ValueError, match="finite"):
        adapter.merge()
    assert base_bits(model) == bits


def test_a_merge_beside_a_pass_of_another_thread_is_refused():
    """Else the pass would read some layers with their update and some without."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            inside.set()
            go_on.wait(10)
            return self.b(x)

    model = Slow()
    adapter = slt.attach(model, sl.lora(rank=1, alpha=3))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4)
    go_on.set()
    expected = model(x).detach()
    for verb, call in (("merged", adapter.merge), ("unmerged", adapter.unmerge)):
        inside.clear()
        go_on.clear()
        found = []
        thread = threading.Thread(target=lambda found=found: found.append(model(x).detach()))
        thread.start()
        inside.wait(10)
        with pytest.raises(sl.AdapterError, match=f"must not be {verb} while another thread"):
            call()
        go_on.set()
        thread.join()
        torch.testing.assert_close(found[0], expected)
        call()
        torch.testing.assert_close(model(x), expected)


def test_passes_wait_for_a_merge_to_end():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    adapter = slt.attach(model, sl.lora(rank=2, alpha=3))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 64)
    expected, found, stop = model(x).detach(), [], threading.Event()

    def passes():
        while not stop.is_set():
            found.append(model(x).detach())
            stop.wait(0.001)

    thread = threading.Thread(target=passes)
    thread.start()
    done = 0
    while done < 20:
        with contextlib.suppress(sl.AdapterError):
            adapter.unmerge() if adapter.merged else adapter.merge()
            done += 1
    stop.set()
    thread.join()
    assert found
    for y in found:
        torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-3)
