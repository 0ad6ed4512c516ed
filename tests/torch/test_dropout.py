"""Dropout of an adapter's updates, beside PEFT's; rates by kind of block; norms of updates."""

import math

import peft
import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.search import Supernet


class Model(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.q, self.v = nn.Linear(8, width), nn.Linear(width, 8, bias=False)

    def forward(self, x):
        return self.v(torch.tanh(self.q(x)))


def filled(adapter):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize("width", [12, 40])
def test_inputs_are_dropped_as_by_peft(width, tmp_path):
    torch.manual_seed(0)
    base = Model(width)
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.4, target_modules=["q", "v"])
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = Model(width)
    ours.load_state_dict(
        {n.replace("base_layer.", ""): p for n, p in base.state_dict().items() if "lora_" not in n}
    )
    adapter = slt.from_peft(ours, tmp_path)
    assert adapter.dropout.values == {"dropout": 0.4}
    x = torch.randn(50, 8)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        torch.manual_seed(3)
        expected = theirs(x)
        torch.manual_seed(3)
        bound = 1e-5 * float(expected.detach().abs().max())
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=bound)


SPECS = {
    "lora": sl.lora(2, alpha=3),
    "lokr": sl.lokr(2, scale=0.5),
    "formed": sl.Spec(rank=2, groups=1, fold="balanced", scale=0.5),
    "fourierft": sl.fourierft(7, scale=20.0),
}


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("apply", ["auto", "formed"])
def test_rows_and_layers_are_dropped(case, apply):
    model = Model()
    x = torch.randn(6, 8)
    base = model.q(x)
    adapter = filled(slt.attach(model, SPECS[case], ["q"], rank_dropout=0.5, apply=apply))
    whole = model.q.eval()(x)  # the adapter decides
    adapter.eval()
    torch.testing.assert_close(model.q(x), base + x @ adapter.delta("q").T)
    whole = model.q(x) - base
    adapter.train()
    torch.manual_seed(0)
    kept = torch.rand(12) > 0.5
    torch.manual_seed(0)
    torch.testing.assert_close(model.q(x) - base, whole * kept, atol=1e-5, rtol=1e-4)
    adapter.dropout["rank_dropout"] = 0.0
    adapter.dropout["module_dropout"] = 0.5
    found = {bool((model.q(x) - base).abs().max() > 1e-6) for _ in range(50)}
    assert found == {True, False}
    adapter.dropout["module_dropout"] = 0.0
    torch.testing.assert_close(model.q(x) - base, whole)


def test_lokr_of_peft_drops_rows(tmp_path):
    torch.manual_seed(0)
    base = Model()
    config = peft.LoKrConfig(r=2, alpha=3, rank_dropout=0.5, target_modules=["q"])
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lokr_" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = Model()
    adapter = slt.from_peft(ours, tmp_path)
    assert adapter.dropout.values == {"rank_dropout": 0.5}
    layer = theirs.base_model.model.q
    torch.manual_seed(1)
    delta = layer.get_delta_weight("default", apply_rank_dropout=True).detach()
    x = torch.eye(8)
    plain = nn.functional.linear(x, ours.q.weight, ours.q.bias)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.q(x) - plain, delta.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["convolution", "two adapters", "Conv1D"])
def test_other_layers(kind):
    if kind == "convolution":
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        x, axis = torch.randn(2, 3, 5, 5), 1
    elif kind == "Conv1D":
        transformers = pytest.importorskip("transformers")
        model = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 8), nn.ReLU())
        x, axis = torch.randn(2, 5, 8), -1
    else:
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        x, axis = torch.randn(2, 5, 8), -1
    if kind == "two adapters":
        filled(slt.attach(model, sl.lora(2), ["0"], name="first"))
    base = model[0](x)
    adapter = filled(slt.attach(model, sl.lora(2, alpha=3), ["0"], rank_dropout=0.5))
    adapter.eval()
    whole = model[0](x) - base
    adapter.train()
    found = model[0](x) - base
    rows = found.movedim(axis, 0).flatten(1)
    expected = whole.movedim(axis, 0).flatten(1)
    zero = rows.abs().amax(1) < 1e-6
    assert 0 < zero.sum() < 6
    torch.testing.assert_close(rows[~zero], expected[~zero], atol=1e-5, rtol=1e-4)
    adapter.dropout["rank_dropout"], adapter.dropout["dropout"] = 0.0, 0.5
    y = model[0](x)
    y.square().sum().backward()
    assert not torch.allclose(y, model[0](x))
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_dropout_is_saved_and_compiles(tmp_path):
    model = Model()
    options = {"dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.3}
    adapter = filled(slt.attach(model, sl.lora(2), **options))
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    adapter = slt.load(model, tmp_path / "a.safetensors")
    assert adapter.dropout.values == options
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(4, 8)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)


def test_checkpointed_passes_drop_the_same():
    model = Model()
    adapter = filled(slt.attach(model, sl.lora(2), dropout=0.3))
    x = torch.randn(4, 8, requires_grad=True)
    found = []
    for reentrant in (None, False, True):
        adapter.zero_grad()
        torch.manual_seed(0)
        if reentrant is None:
            y = model(x)
        else:
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([parameter.grad.clone() for parameter in adapter.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(
    ("make", "spec", "options", "words"),
    [
        (Model, sl.lora(2), {"dropout": 1.0}, r"dropout must be in \[0, 1\): got 1.0"),
        (Model, sl.lora(2), {"rank_dropout": math.nan}, "rank_dropout must be in"),
        (Model, sl.glora(2), {"dropout": 0.1}, "added to their output"),
        (lambda: nn.Sequential(nn.Embedding(5, 4)), sl.lora(2), {"dropout": 0.1}, "are indices"),
        (lambda: nn.Sequential(nn.LayerNorm(4)), sl.dense(), {"dropout": 0.1}, "is a part of its"),
    ],
)
def test_dropout_without_effect_is_refused(make, spec, options, words):
    model = make()
    targets = ["0"] if isinstance(model, nn.Sequential) else ["q"]
    with pytest.raises(ValueError, match=words):
        slt.attach(model, spec, targets, **options)
    with pytest.raises(TypeError, match="dropout must be a number"):
        slt.attach(model, spec, targets, dropout="0.1")


def test_norms_of_a_supernet_are_those_of_the_configuration():
    supernet = Supernet(Model(), ["q"], ranks=(4, 2))
    filled(supernet)
    for rank in (4, 2):
        supernet.use(supernet.space.fixed(add_weight=rank))
        (norm,) = supernet.norms().values()
        (delta,) = supernet.deltas().values()
        assert norm.frobenius == pytest.approx(float(delta.detach().norm()), rel=1e-5)
        assert norm.effective_rank <= rank


def test_dropout_that_is_set_later_is_checked_too():
    model = Model()
    adapter = slt.attach(model, sl.glora(2), ["q"])
    with pytest.raises(ValueError, match="added to their output"):
        adapter.dropout["dropout"] = 0.1
    assert not adapter.dropout.on
    adapter.detach()
    adapter = slt.attach(model, sl.lora(2), ["q"])
    adapter.dropout["dropout"] = 0.1
    assert adapter.dropout.on


def test_rates_by_kind():
    model = nn.ModuleDict({"a": Model(), "head": nn.Linear(8, 3)})
    adapter = slt.attach(model, sl.lorta(2), ["q", "v"], also=["head"])
    groups = adapter.param_groups(1e-3, ratio=8, rates={"model": 5e-4}, weight_decay=0.1)
    found = {
        name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]
    }
    assert found == {
        "0.0.core": (8e-3, 0.1),
        "0.0.factor0": (1e-3, 0.1),
        "0.0.factor1": (1e-3, 0.1),
        "0.0.factor2": (1e-3, 0.1),
        "model.head.weight": (5e-4, 0.1),
        "model.head.bias": (5e-4, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == len(list(adapter.parameters()))
    torch.optim.AdamW(groups).step()
    plain = adapter.param_groups(1e-3)
    assert [group["lr"] for group in plain] == [1e-3, 1e-3]
    for options, words in (
        ({"lr": -1}, "lr must be finite and at least 0: got -1"),
        ({"lr": 1, "rates": {"factor9": 1}}, r"kinds of blocks, \['core', 'factor0'"),
        ({"lr": 1, "weight_decay": math.inf}, "weight_decay must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            adapter.param_groups(**options)
    with pytest.raises(TypeError, match="ratio must be a number"):
        adapter.param_groups(1e-3, ratio="8")


@pytest.mark.parametrize("case", [*SPECS, "glora", "stack"])
def test_norms_are_those_of_the_update(case):
    torch.manual_seed(0)
    if case == "stack":
        model = Model().double()
        model.experts = nn.Parameter(torch.randn(3, 6, 8, dtype=torch.float64))
        model.register_forward_hook(lambda m, x, y: y + m.experts.sum())
        adapter = filled(slt.attach(model, sl.lora(2, alpha=3), ["experts"]))
    else:
        model = Model().double()
        adapter = filled(slt.attach(model, {**SPECS, "glora": sl.glora(2)}[case], ["q", "v"]))
    found = adapter.norms()
    assert list(found) == list(adapter.deltas())
    for name, delta in adapter.deltas().items():
        delta = delta.detach().reshape(3, 6, 8) if case == "stack" else delta.detach()
        numbers = torch.linalg.svdvals(delta).flatten()
        parts = numbers[numbers > 1e-12] / numbers.sum()
        assert found[name].spectral == pytest.approx(float(numbers.max()))
        assert found[name].frobenius == pytest.approx(float(delta.norm()))
        rank = math.exp(-float((parts * parts.log()).sum()))
        assert found[name].effective_rank == pytest.approx(rank, rel=1e-6)
    adapter.reset()
    assert all(norm.spectral == norm.effective_rank == 0 for norm in adapter.norms().values())
