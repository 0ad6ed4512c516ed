"""Saved supernets: the same tensors again, and files that are refused."""

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import superlora.torch as slt  # noqa: E402
from superlora.search import Space, Supernet  # noqa: E402
from superlora.torch.files.state import KEY  # noqa: E402
from tests.search.supernets import TARGETS, make_supernet  # noqa: E402
from tests.torch.conftest import _one_thread  # noqa: E402, F401
from tests.torch.helpers import every_layer, make_input, make_net, unchanged  # noqa: E402


@pytest.fixture
def path(tmp_path):
    _, supernet = make_supernet(seed=11)
    supernet.save(tmp_path / "supernet.safetensors")
    return tmp_path / "supernet.safetensors"


def rewrite(path, *, header=None, tensors=None, metadata=None):
    """Write the file again with something changed."""
    with safe_open(path, framework="pt") as file:
        own = dict(file.metadata())
    content = load_file(path)
    values = json.loads(own[KEY])
    if header is not None:
        header(values)
    if tensors is not None:
        tensors(content)
    save_file(content, path, metadata={KEY: json.dumps(values)} if metadata is None else metadata)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_round_trip(layer, dtype, tmp_path):
    model, supernet = make_supernet(layer, to={"dtype": dtype}, seed=11)
    supernet.save(tmp_path / "a.safetensors")
    other = make_net(layer, dtype=dtype)
    found = Supernet.load(other, tmp_path / "a.safetensors", name="again")
    assert other.again is found
    assert found.space == supernet.space
    assert found.space.fingerprint == supernet.space.fingerprint
    assert (found.seed, found.dtype, found.configuration) == (11, supernet.dtype, None)
    assert all(map(torch.equal, found.parameters(), supernet.parameters()))
    assert all(parameter.requires_grad for parameter in found.parameters())
    for step in range(3):
        assert found.draw(step) == supernet.draw(step)
        x = make_input(dtype=dtype)
        assert torch.equal(other(x), model(x))


@every_layer
def test_a_detached_one_is_saved_too(layer, tmp_path):
    """As those from which an adapter was extracted."""
    for end in ("detach", "extract"):
        _, supernet = make_supernet(layer, seed=11)
        supernet.save(tmp_path / "a.safetensors")
        supernet.detach() if end == "detach" else supernet.extract(supernet.space.most)
        supernet.save(tmp_path / "b.safetensors")
        first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
        assert first == second


def test_every_tensor_is_stored_once(path):
    _, supernet = make_supernet()
    tensors = load_file(path)
    assert sum(each.numel() for each in tensors.values()) == supernet.num_parameters
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == [KEY]
    # What the header takes, beside the numbers.
    assert path.stat().st_size < 4 * supernet.num_parameters + 10_000


def test_a_space_of_few_operations(tmp_path):
    operations = {"add_weight": (2, "constant"), "add_bias": ("vector", "none")}
    model = make_net()
    supernet = Supernet(model, ["q"], ranks=(4, 2), operations=operations)
    supernet.save(tmp_path / "a.safetensors")
    found = Supernet.load(make_net(), tmp_path / "a.safetensors")
    assert found.space == supernet.space
    assert found.num_parameters == supernet.num_parameters == 2 * (2 * (8 + 16) + 8)


def test_saving_replaces_and_leaves_nothing_behind(path):
    before = path.read_bytes()
    _, supernet = make_supernet(seed=11)
    supernet.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="existing folder"):
        supernet.save(path.parent / "no" / "a.safetensors")
    with pytest.raises(IsADirectoryError):
        supernet.save(path.parent)


def _ranks(own, *ranks):
    own["space"] = Space(own["space"]["layers"], ranks).to_dict()


def _fewer(own):
    own["space"]["layers"].pop("blocks.0.q")


def _reverse(header):
    header["weights"].reverse()
    own = header["supernet"]["space"]
    own["layers"] = dict(reversed(own["layers"].items()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("space"), "valid superlora header: .* without 'space'"),
        (lambda own: own.update(seed=-1), "valid superlora header: seed must be at least 0"),
        (lambda own: _ranks(own, 4, 2), "must hold the tensors of its space"),
        (lambda own: _ranks(own, 2), "must hold the tensors of its space"),
        (lambda own: own["space"].update(ranks=[2]), "rank must be at most 2, .* got 3"),
        (lambda own: own["space"].update(ranks=[0]), "valid superlora header: ranks must be"),
        (lambda own: own["space"].update(layers=[]), "valid superlora header: layers must be"),
        (lambda own: own.update(space=3), "valid superlora header: space must be a mapping"),
        (_fewer, "must hold the tensors of its space"),
        (
            lambda own: own["space"].update(operations={"scale_bias": ["none"]}),
            "valid superlora header: operations must have an option",
        ),
    ],
)
def test_other_headers_are_refused(change, message, path):
    rewrite(path, header=lambda header: change(header["supernet"]))
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=message):
        Supernet.load(model, path)


def test_layers_in_another_order_are_refused(path):
    """The order decides what a step draws."""
    Supernet(make_net(), ["q"]).save(path)
    rewrite(path, header=_reverse)
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="in their order"):
        Supernet.load(model, path)


def test_files_of_something_else_are_refused(path, tmp_path):
    rewrite(path, metadata={})
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="must be a superlora adapter"):
        Supernet.load(model, path)
    rewrite_text(path)
    with unchanged(model), pytest.raises(ValueError, match="readable superlora header"):
        Supernet.load(model, path)
    with unchanged(model), pytest.raises(FileNotFoundError, match="no adapter file"):
        Supernet.load(model, tmp_path / "none.safetensors")
    with unchanged(model), pytest.raises(ValueError, match="may run any code"):
        Supernet.load(model, tmp_path / "none.pt")


def rewrite_text(path):
    save_file({"a": torch.ones(1)}, path, metadata={KEY: "{"})


def test_adapters_and_supernets_are_not_mistaken(path, tmp_path):
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=r"search.Supernet.load reads it"):
        slt.load(model, path)
    supernet = Supernet.load(model, path)
    other = make_net()
    adapter = slt.attach(other, supernet.plan.spec, TARGETS)
    adapter.save(tmp_path / "a.safetensors")
    with unchanged(model), pytest.raises(ValueError, match="a supernet of the same space"):
        supernet.swap(tmp_path / "a.safetensors")
    with unchanged(other), pytest.raises(ValueError, match="a supernet of the same space"):
        adapter.swap(path)
    with pytest.raises(ValueError, match=r"torch.load reads it"):
        Supernet.load(make_net(), tmp_path / "a.safetensors")


def test_swapping_takes_the_values_of_every_configuration(path):
    model, supernet = make_supernet(seed=11)
    first = Supernet.load(make_net(), path)
    configuration = supernet.sample(0)
    supernet.use(configuration)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert torch.equal(model(make_input()), make_net()(make_input()))
    supernet.swap(path)
    _, other = make_supernet(seed=12)
    other.swap(path)  # the seed is no part of the design
    assert all(map(torch.equal, other.parameters(), first.parameters()))
    first.use(configuration)
    assert torch.equal(model(make_input()), first.model(make_input()))


def _wider():
    model = make_net()
    model.blocks[0].q = nn.Linear(16, 9)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_net(depth=1), "no layer 'blocks.1.q'"),
        (_wider, r"'blocks.0.q' has shape \(9, 16\) instead of \(8, 16\)"),
        (lambda: make_net("no-bias"), "layers must have a bias where they had one"),
    ],
    ids=["depth", "width", "biases"],
)
def test_other_models_are_refused(make, message, path):
    model = make()
    with unchanged(model), pytest.raises(ValueError, match=message):
        Supernet.load(model, path)


def test_biases_are_those_of_the_space(tmp_path):
    """Also where no operation reads one: the space would be another."""
    supernet = Supernet(make_net(), ["q"], operations={"add_weight": (4, "none")})
    supernet.save(tmp_path / "a.safetensors")
    model = make_net("no-bias")
    with unchanged(model), pytest.raises(ValueError, match=r"layers without a bias .* got 'blocks"):
        Supernet.load(model, tmp_path / "a.safetensors")
