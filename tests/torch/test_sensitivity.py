"""Mean gradients and Fisher scores, against backward passes by hand, on a model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    model.add_module("rest", nn.Identity())
    return model


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def make_batches(count=3):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, generator=draw), torch.randint(3, (4,), generator=draw))
        for _ in range(count)
    ]


TARGETS = ["0", "3", "4"]


def by_hand(model, batches):
    model = model.eval()
    found = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        found.append({name: model.get_submodule(name).weight.grad.clone() for name in TARGETS})
    return found


def test_scores_and_gradients_are_those_of_backward_passes():
    batches = make_batches()
    expected = by_hand(make_model(), batches)
    model = make_model()
    scores = slt.sensitivity(model, iter(batches), loss=loss, targets=TARGETS)
    means = slt.mean_gradients(model, batches, loss=loss, targets=TARGETS)
    for name in TARGETS:
        every = torch.stack([each[name] for each in expected])
        norms = every.double().square().sum((1, 2))
        assert scores[name] == pytest.approx(float(norms.mean()), rel=1e-5)
        torch.testing.assert_close(means[name], every.mean(0))
        assert not means[name].requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails):
    model = make_model().train()
    model[2].eval()
    model[3].requires_grad_(False)
    model[0].weight.grad = torch.ones(8, 5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def noisy(model, batch):
        torch.rand(3)
        return loss(model, batch) * (float("nan") if fails else 1)

    if fails:
        with pytest.raises(ValueError, match="loss must be finite: got nan in batch 0"):
            slt.sensitivity(model, make_batches(), loss=noisy, targets=TARGETS)
    else:
        with torch.no_grad():
            slt.sensitivity(model, make_batches(), loss=noisy, targets=TARGETS)
    assert [module.training for module in model] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [*[True] * 4, *[False] * 2, *[True] * 2]
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    assert grads == ["0.weight"]
    assert (model[0].weight.grad == 1).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_scores_of_an_adapted_model_are_those_of_the_merged_one():
    model = make_model()
    adapter = slt.attach(model, sl.lora(2), targets=TARGETS)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    own = slt.sensitivity(model, make_batches(), loss=loss, targets=TARGETS)
    adapter.merge()
    assert slt.sensitivity(model, make_batches(), loss=loss, targets=TARGETS) == pytest.approx(own)


class Reversed(nn.Module):
    """What has weights of other forms: stored as (input, output), in a stack, and unused."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose1d(3, 2, 5)
        self.experts = nn.Parameter(torch.randn(4, 2, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return torch.einsum("eoi,bit->bet", self.experts[:, :, :], x) + self.conv(x).mean()


def test_gradients_have_the_axes_of_a_plan():
    model, x = Reversed(), torch.randn(2, 3, 7)
    targets = ["conv", "experts", "unused"]

    def own(model, batch):
        return model(batch).square().mean()

    found = slt.mean_gradients(model, [x], loss=own, targets=targets)
    scores = slt.sensitivity(model, [x], loss=own, targets=targets)
    adapter = slt.attach(Reversed(), sl.dense(), targets=targets)
    assert {name: tuple(g.shape) for name, g in found.items()} == adapter.plan.shapes
    assert scores["unused"] == 0
    assert not found["unused"].any()
    own(model, x).backward()
    torch.testing.assert_close(found["conv"], model.conv.weight.grad.transpose(0, 1))
    torch.testing.assert_close(found["experts"], model.experts.grad)


def test_rows_of_a_layer():
    model = make_model()
    rows = {"3": {"upper": (0, 3), "lower": (3, 8)}}
    found = slt.mean_gradients(model, make_batches(), loss=loss, targets=rows)
    whole = slt.mean_gradients(model, make_batches(), loss=loss, targets=["3"])["3"]
    torch.testing.assert_close(torch.cat([found["3.upper"], found["3.lower"]]), whole)


def test_half_precision_is_summed_in_single():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    x = torch.full((1, 4), 100.0, dtype=torch.bfloat16)
    found = slt.mean_gradients(model, [x] * 3, loss=lambda m, x: m(x).sum(), targets=["0"])
    assert found["0"].dtype == torch.float32
    assert (found["0"] == 100).all()


def test_scores_give_ranks_and_gradients_a_start():
    model, batches = make_model(), make_batches()
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in TARGETS}
    scores = slt.sensitivity(model, batches, loss=loss, targets=TARGETS)
    spec = sl.suggest(shapes, budget=80, families=["lora"], sensitivity=scores)[0].spec
    assert slt.attach(model, spec, targets=TARGETS).num_parameters <= 80
    model = make_model()
    gradients = slt.mean_gradients(model, batches, loss=loss, targets=TARGETS)
    steps = {name: -0.1 * gradient for name, gradient in gradients.items()}
    plan = sl.Plan(sl.lora(2), shapes)
    factors, report = plan.fit(steps)
    assert report.error < 0.9
    before = sum(loss(model.eval(), batch).item() for batch in batches)
    with torch.no_grad():
        for name, delta in plan.deltas(factors).items():
            model.get_submodule(name).weight += delta
    assert sum(loss(model.eval(), batch).item() for batch in batches) < before


def test_models_of_transformers_have_a_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x, labels):
            value = (self.first(x) - labels).square().mean()
            return type("Output", (), {"loss": value})()

    batch = {"x": torch.ones(2, 3), "labels": torch.zeros(2, 3)}
    assert slt.sensitivity(Model(), [batch], targets=["first"])["first"] > 0


@pytest.mark.parametrize(
    ("batches", "own", "error", "message"),
    [
        ([], loss, ValueError, "batches must be one at least"),
        ([1], None, TypeError, "loss must be given"),
        ([1], lambda m, b: 3.0, TypeError, "one number: got float in batch 0"),
        ([1], lambda m, b: m(torch.ones(2, 5)), TypeError, r"one number: got shape \(2, 3\)"),
        ([1], lambda m, b: torch.ones(()), ValueError, "no gradient in batch 0"),
        ([1], lambda m, b: m[0].weight.sum() * 1e30 * 1e30, ValueError, "must be finite"),
        ([1], lambda m, b: (m[4].weight * 0).sum().sqrt(), ValueError, "that of '4' is not"),
    ],
)
def test_what_is_refused(batches, own, error, message):
    with pytest.raises(error, match=message):
        slt.sensitivity(make_model(), batches, loss=own, targets=TARGETS)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        slt.sensitivity(3, batches, loss=own)
