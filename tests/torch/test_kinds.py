"""Weights of every kind: the adapted layer, the merged one and the saved one compute alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import fill, seeded, unchanged

IDS = torch.tensor([[1, 2, 9], [8, 3, 9]])
SCALES = sl.Supports({"scale_weight": sl.dense(scale=0.7), "add_bias": sl.dense(scale=0.7)})
LORA, LOKR = sl.lora(2, scale=0.7), sl.lokr(2, scale=0.7)
ONE_GROUP = sl.Spec(rank=2, groups=1, fold="balanced", scale=0.7)


class Tied(nn.Module):
    """A head that shares the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embedding(x))))


class Experts(nn.Module):
    """Stacked experts, as bare parameters, transposed if asked to."""

    def __init__(self, is_transposed=False):
        super().__init__()
        shape = (3, 4, 6) if is_transposed else (3, 6, 4)
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(shape))
        self.down = nn.Parameter(torch.randn(shape).mT.contiguous())

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.tanh(x @ up) @ down


class Equalised(nn.Linear):
    """A forward that uses a function of the weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.25, self.bias)


class Ternary(nn.Linear):
    """As a layer of two bits computes in training."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        rounded = self.weight + ((self.weight / scale).round().clamp(-1, 1) * scale - self.weight)
        return nn.functional.linear(x, rounded + 0.1 * self.weight, self.bias)


def sequence(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def image(channels=4, size=7, axes=2):
    return lambda: (torch.randn(2, channels, *[size] * axes),)


def rows(width, count=3, dtype=torch.float64):
    return lambda: (torch.randn(count, width, dtype=dtype),)


def two_inputs():
    return torch.randn(2, 3), torch.randn(2, 4)


def ids():
    return (IDS,)


# How the model is built and called, the design, and the targets.
CASES = {
    "Conv2d": (sequence(lambda: nn.Conv2d(4, 6, 3, 2, 1)), image(), LORA, ["0"]),
    "Conv2d, formed": (sequence(lambda: nn.Conv2d(4, 6, 3)), image(), LOKR, ["0"]),
    "Conv2d, grouped and dilated": (
        sequence(
            lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding_mode="circular", padding=2)
        ),
        image(),
        LORA,
        ["0"],
    ),
    "Conv2d, depthwise": (sequence(lambda: nn.Conv2d(4, 4, 3, groups=4)), image(), LORA, ["0"]),
    "Conv2d of one image": (
        sequence(lambda: nn.Conv2d(4, 6, 3)),
        lambda: (torch.randn(4, 7, 7),),
        LORA,
        ["0"],
    ),
    "Conv1d": (sequence(lambda: nn.Conv1d(4, 6, 3)), image(axes=1), LORA, ["0"]),
    "Conv3d": (sequence(lambda: nn.Conv3d(4, 6, (1, 2, 3))), image(axes=3, size=4), LORA, ["0"]),
    "ConvTranspose1d": (sequence(lambda: nn.ConvTranspose1d(4, 6, 3)), image(axes=1), LORA, ["0"]),
    "ConvTranspose2d": (
        sequence(lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2)),
        image(),
        LORA,
        ["0"],
    ),
    "ConvTranspose3d": (
        sequence(lambda: nn.ConvTranspose3d(4, 6, 2)),
        image(axes=3, size=3),
        LORA,
        ["0"],
    ),
    "convolutions of one group": (
        sequence(lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(6, 4, 3)),
        image(),
        ONE_GROUP,
        "all",
    ),
    "scaled convolution": (sequence(lambda: nn.Conv2d(4, 6, 3)), image(), SCALES, ["0"]),
    "BatchNorm": (
        sequence(lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6)),
        image(),
        SCALES,
        ["1"],
    ),
    "LayerNorm": (sequence(lambda: nn.LayerNorm(6)), rows(6), SCALES, ["0"]),
    "RMSNorm": (
        sequence(lambda: nn.RMSNorm(6)),
        rows(6),
        sl.Supports({"scale_weight": sl.dense(scale=0.7)}),
        ["0"],
    ),
    "Embedding": (sequence(lambda: nn.Embedding(10, 6)), ids, LORA, ["0"]),
    "Embedding, padded": (sequence(lambda: nn.Embedding(10, 6, padding_idx=1)), ids, LORA, ["0"]),
    "Embedding, formed": (sequence(lambda: nn.Embedding(10, 6)), ids, LOKR, ["0"]),
    "EmbeddingBag": (sequence(lambda: nn.EmbeddingBag(10, 6, mode="sum")), ids, LORA, ["0"]),
    "rows of new tokens": (
        sequence(lambda: nn.Embedding(10, 6)),
        ids,
        sl.dense(scale=0.7),
        {"0": {"new": (8, 10)}},
    ),
    "rows of a fused projection": (
        sequence(lambda: nn.Linear(6, 18)),
        rows(6),
        LORA,
        {"0": {"q": (0, 6), "v": (12, 18)}},
    ),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 5), two_inputs, LORA, lambda name, module: True),
    "LSTM": (sequence(lambda: nn.LSTM(6, 4, 2)), rows(6), LORA, ["weight_hh_l0", "weight_ih_l1"]),
    "stack": (Experts, rows(4), LORA, ["up", "down"]),
    "stack, transposed": (lambda: Experts(True), rows(4), LORA, ["up", "down"]),
    "stack as a mode": (
        Experts,
        rows(4),
        sl.Spec(rank=2, order=3, fold="stack", groups="weight", scale=0.7),
        ["up"],
    ),
    "stack, formed": (Experts, rows(4), LOKR, "all"),
    "stacks of one group": (lambda: Experts(True), rows(4), ONE_GROUP, "all"),
    "equalised": (sequence(lambda: Equalised(6, 5)), rows(6), LORA, ["0"]),
    "ternary": (sequence(lambda: Ternary(6, 5)), rows(6), sl.dense(), ["0"]),
    "complex": (
        sequence(lambda: nn.Linear(4, 6, dtype=torch.complex128)),
        rows(4, dtype=torch.complex128),
        LORA,
        "all-linear",
    ),
    "a design each": (
        sequence(lambda: nn.Linear(4, 6), lambda: nn.Linear(6, 6), lambda: nn.Linear(6, 3)),
        rows(4),
        None,
        {"0": sl.lora(3), "1": None, "2": sl.dense(scale=0.5)},
    ),
}
TIES = ("refuse", "once")
TIED = {
    "by the embedding": (Tied, ids, LORA, ["embedding", "middle"]),
    "by the head": (Tied, ids, LORA, ["head"]),
    "by both": (Tied, ids, LOKR, ["embedding", "head"]),
}


def build(make, call):
    with seeded(0):
        model = make().eval()
        model = model if any(p.is_complex() for p in model.parameters()) else model.double()
        x = tuple(
            each.to(next(model.parameters()).dtype) if each.is_floating_point() else each
            for each in call()
        )

    def output():
        found = model(*x)
        found = found[0] if isinstance(found, tuple) else found
        return torch.view_as_real(found) if found.is_complex() else found

    return model, output


ALIKE = [
    *[pytest.param(case, tied, id=f"{n}-{tied}") for n, case in CASES.items() for tied in TIES],
    *[pytest.param(case, "once", id=name) for name, case in TIED.items()],
]


@pytest.mark.parametrize(("case", "tied"), ALIKE)
def test_forward_merged_and_saved_are_alike(case, tied, tmp_path):
    make, call, spec, targets = case
    model, output = build(make, call)
    base, state = output(), copy.deepcopy(model.state_dict())
    adapter = slt.attach(model, spec, targets, tied=tied)
    torch.testing.assert_close(output(), base, rtol=0, atol=1e-12)
    fill(adapter)
    y = output()
    assert not torch.allclose(y, base)
    adapter.applied = "formed"
    torch.testing.assert_close(output(), y)
    adapter.applied = "auto"
    y.square().sum().backward()
    for name, factor in adapter.named_parameters():
        assert factor.grad is not None, name
        assert factor.grad.abs().sum() > 0, name
    adapter.merge()
    torch.testing.assert_close(output(), y)
    adapter.unmerge()
    assert torch.equal(output(), y)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    assert torch.equal(output(), base)
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    slt.load(model, tmp_path / "a.safetensors")
    assert torch.equal(output(), y)


# Torch gives the row of padding no gradient.
SMOOTH = {name: case for name, case in CASES.items() if name != "Embedding, padded"}


@pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH)
def test_gradients_are_those_of_the_sum(case):
    """Also where it is formed again in the backward pass, and where autograd sees each step."""
    make, call, spec, targets = case
    model, output = build(make, call)
    adapter = slt.attach(model, spec, targets)
    fill(adapter)
    factors = dict(adapter.named_parameters())
    found = torch.autograd.grad(output().square().sum(), list(factors.values()))
    small = 1e-6
    for factor, gradient in zip(factors.values(), found, strict=True):
        way = torch.randn_like(factor)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                factor.add_(sign * small * way)
                losses.append(output().square().sum())
                factor.sub_(sign * small * way)
        expected = (losses[0] - losses[1]) / (2 * small)
        torch.testing.assert_close((gradient * way).sum(), expected, rtol=1e-5, atol=1e-7)


def test_a_sum_is_not_kept_for_the_backward_pass():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    adapter = slt.attach(model, LOKR, ["0"])
    fill(adapter)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 4, 7, 7))
    # Ours are the innermost hooks: what they keep in its place is no tensor.
    assert not [each for each in kept if each.shape == model[0].weight.shape and each.requires_grad]


def test_a_factor_changed_before_the_backward_pass_is_an_error():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    adapter = slt.attach(model, LOKR, ["0"])
    fill(adapter)
    y = model(torch.randn(2, 4, 7, 7, requires_grad=True)).sum()
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="must not be changed between"):
        y.backward()


def test_rows_of_a_batch_go_through_convolutions_and_embeddings():
    from superlora.torch.row_wise import rows as row_wise

    for model, x in (
        (nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 7, 7)),
        (nn.Sequential(nn.Embedding(10, 6)), torch.tensor([[1, 2], [3, 4], [5, 6]])),
    ):
        for name in ("one", "other"):
            fill(slt.attach(model, LORA, ["0"], name=name), seed=len(name))
        with row_wise(model, ["one", None, "other"]):
            y = model(x)
        for row, name in enumerate(("one", None, "other")):
            with row_wise(model, [name]):
                torch.testing.assert_close(y[row], model(x[row : row + 1])[0])


def test_rows_of_a_batch_are_refused_where_sums_are_formed():
    from superlora.torch.row_wise import rows as row_wise

    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    fill(slt.attach(model, LOKR, ["0"], name="one"))
    with row_wise(model, ["one"]), pytest.raises(sl.AdapterError, match=r"rows\(\).*Conv2d"):
        model(torch.randn(1, 4, 7, 7))


REFUSED = {
    "overlapping rows": ({"0": {"a": (0, 4), "b": (3, 6)}}, ValueError, "must not overlap.*'a'"),
    "rows beyond": ({"0": {"a": (0, 7)}}, ValueError, "0 <= start < stop <= 6.*7"),
    "no rows": ({"0": {}}, ValueError, "at least one range"),
    "rows of an activation": ({"1": {"a": (0, 1)}}, ValueError, "matched no layer"),
    "rows as a number": ({"0": {"a": 3}}, TypeError, "first row"),
    "rows with a dot": ({"0": {"a.b": (0, 1)}}, ValueError, "without dots"),
    "an empty mapping": ({}, ValueError, "at least one name"),
    "all left out": ({"0": None}, ValueError, "all are left out.*targets\\['0'\\]"),
    "no spec": ({"0": 3}, TypeError, "superlora.Spec, to None or to rows"),
}


@pytest.mark.parametrize(("targets", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_mappings_refused(targets, error, message):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with unchanged(model), pytest.raises(error, match=message):
        slt.attach(model, LORA, targets)


def test_what_kinds_cannot_have_is_refused():
    for model, spec, targets, message in (
        (nn.Sequential(nn.Embedding(4, 6, max_norm=1.0)), LORA, ["0"], "max_norm"),
        (nn.Sequential(nn.Conv2d(4, 6, 3)), sl.glora(2), ["0"], "two axes"),
        (Experts(), sl.Supports({"add_bias": sl.dense()}), ["up"], "no stack"),
        (nn.Sequential(nn.RMSNorm(4)), SCALES, ["0"], "can be given"),
        (nn.Sequential(nn.ReLU()), LORA, ["0"], "Linear, Conv1D"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            slt.attach(model, spec, targets)
    with pytest.raises(ValueError, match=r"apply='factored'.*Conv2d"):
        slt.attach(nn.Sequential(nn.Conv2d(4, 6, 3)), LOKR, ["0"], apply="factored")
