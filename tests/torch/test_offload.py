"""Weights that accelerate keeps on the CPU or on disk, in both orders; and nn.DataParallel."""

import copy
import warnings

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.errors import AdapterError
from tests.torch.helpers import SPECS, assert_near, fill, make_input, make_net, targets_of

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import remove_hook_from_submodules  # noqa: E402


def cpu(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def disk(model, folder):
    accelerate.disk_offload(model, folder / "weights", execution_device="cpu")


def dispatched(model, folder):
    places = {"blocks.0": "cpu", "blocks.1": "disk", "head": "cpu", "shift": "cpu"}
    if hasattr(model, "superlora"):
        places["superlora"] = "disk"
    with warnings.catch_warnings(action="ignore"):  # "shift" is no module
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder / "weights")


HOW = {"cpu": cpu, "disk": disk, "dispatched": dispatched}
every_how = pytest.mark.parametrize("how", HOW.values(), ids=HOW)
KEYS = ["lora", "dense", "one-group", "fourierft"]


def away(model):
    """Return how many weights of the base lie nowhere in memory."""
    own = [p for name, p in model.named_parameters() if "superlora" not in name]
    return sum(parameter.is_meta for parameter in own)


def make(key):
    model = make_net()
    return model, slt.attach(model, SPECS[key], targets_of(key))


def expected_of(key):
    model, adapter = make(key)
    y = model(make_input())
    y.square().mean().backward()
    fill(adapter)
    return y.detach(), {n: p.grad for n, p in adapter.named_parameters()}, model(make_input())


@every_how
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("order", ["attach first", "offload first"])
def test_both_orders(key, how, order, tmp_path):
    """The factors stay in memory, train, and are saved; the weights come and go."""
    start, gradients, trained = expected_of(key)
    model = make_net()
    if order == "offload first":
        how(model, tmp_path)
    adapter = slt.attach(model, SPECS[key], targets_of(key))
    if order == "attach first":
        how(model, tmp_path)
    assert away(model)
    y = model(make_input())
    assert_near(y, start)
    y.square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert not parameter.is_meta
        assert parameter.requires_grad
        if gradients[name] is not None:
            assert_near(parameter.grad, gradients[name])
    fill(adapter)
    assert_near(model(make_input()), trained)
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    again = make_net()
    slt.load(again, path)
    assert_near(again(make_input()), trained)
    assert away(model)


@every_how
def test_a_file_is_loaded_onto_offloaded_weights(how, tmp_path):
    model, adapter = make("lora")
    fill(adapter).save(tmp_path / "adapter.safetensors")
    expected = model(make_input())
    model = make_net()
    how(model, tmp_path)
    loaded = slt.load(model, tmp_path / "adapter.safetensors")
    assert_near(model(make_input()), expected)
    loaded.to_peft(tmp_path / "peft")
    again = make_net()
    slt.from_peft(again, tmp_path / "peft")
    assert_near(again(make_input()), expected)


@every_how
@pytest.mark.parametrize("first", [True, False])
def test_saved_before_any_pass(how, first, tmp_path):
    model, adapter = make("lora")
    fill(adapter)
    expected = model(make_input())
    how(model, tmp_path)
    path = tmp_path / "adapter.safetensors"
    read = {name: adapter.delta(name) for name in adapter.plan.shapes} if not first else {}
    adapter.save(path)
    again = make_net()
    loaded = slt.load(again, path)
    assert_near(again(make_input()), expected)
    for name, delta in read.items():
        assert torch.equal(delta, loaded.delta(name))


@every_how
def test_merge_is_refused_until_the_weights_are_back(how, tmp_path):
    model, adapter = make("lora")
    fill(adapter)
    expected = model(make_input())
    weight = model.blocks[1].q.weight.detach().clone()
    how(model, tmp_path)
    model(make_input())
    with pytest.raises(AdapterError, match="loaded, and not offloaded, to be merged"):
        adapter.merge()
    with pytest.raises(AdapterError, match="wrapped by something attached later"):
        adapter.detach()
    assert_near(model(make_input()), expected)
    remove_hook_from_submodules(model)
    assert not away(model)
    adapter.merge()
    assert_near(model(make_input()), expected)
    adapter.unmerge()
    assert torch.equal(model.blocks[1].q.weight, weight)
    adapter.detach()
    assert torch.equal(model(make_input()), make_net()(make_input()))


@every_how
def test_detached_from_offloaded_weights(how, tmp_path):
    expected = make_net()(make_input())
    model = make_net()
    how(model, tmp_path)
    adapter = fill(slt.attach(model, SPECS["lora"], targets_of("lora")))
    with pytest.raises(AdapterError, match="loaded, and not offloaded, to be merged"):
        adapter.merge()
    adapter.detach()
    assert torch.equal(model(make_input()), expected)


def test_any_layer_and_operation_that_was_attached_before(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.conv(self.words(x).mT).mT)

    torch.manual_seed(0)
    model = Model()
    first = fill(slt.attach(model, sl.dense(scale=0.3), ["words", "conv"]))
    fill(slt.attach(model, sl.glora(2), ["out"], name="second"))
    x = torch.arange(12).reshape(2, 6) % 9
    y = model(x)
    y.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    first.zero_grad()
    model.second.zero_grad()
    cpu(model, tmp_path)
    z = model(x)
    assert_near(z, y)
    z.square().mean().backward()
    found = dict(model.named_parameters())
    for name, gradient in gradients.items():
        assert_near(found[name].grad, gradient)


@pytest.mark.parametrize("spec", [sl.glora(2), sl.dense()], ids=["operations", "embedding"])
def test_what_needs_the_weights_is_refused_while_they_are_offloaded(spec, tmp_path):
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "words": nn.Embedding(9, 8)})
    cpu(model, tmp_path)
    targets = ["q"] if isinstance(spec, sl.Supports) else ["words"]
    with pytest.raises(ValueError, match="while accelerate offloads it"):
        slt.attach(model, spec, targets)
    with pytest.raises(AdapterError, match="must be loaded where a spec takes"):
        slt.attach(model, sl.lora_xs(2), ["q"])
    assert "superlora" not in dict(model.named_modules())


def replica_of(model):
    """Copy a model as `nn.DataParallel` does, to the same device."""
    copies = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        own = copies[id(module)]
        own._former_parameters = {}
        for key, child in module._modules.items():
            own._modules[key] = None if child is None else copies[id(child)]
        for key, parameter in module._parameters.items():
            copied = None if parameter is None else parameter.clone()
            own.__dict__[key] = own._former_parameters[key] = copied
    return copies[id(model)]


@pytest.mark.parametrize("merged", [False, True])
def test_copies_of_data_parallel_are_refused(merged):
    model, adapter = make("lora")
    fill(adapter)
    expected = model(make_input())
    if merged:
        adapter.merge()
    with pytest.raises(AdapterError, match="must not be copied by"):
        replica_of(model)(make_input())
    # Of one device no copy is made.
    assert_near(nn.DataParallel(model)(make_input()), expected)
    with pytest.raises(AdapterError, match=r"must be attached before DataParallel"):
        slt.attach(nn.DataParallel(make_net()), sl.lora(2))
    if not merged:
        adapter.merge()
    adapter.detach(keep_merged=True)
    assert_near(replica_of(model)(make_input()), expected)
    assert_near(copy.deepcopy(model)(make_input()), expected)


def test_copies_of_a_part_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    slt.attach(model, sl.lora(2))
    with pytest.raises(AdapterError, match="must not be copied by"):
        replica_of(nn.Sequential(nn.Linear(4, 4), model))(torch.ones(2, 4))


def test_factors_that_were_flattened_are_not_saved(tmp_path):
    """As `FullyShardedDataParallel` does it."""
    adapter = make("lora")[1]
    place = adapter.blocks.first
    flat = nn.Parameter(place.read().detach().flatten()[:3])
    place.owner._parameters[place.leaf] = flat
    for write in (adapter.save, adapter.to_peft, adapter.to_lycoris):
        with pytest.raises(AdapterError, match="must have the shapes of the plan"):
            write(tmp_path / "adapter.safetensors")
    assert not [*tmp_path.iterdir()]
