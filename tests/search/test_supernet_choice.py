"""Which configuration counts: drawn for a step, chosen, in several passes, in copies."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from superlora.errors import AdapterError  # noqa: E402
from superlora.search import Supernet  # noqa: E402
from tests.search.supernets import fill, make_supernet  # noqa: E402
from tests.torch.conftest import _one_thread  # noqa: E402, F401
from tests.torch.helpers import (  # noqa: E402
    bits,
    every_layer,
    gradients,
    loss_of,
    make_input,
    make_net,
)

# Drawing.


def test_draws_are_uniform():
    """Every option of every layer and operation, and every pair of layers, equally often."""
    _, supernet = make_supernet()
    space, steps = supernet.space, 4000
    counts, pairs = {}, {}
    for step in range(steps):
        found = supernet.sample(step)
        space.check(found)
        for layer, options in found.items():
            for operation, option in options.items():
                key = (layer, operation, option)
                counts[key] = counts.get(key, 0) + 1
        both = tuple(found[f"blocks.{block}.q"]["add_weight"] for block in range(2))
        pairs[both] = pairs.get(both, 0) + 1
    for layer in space.layers:
        for operation in space.operations:
            options = space.options(layer, operation)
            share = 1 / len(options)
            deviation = (steps * share * (1 - share)) ** 0.5
            for option in options:
                assert abs(counts[layer, operation, option] - steps * share) < 5 * deviation
    assert len(pairs) == 25
    assert all(abs(count - steps / 25) < 5 * (steps / 25) ** 0.5 for count in pairs.values())


def test_draws_depend_on_seed_and_step_alone():
    _, one = make_supernet(seed=5)
    _, other = make_supernet(seed=5)
    torch.manual_seed(1)
    found = [one.draw(step) for step in range(20)]
    state = torch.random.get_rng_state()
    assert [other.draw(step) for step in reversed(range(20))] == found[::-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    keys = {one.space.key(configuration) for configuration in found}
    assert len(keys) == 20
    _, third = make_supernet(seed=6)
    assert [third.sample(step) for step in range(20)] != found
    assert one.sample(2**64 - 1) == other.sample(2**64 - 1)


def test_another_process_draws_the_same():
    program = """
import json, torch
from superlora.search import Supernet
model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))
supernet = Supernet(model, ranks=(4, 2), seed=9)
print(json.dumps([supernet.draw(step) for step in (0, 1, 1000)]))
print(supernet.stored("1")["add_weight"][1].tolist())
"""
    call = [sys.executable, "-c", program]
    runs = [subprocess.run(call, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    supernet = Supernet(model, ranks=(4, 2), seed=9)
    drawn, right = runs[0].stdout.splitlines()
    assert json.loads(drawn) == [supernet.draw(step) for step in (0, 1, 1000)]
    assert json.loads(right) == supernet.stored("1")["add_weight"][1].tolist()


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (1.0, TypeError, "step must be an integer: got 1.0"),
        (True, TypeError, "step must be an integer: got True"),
        (-1, ValueError, "step must be at least 0: got -1"),
        (2**64, ValueError, r"step must be below 2\*\*64"),
    ],
    ids=str,
)
def test_steps_are_checked(step, error, message):
    _, supernet = make_supernet()
    supernet.draw(3)
    before = supernet.configuration
    with pytest.raises(error, match=message):
        supernet.draw(step)
    assert supernet.configuration == before


# Choosing.


def test_a_forward_without_configuration_is_refused():
    model, supernet = make_supernet()
    for training in (True, False):
        model.train(training)
        with pytest.raises(AdapterError, match=r"must have a configuration: call draw\(step\)"):
            model(make_input())
    assert supernet.configuration is None
    supernet.draw(0)
    model(make_input())
    supernet.use(None)
    with pytest.raises(AdapterError, match="must have a configuration"):
        model(make_input())


def test_a_block_chooses_and_gives_back():
    model, supernet = make_supernet()
    x = make_input()
    drawn = supernet.draw(0)
    y = model(x)
    fixed = supernet.space.fixed(add_weight=2)
    with supernet.using(fixed):
        assert supernet.configuration == fixed
        inner = model(x)
        with supernet.using(supernet.space.most):
            assert not torch.equal(model(x), inner)
        assert torch.equal(model(x), inner)
    assert supernet.configuration == drawn
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="own"), supernet.using(fixed):
        raise RuntimeError("own")
    assert supernet.configuration == drawn


def test_a_configuration_is_copied():
    model, supernet = make_supernet()
    own = supernet.space.fixed(add_weight=2)
    supernet.use(own)
    y = model(make_input())
    for one in (own, supernet.configuration):
        one["blocks.0.q"]["add_weight"] = "none"
    supernet.options("blocks.0.q")["add_weight"] = "none"
    assert supernet.options("blocks.0.q")["add_weight"] == 2
    with pytest.raises(AttributeError):
        supernet.configuration = own
    assert torch.equal(model(make_input()), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: c["blocks.0.q"].update(add_weight=4),
            ValueError,
            "rank must be at most 3.*got 4",
        ),
        (lambda c: c["blocks.0.q"].update(add_weight=1), ValueError, "must be one of.*got 1"),
        (
            lambda c: c["blocks.1.v"].update(scale_bias=2),
            ValueError,
            "blocks.1.v.*scale_bias.*got 2",
        ),
        (lambda c: c.pop("blocks.1.o"), ValueError, "without 'blocks.1.o'"),
        (lambda c: c["blocks.0.q"].pop("add_bias"), ValueError, "without 'add_bias'"),
        (lambda c: c.update(head={}), ValueError, "also 'head'"),
    ],
    ids=["rank above", "rank between", "rank of a bias", "no layer", "no operation", "other layer"],
)
def test_configurations_are_checked(change, error, message):
    model, supernet = make_supernet()
    supernet.draw(0)
    y = model(make_input())
    bad = supernet.space.fixed(add_weight=2)
    change(bad)
    for choose in (supernet.use, supernet.extract, lambda own: supernet.using(own).__enter__()):
        with pytest.raises(error, match=message):
            choose(bad)
        assert torch.equal(model(make_input()), y)


# Steps of several passes.


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_layer
def test_checkpoints_compute_again_with_the_same_configuration(layer, dtype, reentrant):
    model, supernet = make_supernet(layer, to={"dtype": dtype})
    x = make_input(dtype=dtype).requires_grad_()
    for step in range(4):
        supernet.draw(step)
        plain = model(x)
        expected = gradients(supernet, loss_of(plain))
        supernet.zero_grad()
        y = x + model.shift
        for block in model.blocks:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y = model.head(y)
        assert torch.equal(y, plain)
        loss_of(y).backward()
        for name, parameter in supernet.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert torch.equal(found, expected[name])


def test_one_draw_serves_several_passes():
    """Gradients of two halves of a batch sum to those of the whole."""
    model, supernet = make_supernet(to={"dtype": torch.float64})
    x = make_input(6, 5, dtype=torch.float64)
    supernet.draw(7)
    expected = gradients(supernet, model(x).square().sum())
    for part in x.split(2):
        model(part).square().sum().backward()
    for name, parameter in supernet.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected[name])


# Copies.


def _through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_torch],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_are_independent(copier):
    model, supernet = make_supernet(to={"dtype": torch.float64})
    x = make_input(dtype=torch.float64)
    supernet.use(supernet.space.most)
    with torch.no_grad():
        y = model(x)
    other = copier(model)
    with torch.no_grad():
        assert torch.equal(other(x), y)
    assert other.supernet.space == supernet.space
    before = {name: bits(value) for name, value in model.state_dict().items()}
    fill(other.supernet, seed=8)
    other.supernet.use(other.supernet.space.least)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    other.supernet.detach()
    assert {name: bits(value) for name, value in model.state_dict().items()} == before
    assert torch.equal(other(x), make_net(dtype=torch.float64)(x))


def test_state_dict_round_trip():
    model, supernet = make_supernet()
    other, twin = make_supernet()
    fill(twin, seed=9)
    supernet.use(supernet.space.most)
    twin.use(twin.space.most)
    assert not torch.allclose(model(make_input()), other(make_input()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(make_input()), other(make_input()))


def test_what_scales_a_bias_needs_one():
    mixed = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    supernet = Supernet(mixed, ranks=(2,))
    space = supernet.space
    assert space.without_bias == ("0",)
    assert space.options("0", "scale_bias") == ("none",)
    assert space.options("1", "scale_bias") == ("vector", "constant", "none")
    assert [set(supernet.stored(layer)) - {"scale_bias"} for layer in "01"] == 2 * [
        {"scale_weight", "add_weight", "weight_to_bias", "add_bias"}
    ]
    assert ["scale_bias" in supernet.stored(layer) for layer in "01"] == [False, True]
    configuration = space.fixed(add_weight=2, add_bias="vector", scale_bias="vector")
    assert [configuration[layer]["scale_bias"] for layer in "01"] == ["none", "vector"]
    fill(supernet)
    x = torch.randn(3, 4)
    with supernet.using(configuration):
        expected = mixed(x)
    adapter = supernet.extract(configuration)
    assert adapter.num_parameters == space.num_parameters(configuration)
    torch.testing.assert_close(mixed(x), expected)
    adapter.detach()
    with pytest.raises(ValueError, match=r"\['0'\]\['scale_bias'\] must be one of \['none'\]"):
        space.check(
            {layer: {**own, "scale_bias": "vector"} for layer, own in configuration.items()}
        )


def test_a_layer_without_any_support_is_as_it_was(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))

    model, x = make(), torch.randn(3, 4)
    supernet = Supernet(model, operations={"scale_bias": ("vector", "none")})
    fill(supernet)
    assert supernet.stored("0") == {}
    configuration = supernet.space.fixed(scale_bias="vector")
    supernet.save(tmp_path / "s.safetensors")
    with supernet.using(configuration):
        expected = model(x)
    adapter = supernet.extract(configuration)
    assert adapter.num_parameters == 4
    torch.testing.assert_close(model(x), expected)
    other = make()
    with Supernet.load(other, tmp_path / "s.safetensors").using(configuration):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("end", ["extract", "detach"])
def test_a_supernet_on_no_model_takes_no_configuration(end):
    _, supernet = make_supernet()
    configuration = supernet.space.fixed(add_weight=2)
    with supernet.using(configuration):
        pass
    if end == "extract":
        supernet.extract(configuration)
    else:
        supernet.detach()
    message = "must be attached to be given a configuration"
    for choose in (lambda: supernet.draw(0), lambda: supernet.use(configuration)):
        with pytest.raises(AdapterError, match=message):
            choose()
    with pytest.raises(AdapterError, match=message), supernet.using(configuration):
        pass
    supernet.use(None)
    assert supernet.sample(0)


def test_what_a_supernet_is_asked_for_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="ranks must be a sequence of integers"):
        Supernet(model, ranks=2)
    with pytest.raises(ValueError, match="layer must be one of '0': got '1'"):
        Supernet(model, ranks=(2,)).stored("1")


def test_a_space_of_nothing_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="must have an option that is not 'none'"):
        Supernet(model, operations={"add_bias": ("none",)})
    assert "forward" not in model[0].__dict__


def test_what_scales_a_bias_needs_a_layer_that_has_one():
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    assert "scale_bias" not in Supernet(bare, ranks=(2,)).space.operations
    other = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match="must not have 'scale_bias' where no layer has a bias"):
        Supernet(other, ranks=(2,), operations={"scale_bias": ("vector", "none")})
