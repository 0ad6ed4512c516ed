"""Configurations as ordinary designs: integers alone, and extracted from a supernet."""

import itertools

import numpy
import pytest

import superlora as sl
from superlora.design.supports import support_shape
from superlora.search import Space
from superlora.search.extract import supports_of
from tests.conftest import is_installed

LAYERS = {"blocks.0.q": (5, 4), "blocks.0.v": (3, 4), "blocks.10.q": (5, 4), "q": (2, 6)}
SPACE = Space(LAYERS, ranks=(8, 3, 1))


def drawn(seed):
    return SPACE.sample(numpy.random.default_rng(seed))


# Designs.


@pytest.mark.parametrize("seed", range(20))
def test_designs_have_the_parameters_of_the_configuration(seed):
    configuration = drawn(seed)
    plan = sl.Plan(supports_of(configuration), LAYERS)
    assert plan.num_parameters == SPACE.num_parameters(configuration)
    chosen = {
        f"{operation}.{layer}": support_shape(operation, LAYERS[layer])
        for layer, options in configuration.items()
        for operation, option in options.items()
        if option != "none"
    }
    assert dict(plan.shapes) == chosen


@pytest.mark.parametrize("operation", SPACE.operations)
def test_designs_equal_the_options(operation):
    """What each option makes of its blocks, against its formula."""
    for option in SPACE.options("q", operation):
        if option == "none":
            continue
        configuration = SPACE.fixed({operation: option})
        plan = sl.Plan(supports_of(configuration), LAYERS)
        generator = numpy.random.default_rng(0)
        factors = {
            name: generator.standard_normal(shape) for name, shape in plan.factor_shapes.items()
        }
        for layer, widths in LAYERS.items():
            name = f"{operation}.{layer}"
            shape = support_shape(operation, widths)
            blocks = [factors[block] for block in plan.blocks_of(name)]
            if isinstance(option, int):
                left, right = blocks
                assert (left.shape, right.shape) == ((shape[0], option), (shape[1], option))
                expected = left @ right.T
            else:
                (vector,) = blocks
                assert vector.shape == ((1,) if option == "constant" else (shape[0],))
                expected = numpy.broadcast_to(vector[:, None], shape)
            numpy.testing.assert_allclose(plan.delta(factors, name), expected)


def test_every_pair_of_options_shares_a_design():
    """One spec for an operation says all that differs, whatever comes first."""
    for operation in SPACE.operations:
        for one, other in itertools.permutations(SPACE.options("q", operation), 2):
            configuration = SPACE.fixed()
            configuration["blocks.0.q"][operation] = one
            configuration["q"][operation] = other
            plan = sl.Plan(supports_of(configuration), LAYERS)
            assert plan.num_parameters == SPACE.num_parameters(configuration)
            again = sl.Spec.from_dict(supports_of(configuration)[operation].to_dict())
            assert again == supports_of(configuration)[operation]


def test_names_that_end_alike_are_told_apart():
    layers = {
        "q": (4, 4),
        "add_weight.q": (4, 4),
        "a.add_weight.q": (4, 4),
        "aXq": (4, 4),
        "a.q": (4, 4),
    }
    space = Space(layers, ranks=(3,))
    for layer in layers:
        configuration = space.fixed(add_weight="vector")
        configuration[layer]["add_weight"] = 3
        configuration["q" if layer != "q" else "a.q"]["add_weight"] = "none"
        plan = sl.Plan(supports_of(configuration), layers)
        counts = {
            name: sum(int(numpy.prod(plan.factor_shapes[b])) for b in plan.blocks_of(name))
            for name in plan.shapes
        }
        expected = {
            f"add_weight.{name}": {3: 24, "vector": 4}[own["add_weight"]]
            for name, own in configuration.items()
            if own["add_weight"] != "none"
        }
        assert counts == expected


def test_nothing_chosen_is_refused():
    with pytest.raises(ValueError, match="must choose a support for at least one layer"):
        supports_of(SPACE.fixed())
    with pytest.raises(
        ValueError, match=r"support of 'add_weight' must be a rank or one of .* got 'row'"
    ):
        supports_of({"q": {"add_weight": "row"}})


# Extraction.

torch_alone = pytest.mark.skipif(not is_installed("torch"), reason="needs torch")
if is_installed("torch"):
    import torch

    import superlora.torch as slt
    from superlora.errors import AdapterError
    from superlora.search import Supernet
    from tests.search.supernets import TARGETS, fill, make_lone, make_supernet
    from tests.torch.conftest import _one_thread  # noqa: F401
    from tests.torch.helpers import (
        assert_near,
        bits,
        every_layer,
        gradients,
        loss_of,
        make_input,
        make_net,
        seeded,
        unchanged,
    )
else:
    every_layer = pytest.mark.parametrize("layer", [])


@torch_alone
@every_layer
@pytest.mark.parametrize("seed", range(5))
def test_an_extracted_adapter_computes_the_same(layer, seed, tmp_path):
    """Attached, merged, saved and loaded: as the supernet, without training."""
    model, supernet = make_supernet(layer, to={"dtype": torch.float64})
    x = make_input(dtype=torch.float64)
    configuration = supernet.sample(seed)
    supernet.use(configuration)
    supernet.scale = 1.5
    y = model(x)
    expected = gradients(supernet, loss_of(y))
    with supernet.using(configuration):
        supernet.merge()
        merged = model(x)
    assert torch.equal(model(x), y)
    adapter = supernet.extract(configuration)
    assert isinstance(adapter, slt.Adapter)
    assert not supernet.attached
    assert model.superlora is adapter
    assert not hasattr(model, "supernet")
    assert torch.equal(model(x), y)
    found = gradients(adapter, loss_of(model(x)))
    total = sum(float(each.double().norm() ** 2) for each in found.values())
    exact = sum(float(each.double().norm() ** 2) for each in expected.values())
    assert abs(total - exact) < 1e-12 * exact
    assert adapter.num_parameters == supernet.space.num_parameters(configuration)
    adapter.save(tmp_path / "a.safetensors")
    adapter.merge()
    assert torch.equal(model(x), merged)
    assert_near(merged, y)
    adapter.unmerge()
    other = make_net(layer, dtype=torch.float64)
    slt.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))


@torch_alone
@every_layer
def test_every_option_is_extracted(layer):
    """One layer with each option of each operation, beside ranks."""
    for operation, options in make_lone(layer)[1].space.operations.items():
        for option in options:
            model, supernet = make_lone(layer)
            x = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(2, 4)
            configuration = supernet.space.fixed({"add_weight": 2, operation: option})
            if (operation, option) == ("add_weight", "none"):
                continue
            supernet.use(configuration)
            y = model(x)
            supernet.extract(configuration)
            assert torch.equal(model(x), y)


@torch_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_precision(dtype):
    with seeded(0):
        model = torch.nn.Sequential(torch.nn.Linear(16, 8)).to(dtype)
    supernet = fill(Supernet(model, ranks=(3,)))
    x = make_input(dtype=dtype)
    configuration = supernet.space.most
    supernet.use(configuration)
    y = model(x)
    adapter = supernet.extract(configuration)
    assert adapter.dtype == torch.float32
    assert model(x).dtype == dtype
    assert torch.equal(model(x), y)
    adapter.merge()
    assert_near(model(x), y)


@torch_alone
def test_it_can_be_trained_on_and_leaves_the_supernet_alone():
    model, supernet = make_supernet(to={"dtype": torch.float64})
    base = {name: bits(value) for name, value in make_net(dtype=torch.float64).state_dict().items()}
    stored = [bits(parameter) for parameter in supernet.parameters()]
    adapter = supernet.extract(supernet.space.fixed(add_weight=2, scale_weight="vector"))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    x = make_input(dtype=torch.float64)
    y = model(x)
    y.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(model(x), y)
    assert [bits(parameter) for parameter in supernet.parameters()] == stored
    adapter.detach()
    assert {name: bits(value) for name, value in model.state_dict().items()} == base
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch_alone
def test_a_failed_extraction_changes_nothing():
    model, supernet = make_supernet()
    configuration = supernet.space.fixed(add_weight=2)
    supernet.use(configuration)
    with unchanged(model), pytest.raises(ValueError, match="must choose a support"):
        supernet.extract(supernet.space.fixed())
    for name, error in (("blocks", AdapterError), ("a b", ValueError)):
        with unchanged(model), pytest.raises(error, match="name must be"):
            supernet.extract(configuration, name=name)
    adapter = supernet.extract(configuration, name="supernet")
    assert model.supernet is adapter


@torch_alone
def test_an_attachment_that_fails_puts_the_supernet_back(monkeypatch):
    model, supernet = make_supernet()
    supernet.use(supernet.space.most)
    y = model(make_input())

    def fail(*arguments, **options):
        raise RuntimeError("own")

    monkeypatch.setattr("superlora.search.supernet.attach", fail)
    with pytest.raises(RuntimeError, match="own"):
        supernet.extract(supernet.space.most)
    with supernet.disabled():
        base = model(make_input())
        with pytest.raises(RuntimeError, match="own"):
            supernet.extract(supernet.space.most)
        assert torch.equal(model(make_input()), base)
    assert supernet.attached
    assert torch.equal(model(make_input()), y)
    supernet.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch_alone
def test_extracted_from_a_file(tmp_path):
    """Search, then file: a supernet is loaded, its best configuration extracted and saved."""
    _, supernet = make_supernet(to={"dtype": torch.float64})
    configuration = supernet.sample(5)
    supernet.save(tmp_path / "supernet.safetensors")
    model = make_net(dtype=torch.float64)
    found = Supernet.load(model, tmp_path / "supernet.safetensors")
    assert list(found.layers()) == [f"blocks.{b}.{name}" for b in range(2) for name in TARGETS]
    found.use(configuration)
    y = model(make_input(dtype=torch.float64))
    found.extract(configuration).save(tmp_path / "adapter.safetensors")
    other = make_net(dtype=torch.float64)
    slt.load(other, tmp_path / "adapter.safetensors").merge()
    assert_near(other(make_input(dtype=torch.float64)), y)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 8 * 10_000
