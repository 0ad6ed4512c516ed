"""Adapters of one model combined: the sum of their updates, in one adapter."""

import itertools

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt

SPECS = {
    "lora": (sl.lora(rank=2, alpha=6), sl.lora(rank=3, rslora=True, alpha=1), "rank"),
    "lora of many ranks": (sl.lora(rank=9), sl.lora(rank=9), "terms"),
    "lokr": (sl.lokr(rank=2, alpha=3), sl.lokr(rank=2, scale=0.3), "terms"),
    "lokr of other ranks": (
        sl.lokr(rank=1, decompose_both=True, dense_from="never"),
        sl.lokr(rank=2, decompose_both=True, dense_from="never"),
        "terms",
    ),
    "loha": (sl.loha(rank=2), sl.loha(rank=3, scale=2.0), "terms"),
    "lorta": (sl.lorta(rank=2, scale=0.5), sl.lorta(rank=3), "rank"),
    "lorta, cores alone": (
        sl.Spec(rank=(2, "full", 3), order=3, groups=1, fold="balanced"),
        sl.Spec(rank=(3, "full", 1), order=3, groups=1, fold="balanced"),
        "rank",
    ),
    "cp": (
        sl.Spec(rank=4, order=3, core="identity", groups=1, fold="balanced"),
        sl.Spec(rank=2, order=3, core="identity", groups=1, fold="balanced", scale=0.1),
        "rank",
    ),
    "train": (
        sl.Spec(rank=2, order=3, core="train", groups=1, fold="balanced"),
        sl.Spec(rank=3, order=3, core="train", groups=1, fold="balanced"),
        "rank",
    ),
    "tied": (
        sl.Spec(rank=2, tied=("0.factor1",), groups="weight"),
        sl.Spec(rank=3, tied=("0.factor1",), groups="weight", scale=2.0),
        "rank",
    ),
    "dense": (sl.dense(), sl.dense(scale=0.5), "same"),
    "fourierft": (sl.fourierft(size=10), sl.fourierft(size=10), "same"),
    "lora_xs": (sl.lora_xs(rank=3), sl.lora_xs(rank=3, scale=0.5), "same"),
    "vera": (sl.vera(rank=4), sl.vera(rank=4), "terms"),
    "several terms": (sl.lokr(rank=2, terms=2), sl.lokr(rank=2, terms=3), "terms"),
    "overrides": (
        sl.lora(rank=2, overrides={"b": {"rank": 4, "alpha": 2}}),
        sl.lora(rank=3, overrides={"b": {"rank": 1}}),
        "rank",
    ),
    "mapped": (
        sl.Spec(rank=2, groups=1, fold="balanced", map=sl.maps.Fastfood(), ratio=0.5),
        sl.Spec(rank=3, groups=1, fold="balanced", map=sl.maps.Fastfood(), ratio=0.5),
        "rank",
    ),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(x))))


def adapted(model, *specs, **options):
    found = []
    for index, spec in enumerate(specs):
        adapter = slt.attach(model, spec, ["a", "b"], name=f"n{index}", seed=index, **options)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) / 2)
        found.append(adapter)
    return found


@pytest.mark.parametrize("case", SPECS)
def test_the_sum_is_exact(case, tmp_path):
    torch.manual_seed(0)
    *specs, form = SPECS[case]
    model = Model().double()
    x = torch.randn(5, 16, dtype=torch.float64)
    before = model(x)
    adapters = adapted(model, *specs)
    deltas = [adapter.deltas() for adapter in adapters]
    both = model(x)
    combined = slt.combine(adapters, weights=[0.7, -0.3])
    expected = {name: 0.7 * deltas[0][name] - 0.3 * deltas[1][name] for name in deltas[0]}
    for name, delta in combined.deltas().items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-9, atol=1e-11)
    assert not any(adapter.attached for adapter in adapters)
    terms = combined.plan.layout.specs[0].terms
    assert (terms > 1) == (form == "terms")
    combined.save(tmp_path / "c.safetensors")
    y = model(x)
    assert not torch.allclose(y, both)
    combined.detach()
    assert torch.equal(model(x), before)
    again = slt.load(model, tmp_path / "c.safetensors")
    torch.testing.assert_close(model(x), y)
    again.merge()
    torch.testing.assert_close(model(x), y)


def test_one_adapter_is_itself():
    model = Model()
    (adapter,) = adapted(model, sl.lora(rank=2, alpha=3))
    x = torch.randn(4, 16)
    y = model(x)
    delta = adapter.delta("a")
    combined = slt.combine([adapter])
    assert torch.equal(model(x), y)
    assert torch.equal(combined.delta("a"), delta)
    half = slt.combine([combined], weights=[0.5])
    torch.testing.assert_close(half.delta("a"), delta / 2)


def test_three_and_a_head(tmp_path):
    model = Model()
    spec = sl.lora(rank=1)
    first, second = adapted(model, spec, spec)
    third = slt.attach(model, spec, ["a", "b"], name="third", also=["head"])
    with torch.no_grad():
        model.head.bias.add_(1)
    x = torch.randn(4, 16)
    y = model(x)
    combined = slt.combine([first, second, third])
    torch.testing.assert_close(model(x), y)
    assert combined.replaced.names == ["head.weight", "head.bias"]
    assert combined.plan.factor_shapes["0.0.factor0"][1] == 3
    combined.to_peft(tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: [], TypeError, "at least one"),
        (lambda m: [m], TypeError, "must be superlora.torch.Adapter: got Model"),
        (lambda m: adapted(m, sl.lora(rank=2)) * 2, ValueError, "got one twice"),
        (
            lambda m: adapted(m, sl.lora(rank=2)) + adapted(Model(), sl.lora(rank=2)),
            sl.AdapterError,
            "on one model",
        ),
        (lambda m: adapted(m, sl.lora(rank=2), sl.loha(rank=2)), ValueError, "splits differs"),
        (lambda m: adapted(m, sl.glora(rank=2)), None, ""),
        (lambda m: adapted(m, sl.glora(rank=2), sl.glora(rank=2)), ValueError, "no other op"),
        (
            lambda m: adapted(m, sl.unilora(size=20), sl.unilora(size=20)),
            ValueError,
            "maps of a vector",
        ),
        (
            lambda m: [*adapted(m, sl.lora(rank=2)), slt.attach(m, sl.lora(rank=2), ["a"])],
            ValueError,
            "of the same weights",
        ),
        (
            lambda m: adapted(
                m,
                sl.Spec(rank=2, groups=1, fold="balanced", map=sl.maps.Fastfood(), ratio=0.5),
                sl.Spec(rank=2, groups=1, fold="balanced", map=sl.maps.Fastfood(seed=1), ratio=0.5),
            ),
            ValueError,
            "their map differs",
        ),
    ],
)
def test_what_has_no_sum_is_refused(make, error, words):
    model = Model()
    adapters = make(model)
    x = torch.randn(2, 16)
    before = model(x)
    if error is None:
        slt.combine(adapters)
        return
    with pytest.raises(error, match=words):
        slt.combine(adapters)
    assert torch.equal(model(x), before)


def test_weights_are_checked():
    adapters = adapted(Model(), sl.lora(rank=2), sl.lora(rank=2))
    for weights, error in (
        ([1.0], ValueError),
        ([1, "a"], TypeError),
        ([1, float("inf")], ValueError),
    ):
        with pytest.raises(error, match="weights must"):
            slt.combine(adapters, weights)


def test_two_heads_or_a_merged_adapter_are_refused():
    model = Model()
    first = slt.attach(model, sl.lora(rank=1), ["a"], also=["head.weight"])
    second = slt.attach(model, sl.lora(rank=1), ["a"], also=["head.bias"], name="second")
    with pytest.raises(sl.AdapterError, match="one adapter at most"):
        slt.combine([first, second])
    second.detach()
    first.merge()
    with pytest.raises(sl.AdapterError, match="must be unmerged"):
        slt.combine([first])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_in_any_order_the_bits_are_the_same(dtype):
    found = []
    for order in itertools.permutations(range(3)):
        torch.manual_seed(0)
        model = Model().to(dtype)
        weight = model.a.weight.clone()
        adapters = adapted(model, *[sl.lora(rank=2)] * 3)
        for index in order:
            adapters[index].merge()
        found.append(model.a.weight.clone())
        for index in order:
            adapters[index].unmerge()
        assert torch.equal(model.a.weight, weight)
    assert all(torch.equal(own, found[0]) for own in found)


def test_what_is_tied_otherwise_is_refused():
    spec = sl.Spec(rank=2, tied=("0.factor0",), fold=(24, 24))
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    both = [
        slt.attach(model, own, ["0", "1"], name=f"n{index}")
        for index, own in enumerate(
            (spec.replace(scale=2.0, overrides={"1": {"scale": 5.0}}), spec)
        )
    ]
    for adapter in both:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    deltas = [adapter.deltas() for adapter in both]
    try:
        combined = slt.combine(both)
    except ValueError:
        return
    for name, delta in combined.deltas().items():
        torch.testing.assert_close(delta, deltas[0][name] + deltas[1][name])
