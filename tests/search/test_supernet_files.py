"""Saved supernets: the same tensors again, and files that are refused."""

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import superlora.torch as slt  # noqa: E402
from superlora.errors import AdapterError  # noqa: E402
from superlora.search import Space, Supernet  # noqa: E402
from superlora.search.supernet_files import KEY  # noqa: E402
from tests.search.supernets import RANKS, TARGETS, make_supernet  # noqa: E402
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


def test_every_tensor_is_stored_once(path):
    _, supernet = make_supernet()
    tensors = load_file(path)
    assert sum(each.numel() for each in tensors.values()) == supernet.num_parameters
    assert next(iter(tensors)).startswith("blocks.0.")
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


def _ranks(header, *ranks):
    layers = header["space"]["layers"]
    header["space"] = Space(layers, ranks).to_dict()


def _fewer(header):
    header["space"]["layers"].pop("blocks.0.q")


def _reverse(header):
    header["space"]["layers"] = dict(reversed(header["space"]["layers"].items()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format_version=2), "must be of format version 1: got 2"),
        (lambda h: h.update(format_version=True), "must be of format version 1: got True"),
        (lambda h: h.pop("format_version"), "valid superlora header: 'format_version'"),
        (lambda h: h.pop("space"), "valid superlora header: 'space'"),
        (lambda h: h.update(seed=-1), "valid superlora header: seed must be at least 0"),
        (lambda h: _ranks(h, 4, 2), r"of shape \(8, 3\) instead of \(8, 4\)"),
        (lambda h: _ranks(h, 2), r"of shape \(8, 3\) instead of \(8, 2\)"),
        (lambda h: h["space"].update(ranks=[2]), "rank must be at most 2, .* got 3"),
        (lambda h: h["space"].update(ranks=[0]), "valid superlora header: ranks must be at least"),
        (lambda h: h["space"].update(layers=[]), "valid superlora header: layers must be"),
        (lambda h: h.update(space=3), "valid superlora header: space must be a mapping"),
        (_fewer, "extra 'blocks.0.q.add_bias.left'"),
        (_reverse, "in their order"),
    ],
)
def test_other_headers_are_refused(change, message, path):
    rewrite(path, header=change)
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=message):
        Supernet.load(model, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.q.add_weight.left"), "missing 'blocks.0.q.add_weight.left'"),
        (lambda t: t.update(other=torch.ones(1)), "extra 'other'"),
        (
            lambda t: t.update({"blocks.0.q.add_weight.left": torch.ones(8, 2)}),
            r"'blocks.0.q.add_weight.left' of shape \(8, 2\) instead of \(8, 3\)",
        ),
        (
            lambda t: t.update({"blocks.0.q.add_weight.left": torch.ones(8, 3).double()}),
            "more than one dtype: F32, F64",
        ),
        (
            lambda t: t.update({"blocks.0.q.add_weight.left": torch.ones(8, 3).int()}),
            "'blocks.0.q.add_weight.left' of dtype I32",
        ),
    ],
    ids=["missing", "extra", "shape", "two dtypes", "integers"],
)
def test_other_tensors_are_refused(change, message, path):
    rewrite(path, tensors=change)
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=message):
        Supernet.load(model, path)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_files_are_refused(length, path):
    path.write_bytes(path.read_bytes()[:length])
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="must be a whole safetensors file"):
        Supernet.load(model, path)


def test_files_of_something_else_are_refused(path, tmp_path):
    rewrite(path, metadata={})
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="must be a superlora supernet"):
        Supernet.load(model, path)
    rewrite_text(path)
    with unchanged(model), pytest.raises(ValueError, match="valid superlora header"):
        Supernet.load(model, path)
    with unchanged(model), pytest.raises(FileNotFoundError, match="no adapter file"):
        Supernet.load(model, tmp_path / "none.safetensors")
    with unchanged(model), pytest.raises(ValueError, match="may run any code"):
        Supernet.load(model, tmp_path / "none.pt")


def rewrite_text(path):
    save_file({"a": torch.ones(1)}, path, metadata={KEY: "{"})


def test_adapters_and_supernets_are_not_mistaken(path, tmp_path):
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="must be a superlora adapter"):
        slt.load(model, path)


def _wider():
    model = make_net()
    model.blocks[0].q = nn.Linear(16, 9)
    return model


def _renamed():
    model = make_net()
    model.blocks[0].key = model.blocks[0].q
    del model.blocks[0].q
    return model


def _adapted():
    model = make_net()
    Supernet(model, TARGETS, ranks=RANKS, name="first")
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_net(depth=1), ValueError, "no layer 'blocks.1.q'"),
        (_wider, ValueError, r"'blocks.0.q' has shape \(9, 16\) instead of \(8, 16\)"),
        (_renamed, ValueError, "no layer 'blocks.0.q'"),
        (_adapted, ValueError, "layers of a supernet: 'blocks.0.q' is one"),
        (lambda: make_net("no-bias"), ValueError, "without one none, got 'blocks.0.q'"),
        (lambda: make_net().to("meta"), AdapterError, "meta device"),
        (lambda: None, TypeError, "model must be a torch.nn.Module"),
    ],
    ids=["depth", "width", "name", "supernet", "biases", "meta", "none"],
)
def test_other_models_are_refused(make, error, message, path):
    model = make()
    if model is None:
        with pytest.raises(error, match=message):
            Supernet.load(model, path)
        return
    with unchanged(model), pytest.raises(error, match=message):
        Supernet.load(model, path)
