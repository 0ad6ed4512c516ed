"""Folders of adapters, their cards, where and how they are loaded; names without wrappers."""

import json

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import superlora as sl
import superlora.torch as slt


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


SPEC = sl.lora(rank=2, alpha=6)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def filled(adapter):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return adapter


def models():
    first, second = Model(), Model()
    second.load_state_dict(first.state_dict())
    return first, second


def test_a_folder_says_what_it_is_and_loads(tmp_path):
    model, other = models()
    model.name_or_path = "some/model"
    adapter = filled(slt.attach(model, SPEC, ["0.0", "1.0"], also=["head"]))
    folder = tmp_path / "new" / "folder"
    adapter.save_pretrained(folder, scores={"accuracy": 0.912345678}, license="apache-2.0")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter.safetensors",
    ]
    card = (folder / "README.md").read_text()
    for words in (
        'base_model: "some/model"',
        'license: "apache-2.0"',
        "| accuracy | 0.912346 |",
        "64 parameters in place of 128, in 2 weights",
        "- `head.weight`, 24 entries",
        adapter.plan.describe(),
    ):
        assert words in card
    design = json.loads((folder / "adapter.json").read_text())
    assert sl.Spec.from_dict(design["spec"]) == SPEC
    slt.load(other, folder)
    assert torch.equal(other(X), model(X))
    adapter.swap(folder)


def test_a_card_of_somebodys_stays(tmp_path):
    adapter = filled(slt.attach(Model(), SPEC, ["0.0", "1.0"]))
    adapter.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    adapter.save_pretrained(tmp_path, scores={"f1": 0.5})
    assert (tmp_path / "README.md").read_text() != first
    (tmp_path / "README.md").write_text("mine")
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_design_that_was_edited_is_refused(tmp_path):
    model, other = models()
    adapter = slt.attach(model, SPEC, ["0.0", "1.0"])
    adapter.save_pretrained(tmp_path)
    path = tmp_path / "adapter.json"
    path.write_text(path.read_text().replace('"rank": 2', '"rank": 3'))
    for call in (lambda: slt.load(other, tmp_path), lambda: adapter.swap(tmp_path)):
        with pytest.raises(ValueError, match=r"adapter\.json must say what the header"):
            call()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"adapter\.json must be JSON"):
        slt.load(other, tmp_path)
    path.unlink()
    slt.load(other, tmp_path)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    adapter = slt.attach(Model(), SPEC, ["0.0", "1.0"])
    with pytest.raises(NotADirectoryError, match="folder must be a directory"):
        adapter.save_pretrained(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        slt.load(Model(), tmp_path)


def test_dtype_and_device(tmp_path, device):
    model, other = models()
    filled(slt.attach(model, SPEC, ["0.0", "1.0"])).save(tmp_path / "a.safetensors")
    adapter = slt.load(other, tmp_path / "a.safetensors", dtype=torch.float64, device=device)
    assert adapter.dtype == torch.float64
    assert next(adapter.parameters()).device.type == torch.device(device).type
    torch.testing.assert_close(other(X), model(X))
    for dtype in (torch.int32, "float32"):
        with pytest.raises(TypeError, match="dtype must be a floating-point"):
            slt.load(Model(), tmp_path / "a.safetensors", dtype=dtype)


@pytest.mark.parametrize("way", ["assigned", "emptied"])
@pytest.mark.parametrize("spec", [SPEC, sl.vera(rank=4)])
def test_low_memory_waits_for_the_weights(way, spec, tmp_path):
    model, _ = models()
    base = {name: own.clone() for name, own in model.state_dict().items()}
    adapter = filled(slt.attach(model, spec, ["0.0", "1.0"]))
    adapter.save(tmp_path / "a.safetensors")
    expected = model(X)
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(sl.AdapterError, match="or low_memory be True"):
        slt.load(empty, tmp_path / "a.safetensors")
    again = slt.load(empty, tmp_path / "a.safetensors", low_memory=True)
    assert all(own.is_meta for own in again.parameters())
    if way == "emptied":
        empty.to_empty(device="cpu")
    empty.load_state_dict(base, strict=False, assign=way == "assigned")
    torch.testing.assert_close(empty(X), expected)


def test_low_memory_needs_what_it_cannot_wait_for(tmp_path):
    model, _ = models()
    slt.attach(model, SPEC, ["0.0", "1.0"], also=["head"]).save(tmp_path / "head.safetensors")
    model.superlora.detach()
    slt.attach(model, sl.lora_xs(rank=2), ["0.0", "1.0"]).save(tmp_path / "xs.safetensors")
    for name, words in (("head", "lies on the meta device"), ("xs", "singular vectors")):
        with torch.device("meta"):
            empty = Model()
        with pytest.raises((ValueError, sl.AdapterError), match=words):
            slt.load(empty, tmp_path / f"{name}.safetensors", low_memory=True)
        assert not hasattr(empty, "superlora")


def wrapped(kind):
    model = Model()
    if kind == "compiled":
        return torch.compile(model, backend="eager"), model
    for index, block in enumerate(model.blocks):
        inner = checkpoint_wrapper(block) if kind == "checkpointed" else torch.compile(block)
        model.blocks[index] = inner
    return model, model


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("kind", ["compiled", "checkpointed", "parts"])
def test_wrappers_are_no_part_of_a_name(kind, tmp_path):
    """A file of a wrapped model fits the plain one, and the other way round."""
    model, inner = wrapped(kind)
    adapter = filled(slt.attach(model, SPEC, ["0.0", "1.0"], also=["head"]))
    assert list(adapter.plan.shapes) == ["blocks.0.0", "blocks.1.0"]
    assert adapter.model is inner
    adapter.save(tmp_path / "wrapped.safetensors")
    adapter.to_peft(tmp_path / "peft")
    plain = Model()
    names = {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): own
        for name, own in inner.state_dict().items()
        if "superlora" not in name
    }
    adapter.detach()
    plain.load_state_dict(names)
    with torch.no_grad():
        base = inner(X) if kind != "parts" else plain(X)
    loaded = slt.load(plain, tmp_path / "wrapped.safetensors")
    y = plain(X)
    loaded.save(tmp_path / "plain.safetensors")
    loaded.detach()
    slt.from_peft(plain, tmp_path / "peft")
    torch.testing.assert_close(plain(X), y)
    again = slt.load(model, tmp_path / "plain.safetensors")
    if kind != "parts":
        torch.testing.assert_close(model(X), y)
        state = {name: own.clone() for name, own in model.state_dict().items()}
        again.alone_in_checkpoints = True
        assert model.load_state_dict(model.state_dict()) == ([], [])
        assert model.load_state_dict(state) == ([], [])
    again.merge()
    again.unmerge()
    again.detach()
    assert base.shape == y.shape


def test_wrappers_that_would_not_train_it_are_refused():
    class Distributed(DistributedDataParallel):
        def __init__(self, module):  # without processes
            nn.Module.__init__(self)
            self.module = module

    Distributed.__name__ = "DistributedDataParallel"
    with pytest.raises(sl.AdapterError, match="attached before DistributedDataParallel"):
        slt.attach(Distributed(Model()), SPEC, ["0.0", "1.0"])
