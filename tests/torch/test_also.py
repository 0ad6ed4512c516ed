"""Parameters of the model that train with an adapter: they are saved, exchanged and put back."""

import copy

import peft
import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.search import Supernet


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.q(self.embed(x)) + self.v(self.embed(x))))


def trained(model, adapter, steps=4):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    model.train()
    for _ in range(steps):
        loss = model(torch.randint(0, 11, (16,))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bits(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], own) for name, own in expected.items())


X = torch.arange(11)
SPEC = sl.lora(rank=2, alpha=6)


@pytest.mark.parametrize(
    "also", [["head", "norm"], r"head|norm", ["head.weight", "head.bias", "norm"]]
)
def test_heads_and_norms_travel(also, tmp_path):
    model = Model().eval()
    before, plain = bits(model), copy.deepcopy(model)
    y = model(X)
    adapter = slt.attach(model, SPEC, ["q", "v"], also=also)
    assert torch.equal(model(X), y)
    names = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert [n for n, p in model.named_parameters() if p.requires_grad][:4] == names
    assert [n for n, _ in adapter.named_parameters()][-4:] == [f"model.{n}" for n in names]
    trained(model, adapter)
    after = model(X)
    assert all(
        (own - before[name]).abs().max() > 0 for name, own in bits(model).items() if name in names
    )
    with adapter.disabled():
        assert torch.equal(model(X), y)
    assert torch.equal(model(X), after)
    adapter.save(tmp_path / "a.safetensors")
    adapter.merge()
    torch.testing.assert_close(model(X), after)
    with adapter.disabled():
        assert torch.equal(model(X), y)
    adapter.unmerge()
    adapter.detach()
    assert_bits(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = slt.load(plain, tmp_path / "a.safetensors")
    assert torch.equal(plain(X), after)
    # To be trained on, by an optimizer whose state goes by the order.
    assert [n for n, _ in again.named_parameters()] == [
        n for n, _ in adapter.named_parameters()
    ] + [f"model.{n}" for n in names]


def test_only_what_is_named_is_trained():
    model = Model()
    slt.attach(
        model, SPEC, ["q"], also=lambda name, parameter: parameter.dim() == 1 and "norm" in name
    )
    names = {n for n, p in model.named_parameters() if p.requires_grad and "superlora" not in n}
    assert names == {"norm.weight", "norm.bias"}


def test_swap_brings_the_head(tmp_path):
    model = Model().eval()
    adapter = slt.attach(model, SPEC, ["q"], also=["head", "norm"])
    parameters = list(adapter.parameters())
    adapter.save(tmp_path / "zero.safetensors")
    y = model(X)
    trained(model, adapter)
    assert not torch.equal(model(X), y)
    adapter.swap(tmp_path / "zero.safetensors")
    assert torch.equal(model(X), y)
    assert all(a is b for a, b in zip(adapter.parameters(), parameters, strict=True))
    adapter.detach()
    other = slt.attach(model, SPEC, ["q"])
    with pytest.raises(ValueError, match="must hold the parameters that the adapter replaced"):
        other.swap(tmp_path / "zero.safetensors")


def test_a_tied_head_stays_tied(tmp_path):
    model = Model(tied=True).eval()
    before = bits(model)
    with pytest.raises(ValueError, match=r"'head\.weight' is 'embed\.weight' too"):
        slt.attach(model, SPEC, ["q"], also=["head"])
    adapter = slt.attach(model, SPEC, ["q"], also=["head", "embed", "norm"])
    assert model.head.weight is model.embed.weight
    trained(model, adapter)
    after = model(X)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert_bits(model, before)
    assert model.head.weight is model.embed.weight
    slt.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(X), after)
    assert model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match=r"'embed\.weight' is not shared with 'head\.weight'"):
        slt.load(Model(), tmp_path / "a.safetensors")


def test_peft_gets_the_head(tmp_path):
    model = Model().eval()
    base = copy.deepcopy(model)
    adapter = slt.attach(model, SPEC, ["q", "v"], also=["head", "norm"])
    trained(model, adapter)
    adapter.to_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))
    again = slt.from_peft(base, tmp_path)
    torch.testing.assert_close(base(X), model(X))
    assert {"model.head.weight", "model.head.bias"} < {n for n, _ in again.named_parameters()}


def test_what_is_trained_and_not_saved_is_told(tmp_path):
    model = Model()
    adapter = slt.attach(model, SPEC, ["q"], also=["norm"])
    model.head.requires_grad_(True)
    words = r"'head\.weight', 'head\.bias' require gradients and are not saved"
    with pytest.warns(UserWarning, match=words):
        adapter.save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=words):
        adapter.to_peft(tmp_path / "peft")
    with pytest.warns(UserWarning, match=words):
        adapter.save_pretrained(tmp_path / "folder")
    adapter.detach()
    adapter = slt.attach(model, SPEC, ["q"])
    model.train()(X)
    with pytest.warns(UserWarning, match="running statistics of 'norm' have changed"):
        adapter.save(tmp_path / "a.safetensors")


def test_a_second_adapter_leaves_the_first_head_trained():
    model = Model()
    first = slt.attach(model, SPEC, ["q"], also=["head"])
    second = slt.attach(model, SPEC, ["v"], name="second")
    assert all(parameter.requires_grad for parameter in first.parameters())
    second.detach()
    assert all(parameter.requires_grad for parameter in first.parameters())
    with pytest.raises(sl.AdapterError, match="another adapter has replaced"):
        slt.attach(model, SPEC, ["v"], name="second", also=["head.bias"])


def test_state_dicts_have_it():
    model = Model().eval()
    adapter = slt.attach(model, SPEC, ["q"], also=["head"])
    trained(model, adapter)
    after, state = model(X), adapter.state_dict()
    assert set(state) == {"0.0.factor0", "0.0.factor1", "model.head.weight", "model.head.bias"}
    state = {name: own.clone() for name, own in state.items()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    adapter.load_state_dict(state)
    assert torch.equal(model(X), after)
    del state["model.head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.head\.bias"):
        adapter.load_state_dict(state)


@pytest.mark.parametrize("keep", [False, True])
def test_a_supernet_and_what_is_extracted_carry_it(keep, tmp_path):
    model = Model().eval()
    before = bits(model)
    supernet = Supernet(model, ["q", "v"], ranks=(2, 1), also=["head"])
    supernet.draw(0)
    lora = supernet.space.fixed(add_weight=2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(torch.randn_like(parameter))
    supernet.use(lora)
    y = model(X)
    if keep:
        supernet.save(tmp_path / "s.safetensors")
        supernet.detach()
        assert_bits(model, before)
        supernet = Supernet.load(model, tmp_path / "s.safetensors")
        supernet.use(lora)
        assert torch.equal(model(X), y)
    adapter = supernet.extract(lora)
    torch.testing.assert_close(model(X), y)
    assert adapter.replaced.names == ["head.weight", "head.bias"]
    adapter.detach()
    assert_bits(model, before)


@pytest.mark.parametrize(
    ("also", "error", "words"),
    [
        (["nothing"], ValueError, "'nothing' is no parameter and no module"),
        ("hea", ValueError, "'hea' is no parameter"),
        ("(", ValueError, "valid regular expression"),
        (["q"], ValueError, r"no adapted weight: got 'q\.weight'"),
        (lambda name, parameter: False, ValueError, "the predicate chose none"),
        ([], ValueError, "at least one name"),
        (3, TypeError, "must be a list of names"),
        ([3], TypeError, "must be a list of names"),
    ],
)
def test_bad_names_are_refused(also, error, words):
    model = Model()
    before = bits(model)
    with pytest.raises(error, match=words):
        slt.attach(model, SPEC, ["q"], also=also)
    assert_bits(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Model()
    with pytest.raises(sl.AdapterError, match=r"must be loaded.*'head\.weight'"):
        slt.attach(model, SPEC, ["q"], also=["head"])


def test_the_model_moves_with_it():
    model = Model().eval()
    adapter = slt.attach(model, SPEC, ["q"], also=["head", "norm"])
    trained(model, adapter)
    model.double()
    assert all(parameter.dtype == torch.float64 for parameter in adapter.parameters())
    y = model(X)
    with adapter.disabled():
        assert model.head.weight.dtype == torch.float64
        assert not torch.equal(model(X), y)
    assert torch.equal(model(X), y)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), y)
    copied.superlora.detach()
    assert torch.equal(model(X), y)


def test_an_optimizer_keeps_what_it_trains_through_a_move():
    model = Model().eval()
    model.head.requires_grad_(False)
    adapter = slt.attach(model, SPEC, ["q"], also=["head"])
    held = dict(adapter.named_parameters())["model.head.weight"]
    with adapter.disabled():
        model.double()
    assert dict(adapter.named_parameters())["model.head.weight"] is held
    assert held.dtype == torch.float64
    adapter.detach()
    assert not model.head.weight.requires_grad
