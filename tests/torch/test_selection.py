"""Which layers are chosen, which are left out, and that it is said."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import make_net, unchanged

LORA = sl.lora(2)


class Router(nn.Linear):
    """Returns two values, as the routers of some mixtures of experts."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Classifier(nn.Module):
    """A body and a head, as wide as there are labels."""

    def __init__(self):
        super().__init__()
        self.num_labels = 3
        self.embedding = nn.Embedding(7, 8)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(3)
        )
        self.router = Router(8, 2)
        self.norm = nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.experts = nn.Parameter(torch.zeros(2, 8, 8))
        self.head = nn.Linear(8, 3)


def names(**options):
    return list(slt.attach(Classifier(), LORA, **options).layers())


EVERY = [f"layers.{i}.{part}" for i in range(3) for part in ("up", "down")]
CHOSEN = {
    "all-linear": ({}, EVERY),
    "all": ({"targets": "all"}, ["convolution", *EVERY, "experts"]),
    "excluded": ({"exclude": ["up"]}, [n for n in EVERY if "down" in n]),
    "excluded below": ({"exclude": ["layers.1"]}, [n for n in EVERY if ".1." not in n]),
    "excluded by a pattern": ({"exclude": r".*\.up"}, [n for n in EVERY if "down" in n]),
    "excluded by a predicate": (
        {"exclude": lambda name, module: getattr(module, "out_features", 0) == 16},
        [n for n in EVERY if "down" in n],
    ),
    "numbers": ({"layers": range(1, 3)}, EVERY[2:]),
    "one number": ({"layers": 0}, EVERY[:2]),
    "numbers of a path": ({"layers": {"layers": [2]}}, EVERY[4:]),
    "the head by name": ({"targets": ["head"]}, ["head"]),
    "a parameter": ({"targets": ["experts"]}, ["experts"]),
    "a parameter by a pattern": ({"targets": "exp.*"}, ["experts"]),
    "a mapping": ({"targets": {"layers.0": LORA, "up": LORA}}, [*EVERY[:2], EVERY[2], EVERY[4]]),
    "a mapping that leaves out": (
        {"targets": {"down": None, "all-linear": sl.lora(3)}},
        [n for n in EVERY if "up" in n],
    ),
}


@pytest.mark.parametrize(("options", "expected"), CHOSEN.values(), ids=CHOSEN)
def test_chosen(options, expected):
    assert names(**{"targets": "all-linear", **options}) == expected


REFUSED = {
    "a router": ({"targets": ["router"]}, ValueError, "'router' returns several values.*Router"),
    "numbers beyond": ({"layers": range(2, 5)}, ValueError, r"\[0, 1, 2\]: got 3, 4"),
    "numbers as a word": ({"layers": "1"}, TypeError, r"range\(8, 24\)"),
    "numbers that are none": ({"layers": [0.5]}, TypeError, "numbers"),
    "two paths": ({"layers": {"a": [1], "b": [1]}}, ValueError, "one list"),
    "exclude nothing": ({"exclude": ["nothing"]}, ValueError, r"exclude\[0\]='nothing'"),
    "exclude by no match": ({"exclude": "nothing"}, ValueError, "exclude must match"),
    "exclude all": ({"exclude": ["layers"]}, ValueError, "all are left out"),
    "tied": ({"tied": "twice"}, ValueError, "'refuse' or 'once'"),
    "no weight": ({"targets": ["norm.eps"]}, ValueError, "matched no layer"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(options, error, message):
    model = Classifier()
    with unchanged(model), pytest.raises(error, match=message):
        slt.attach(model, LORA, **{"targets": "all-linear", **options})


def test_what_is_left_out_is_said():
    adapter = slt.attach(Classifier(), LORA)
    found = adapter.summary()
    assert found["left_out"] == {
        "embedding": "is no linear layer: it is of type Embedding",
        "convolution": "is no linear layer: it is of type Conv1d",
        "router": "returns several values: it is a Router",
        "positions": "is no linear layer, but a parameter",
        "experts": "is no linear layer, but a parameter",
        "head": "is the classifier, as wide as there are labels",
    }
    assert "6 layers left out" in repr(adapter)
    text = str(found)
    assert "layers.0.up    linear  16 x 8  48" in text
    assert "left out: head is the classifier" in text
    assert found["entries"] == 3 * 256
    assert (
        found["parameters"]
        == adapter.num_parameters
        == sum(own["parameters"] for own in found["layers"].values())
    )
    assert found["share"] == found["entries"] / found["model_entries"]


def test_the_summary_is_a_table():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    console.print(slt.attach(Classifier(), LORA).summary())
    text = console.export_text()
    assert "layers.0.up" in text
    assert "left out: is the classifier" in text


def test_little_of_a_model_is_warned_of():
    model = nn.Sequential(nn.Conv2d(8, 64, 5), nn.Flatten(), nn.Linear(64, 4))
    with pytest.warns(UserWarning, match=r"reaches 2.0% .* targets='all'"):
        slt.attach(model, LORA)


def test_a_layer_that_a_design_does_not_fit_is_left_out():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    adapter = slt.attach(model, sl.gralora(4, 2))
    assert list(adapter.layers()) == ["0"]
    assert "cannot have this design" in adapter.summary()["left_out"]["1"]
    with unchanged(model), pytest.raises(ValueError, match=r"must|divi"):
        slt.attach(model, sl.gralora(4, 2), ["0", "1"], name="other")


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (sl.lora(2, overrides={"0": {"rank": 3}}), []),
        (sl.gralora(4, 2, overrides={"0": {"rank": 2}}), ["1"]),
        (sl.gralora(4, 2, overrides={"0": {"scale": 2.0}}), ["1"]),
        (sl.lora(2, overrides={"0": None}), ["0"]),
        ({"add_weight": sl.lora(2, overrides={"add_weight.0": {"rank": 3}})}, []),
        ({"scale_weight": sl.lora(1), "add_bias": sl.dense(overrides={"0": None})}, []),
    ],
)
def test_overrides_hold_for_their_layers_alone_under_default_targets(spec, left):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 9))
    adapter = slt.attach(model, spec)
    assert [name for name in ("0", "1") if name not in adapter.layers()] == left
    adapter.detach()
    named = sl.lora(2, overrides={"0": {"order": 4, "fold": (3, None, 2, None)}})
    with unchanged(model), pytest.raises(ValueError, match="fold must divide the 64 outputs"):
        slt.attach(model, named)


def test_parts_of_another_librarys_adapter_are_left_out():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_net(), peft.LoraConfig(target_modules=["q"]))
    adapter = slt.attach(model, LORA)
    assert not [name for name in adapter.layers() if "lora_" in name]
    assert any("base_layer" in name for name in adapter.layers())
    reasons = adapter.summary()["left_out"].values()
    assert "is a part of another library's adapter" in reasons


def test_a_design_for_each():
    spec = {"layers.0": sl.lora(3), "layers.1": sl.lokr(2), "layers.2": None}
    adapter = slt.attach(Classifier(), None, spec)
    ranks = {n: f.shape for n, f in adapter.named_parameters()}
    assert len(adapter.layers()) == 4
    assert any(shape[-1] == 3 for shape in ranks.values())
    assert "left out by targets['layers.2']" in str(adapter.summary())
