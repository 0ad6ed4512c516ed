"""`Space`: sizes and counts against every configuration of small spaces."""

import json
import subprocess
import sys

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import superlora.search
from superlora.search import Space
from tests.search.spaces import MIDDLE, SMALL, count, every, spaces

VIT = {
    f"blocks.{i}.{name}": (768, 768) for i in range(12) for name in ("qkv", "proj", "fc1", "fc2")
}


def test_the_sizes_of_the_paper():
    assert Space(VIT, ranks=(8,)).size == 432**48
    assert Space(VIT, ranks=(8, 4)).size == 900**48


@given(spaces())
def test_size_counts_and_extremes_are_those_of_all_configurations(space):
    configurations = list(every(space))
    assert space.size == len(configurations)
    counts = [count(space, configuration) for configuration in configurations]
    assert [space.num_parameters(configuration) for configuration in configurations] == counts
    assert space.least_parameters == space.num_parameters(space.least) == min(counts)
    assert space.most_parameters == space.num_parameters(space.most) == max(counts)


@given(spaces())
def test_keys_tell_all_configurations_apart(space):
    configurations = list(every(space))
    keys = {space.key(configuration) for configuration in configurations}
    assert len(keys) == len(configurations)
    assert all(len(key) == 20 for key in keys)


def test_the_key_is_the_same_in_another_order_and_after_json():
    configuration = MIDDLE.sample(numpy.random.default_rng(0))
    reordered = {
        layer: dict(reversed(options.items())) for layer, options in reversed(configuration.items())
    }
    assert list(reordered) != list(configuration)
    assert MIDDLE.key(reordered) == MIDDLE.key(configuration)
    assert MIDDLE.key(json.loads(json.dumps(configuration))) == MIDDLE.key(configuration)


@given(spaces())
def test_indices_and_back(space):
    for configuration in every(space):
        assert space.configuration(space.indices(configuration)) == configuration


@given(spaces())
def test_round_trip(space):
    again = Space.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space
    assert hash(again) == hash(space)
    assert again.fingerprint == space.fingerprint
    assert list(again.layers) == list(space.layers)


def test_fingerprints_differ():
    layers = {"q": (3, 2), "v": (3, 2)}
    others = [
        Space(layers),
        Space(dict(reversed(layers.items()))),
        Space({**layers, "v": (3, 3)}),
        Space(layers, ranks=(8,)),
        Space(layers, operations={"add_bias": ("none",)}),
        Space(layers, without_bias=("v",)),
    ]
    assert len({space.fingerprint for space in others}) == len(others)
    assert all(space != other for i, space in enumerate(others) for other in others[:i])


def test_layers_without_a_bias():
    layers = {"q": (3, 2), "k": (3, 2), "v": (3, 2)}
    whole, space = Space(layers, (2,)), Space(layers, (2,), without_bias=["v", "k"])
    assert space.without_bias == ("k", "v")
    assert space.options("v", "scale_bias") == ("none",)
    assert space.options("q", "scale_bias") == whole.options("v", "scale_bias")
    assert space.options("v", "add_bias") == whole.options("v", "add_bias")
    assert 9 * space.size == whole.size
    assert space.most_parameters == whole.most_parameters - 2 * 3
    found = space.fixed(scale_bias="vector", add_bias="vector")
    assert [own["scale_bias"] for own in found.values()] == ["vector", "none", "none"]
    assert all(own["add_bias"] == "vector" for own in found.values())
    with pytest.raises(ValueError, match=r"\['v'\]\['scale_bias'\] must be one of \['none'\]"):
        space.check(whole.fixed(scale_bias="vector") | {"k": found["k"]})
    with pytest.raises(ValueError, match="without_bias must be one of 'q', 'k', 'v': got 'o'"):
        Space(layers, without_bias=("o",))
    with pytest.raises(TypeError, match="without_bias must be a sequence of names: got 'q'"):
        Space(layers, without_bias="q")


def test_ranks_and_options_have_one_order():
    space = Space({"q": (3, 2)}, ranks=[1, 2], operations={"add_weight": ["none", 1, 2]})
    assert space.ranks == (2, 1)
    assert space.largest_rank == 2
    assert space.options("q", "add_weight") == (2, 1, "none")
    assert Space({"q": (3, 2)}, [2, 1], {"add_weight": [2, 1, "none"]}) == space


def test_the_default_options():
    space = Space({"q": (3, 2)}, ranks=(8, 4))
    matrix = (8, 4, "vector", "constant", "none")
    vector = ("vector", "constant", "none")
    assert dict(space.operations) == {
        "scale_weight": matrix,
        "add_weight": matrix,
        "weight_to_bias": (8, 4, "vector", "none"),
        "scale_bias": vector,
        "add_bias": vector,
    }


def test_samples_are_uniform():
    space = Space({"q": (3, 2)}, ranks=(2,), operations={"add_weight": (2, "vector", "none")})
    generator = numpy.random.default_rng(0)
    found = [space.sample(generator)["q"]["add_weight"] for _ in range(3000)]
    for option in (2, "vector", "none"):
        # Five standard deviations.
        assert abs(found.count(option) - 1000) < 130


def test_a_sample_is_plain_json():
    configuration = MIDDLE.sample(numpy.random.default_rng(1))
    assert json.loads(json.dumps(configuration)) == configuration
    MIDDLE.check(configuration)


def test_fixed_gives_every_layer_the_same():
    configuration = MIDDLE.fixed(add_weight=2, add_bias="vector")
    assert set(configuration) == set(MIDDLE.layers)
    for options in configuration.values():
        assert {name for name, option in options.items() if option != "none"} == {
            "add_weight",
            "add_bias",
        }
    assert MIDDLE.fixed({"add_weight": 2}, add_bias="vector") == configuration


CONFIGURATION = SMALL.fixed(add_weight=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": {"add_weight": 4, "add_bias": "none"}},
            ValueError,
            "rank .* at most 2, .* got 4",
        ),
        (
            {"q": {"add_weight": "vector", "add_bias": "none"}},
            ValueError,
            r"'q'.*2, 1, 'n.*got 'v",
        ),
        ({"q": {"add_weight": True, "add_bias": "none"}}, TypeError, "got True"),
        ({"q": {"add_weight": 1.0, "add_bias": "none"}}, TypeError, "got 1.0"),
        ({"q": {"add_weight": 1}}, ValueError, r"configuration\['q'\].* without 'add_bias'"),
        ({"q": {**CONFIGURATION["q"], "more": 1}}, ValueError, "also 'more'"),
        ({"k": CONFIGURATION["q"]}, ValueError, "configuration must .* also 'k'"),
        ({"q": None}, TypeError, r"configuration\['q'\] must be a mapping: got None"),
    ],
)
def test_no_configuration(changes, error, message):
    for call in (SMALL.check, SMALL.key, SMALL.num_parameters):
        with pytest.raises(error, match=message):
            call({**CONFIGURATION, **changes})


def test_a_configuration_without_a_layer():
    with pytest.raises(ValueError, match="exactly the keys 'q', 'v': got one without 'v'"):
        SMALL.check({"q": CONFIGURATION["q"]})
    with pytest.raises(TypeError, match="configuration must be a mapping"):
        SMALL.check([])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layers": {}}, TypeError, "layers must be a mapping .*, not empty"),
        ({"layers": {"q": 3}}, TypeError, r"layers\['q'\] must be \(output width, input width\)"),
        ({"layers": {"q": (3, 0)}}, ValueError, r"layers\['q'\] must be at least 1: got 0"),
        ({"layers": {1: (3, 3)}}, TypeError, "names of type str: got 1"),
        ({"ranks": ()}, TypeError, "ranks must be a sequence of integers, not empty"),
        ({"ranks": 8}, TypeError, "ranks must be a sequence"),
        ({"ranks": (2, 2)}, ValueError, "ranks must be distinct"),
        ({"ranks": (2, 0)}, ValueError, "ranks must be at least 1: got 0"),
        ({"ranks": (2, 1.5)}, TypeError, "ranks must be an integer: got 1.5"),
        ({"operations": {"left": ("none",)}}, ValueError, r"got also \['left'\]"),
        ({"operations": {}}, TypeError, "operations must be a mapping of some"),
        ({"operations": {"add_bias": ()}}, TypeError, r"operations\['add_bias'\] must be a seq"),
        ({"operations": {"add_bias": (4,)}}, ValueError, r"'constant', 'none'\]: got 4"),
        ({"operations": {"add_weight": (16,)}}, ValueError, "at most 8, the largest.* got 16"),
        ({"operations": {"weight_to_bias": ("constant",)}}, ValueError, "got 'constant'"),
        ({"operations": {"add_bias": ("none", "none")}}, ValueError, "must be distinct"),
    ],
)
def test_no_space(fields, error, message):
    with pytest.raises(error, match=message):
        Space(**{"layers": {"q": (3, 2)}, **fields})


def test_unknown_names():
    with pytest.raises(ValueError, match="layer must be one of 'q', 'v': got 'k'"):
        SMALL.options("k", "add_bias")
    with pytest.raises(ValueError, match="operation must be one of 'add_weight', 'add_bias'"):
        SMALL.options("q", "scale_bias")
    with pytest.raises(ValueError, match=r"operations .*\['scale_bias'\]"):
        SMALL.fixed(scale_bias="vector")
    with pytest.raises(ValueError, match="space must have exactly the keys"):
        Space.from_dict({"layers": {"q": (3, 2)}})


@given(st.permutations(list(SMALL.layers.items())))
def test_the_order_of_layers_is_kept(items):
    assert list(Space(dict(items), (2, 1)).layers.items()) == items


def test_the_package_imports_neither_torch_nor_optuna():
    code = """
import sys
sys.modules["torch"] = sys.modules["optuna"] = None
import superlora.search
from superlora.search import Space
print(Space({"q": (3, 2)}).size)
for name in ("search", "Supernet"):
    try:
        getattr(superlora.search, name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    size, *errors = done.stdout.splitlines()
    assert size == "900", done.stderr
    assert "needs the extra 'search'" in errors[0]
    assert "torch" in errors[1]


def test_lazy_names_are_those_listed():
    for name in superlora.search.__all__:
        if name != "Supernet":
            assert getattr(superlora.search, name) is not None
    assert set(superlora.search.__all__) <= set(dir(superlora.search))
    with pytest.raises(AttributeError, match="nothing"):
        getattr(superlora.search, "nothing")  # noqa: B009  (the name is looked up lazily)
