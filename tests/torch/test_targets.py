"""Which layers are adapted, and what is refused before anything is changed."""

import re

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    Net,
    assert_near,
    fill,
    make_layer,
    make_net,
    make_outer,
    unchanged,
)

FOUND = {
    "a suffix": (["q"], ["blocks.0.q", "blocks.1.q"]),
    "in the model's order": (["o", "q"], ["blocks.0.q", "blocks.0.o", "blocks.1.q", "blocks.1.o"]),
    "a dotted suffix": (["1.q", "head"], ["blocks.1.q", "head"]),
    "a whole name": (("blocks.0.v",), ["blocks.0.v"]),
    "one name twice": (["head", "head"], ["head"]),
    "overlapping": (["q", "blocks.0.q"], ["blocks.0.q", "blocks.1.q"]),
    "a pattern": (r"blocks\.1\.[qv]", ["blocks.1.q", "blocks.1.v"]),
    "a name as pattern": ("head", ["head"]),
    "a predicate": (lambda name, module: getattr(module, "out_features", 0) == 3, ["head"]),
    "all": ("all-linear", [f"blocks.{i}.{part}" for i in range(2) for part in "qvo"] + ["head"]),
}


@pytest.mark.parametrize(("targets", "expected"), FOUND.values(), ids=FOUND)
def test_targets_find(targets, expected):
    model = make_net()
    adapter = slt.attach(model, sl.lora(1), targets)
    assert list(adapter.plan.shapes) == expected
    adapted = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert adapted == expected
    for name, (rows, columns) in adapter.plan.shapes.items():
        layer = model.get_submodule(name)
        assert (layer.out_features, layer.in_features) == (rows, columns)


def test_suffix_matches_whole_parts_of_names_only():
    model = nn.ModuleDict({"eq": nn.Linear(2, 2), "q": nn.Linear(2, 2)})
    assert list(slt.attach(model, sl.lora(1), ["q"]).plan.shapes) == ["q"]


def test_shape_of_conv1d_is_output_by_input():
    model = nn.ModuleDict({"c": make_layer("conv1d", 5, 7)})
    assert slt.attach(model, sl.lora(1)).plan.shapes == {"c": (7, 5)}


def test_all_linear_leaves_the_output_head_out():
    model = make_net()
    model.get_output_embeddings = lambda: model.head
    assert "head" not in slt.attach(model, sl.lora(1)).plan.shapes


def test_layer_of_two_names_is_adapted_once():
    model = make_net()
    model.blocks[1].q = model.blocks[0].q
    adapter = slt.attach(model, sl.lora(1), ["q"])
    assert list(adapter.plan.shapes) == ["blocks.0.q"]


NOT_FOUND = {
    "an unknown name": (["quer"], ValueError, r"targets\[0\]='quer' matched no layer.*nearest"),
    "near a name": (["blocks.0.w"], ValueError, "nearest names are 'blocks.0"),
    "one of a list": (["q", "headd"], ValueError, r"targets\[1\]='headd'.*'head'"),
    "an empty list": ([], ValueError, "at least one name.*empty"),
    "an empty tuple": ((), ValueError, "at least one name.*empty"),
    "an empty name": ([""], ValueError, r"targets\[0\]='' matched no layer"),
    "a pattern of nothing": ("quer.*", ValueError, "matched no layer.*whole name.*nearest"),
    "a suffix as pattern": ("q", ValueError, "matched no layer.*a list holds suffixes"),
    "an empty pattern": ("", ValueError, "matched no layer"),
    "an invalid pattern": ("(q", ValueError, r"valid regular expression.*'\(q'"),
    "a predicate of nothing": (lambda *_: False, ValueError, "at least one layer.*predicate"),
    "None": (None, TypeError, "list of names.*None"),
    "a number": (3, TypeError, "list of names.*3"),
    "a set": ({"q"}, TypeError, "list of names"),
    "bytes": (b"q", TypeError, "list of names"),
    "a list of numbers": ([1], TypeError, "list of names"),
    "a compiled pattern": (re.compile("q"), TypeError, "list of names"),
    "a module": (nn.Linear(1, 1), TypeError, "list of names"),
    "a container": (["blocks"], ValueError, "Linear, Conv1D.*'blocks'.*ModuleList.*'blocks.0.q'"),
    "everything": (".*", ValueError, "Linear, Conv1D"),
}


@pytest.mark.parametrize(("targets", "error", "message"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_targets_refused(targets, error, message):
    model = make_net()
    with unchanged(model), pytest.raises(error, match=message):
        slt.attach(model, sl.lora(1), targets)


def test_error_of_a_predicate_is_its_own():
    model = make_net()
    with unchanged(model), pytest.raises(ZeroDivisionError):
        slt.attach(model, sl.lora(1), lambda name, module: 1 / 0)


@pytest.mark.parametrize("targets", [["fc"], "all-linear", "fc"], ids=str)
def test_model_without_any_layer(targets):
    model = nn.Sequential(nn.ReLU())
    with unchanged(model), pytest.raises(ValueError, match=r"(?s)layer.*(none|no layers)"):
        slt.attach(model, sl.lora(1), targets)


def make_pruned():
    from torch.nn.utils import prune

    model = make_net()
    prune.l1_unstructured(model.blocks[0].q, "weight", 0.5)
    return model


def make_normed():
    model = make_net()
    nn.utils.parametrizations.weight_norm(model.blocks[0].q)
    return model


def make_lazy():
    model = make_net()
    model.blocks[0].q = nn.LazyLinear(8)
    return model


def make_weightless():
    model = make_net()
    model.blocks[0].q.weight = None
    return model


def make_integer():
    model = make_net()
    weight = torch.zeros(8, 16, dtype=torch.int8)
    model.blocks[0].q.weight = nn.Parameter(weight, requires_grad=False)
    return model


def make_tied():
    model = make_net()
    model.blocks[1].q.weight = model.blocks[0].q.weight
    return model


def make_tied_to_embedding():
    model = make_net()
    model.blocks[0].q.embedding = nn.Embedding(8, 16)
    model.blocks[0].q.embedding.weight = model.blocks[0].q.weight
    return model


# A weight that the layer computes, has not yet, shares, or cannot add a real update to.
UNFIT = {
    "pruned": (make_pruned, (TypeError, ValueError), r"'?blocks\.0\.q'?"),
    "parametrized": (make_normed, (TypeError, ValueError), r"'?blocks\.0\.q'?"),
    "lazy": (make_lazy, (TypeError, ValueError), r"'?blocks\.0\.q'?"),
    "without weight": (make_weightless, (TypeError, ValueError), r"'?blocks\.0\.q'?"),
    "int8": (make_integer, TypeError, r"'blocks\.0\.q' has no.*floating-point.*torch\.int8"),
    "tied": (make_tied, ValueError, r"'blocks\.0\.q\.weight' and 'blocks\.1\.q\.weight'"),
    "tied to embedding": (make_tied_to_embedding, ValueError, r"q\.embedding\.weight"),
}


@pytest.mark.parametrize(("make", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_weights_are_refused(make, error, message):
    model = make()
    with unchanged(model), pytest.raises(error, match=message):
        slt.attach(model, sl.lora(1), ["q"])


@pytest.mark.parametrize("make", [make_pruned, make_normed, make_tied, make_integer])
def test_other_layers_of_such_a_model_can_be_adapted(make):
    adapter = slt.attach(make(), sl.lora(1), ["v"])
    assert list(adapter.plan.shapes) == ["blocks.0.v", "blocks.1.v"]


READERS = {
    "attention": (lambda: nn.MultiheadAttention(8, 2), "out_proj"),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "linear1",
    ),
    "attention in it": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "self_attn.out_proj",
    ),
    "its inputs": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "self_attn.in_proj_weight",
    ),
}


@pytest.mark.parametrize("wrapped", [True, False], ids=["within", "root"])
@pytest.mark.parametrize(("make", "target"), READERS.values(), ids=READERS)
def test_layers_read_directly_are_adapted(make, target, wrapped):
    """Their forward is not called: the sum of weight and update is in place meanwhile."""
    model = (nn.Sequential(make()) if wrapped else make()).double().eval()
    x = (torch.randn(2, 3, 8).double(),) * (1 if wrapped or target != "out_proj" else 3)

    def output():
        found = model(*x)
        return found[0] if isinstance(found, tuple) else found

    if wrapped and target == "out_proj":
        model, x = model[0], x * 3
    base = output()
    adapter = slt.attach(model, sl.lora(2, scale=0.7), [target])
    assert_near(output(), base)
    fill(adapter)
    y = output()
    y.square().sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in adapter.parameters())
    assert not torch.allclose(y, base)
    with torch.no_grad():  # where torch takes its fast path
        assert_near(output(), y)
    adapter.merge()
    assert_near(output(), y)
    adapter.unmerge()
    adapter.detach()
    assert_near(output(), base)


def test_layers_of_a_decoder_layer_are_called():
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    x = torch.ones(1, 3, 8)
    base = model.eval()(x, x)
    adapter = slt.attach(model, sl.dense(), ["linear1", "linear2"])
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.uniform_(-1, 1)
    assert not torch.allclose(model(x, x), base)


BAD_ARGUMENTS = {
    "spec None": ({"spec": None}, TypeError, "spec must be a superlora.Spec or .*'blocks.0.q'"),
    "spec a dict": ({"spec": {"rank": 3}}, ValueError, "operations must be among .*got 'rank'"),
    "spec a function": ({"spec": sl.lora}, TypeError, "spec must be a superlora.Spec"),
    "stack of two shapes": ({"spec": sl.lotr(2)}, ValueError, "stack.*one shape"),
    "rank above mode": ({"spec": sl.Spec(rank=(4, 99))}, ValueError, r"rank\[1\] must be at most"),
    "groups above entries": (
        {"spec": sl.Spec(groups=10**6, fold="balanced")},
        ValueError,
        "groups",
    ),
    "name with a dot": ({"name": "a.b"}, ValueError, "identifier: got 'a.b'"),
    "name a number": ({"name": "0"}, ValueError, "identifier"),
    "name empty": ({"name": ""}, ValueError, "identifier"),
    "name None": ({"name": None}, ValueError, "identifier"),
    "name of a child": ({"name": "head"}, sl.AdapterError, "attribute 'head'.*Linear"),
    "name of a buffer": ({"name": "shift"}, sl.AdapterError, "attribute 'shift'.*Tensor"),
    "name of a method": ({"name": "forward"}, sl.AdapterError, "attribute 'forward'"),
    "name of a flag": ({"name": "training"}, sl.AdapterError, "attribute 'training'"),
    "seed negative": ({"seed": -1}, ValueError, "seed"),
    "seed too large": ({"seed": 1 << 64}, ValueError, "seed"),
    "seed a float": ({"seed": 0.5}, (TypeError, ValueError), "seed"),
    "dtype integer": ({"dtype": torch.int8}, TypeError, "dtype.*floating-point.*int8"),
    "dtype a string": ({"dtype": "float32"}, TypeError, "dtype.*'?float32'?"),
    "dtype complex": ({"dtype": torch.complex64}, TypeError, "dtype.*complex64"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused(changes, error, message):
    model = make_net()
    arguments = {"spec": sl.lora(1), "targets": ["q", "head"], **changes}
    with unchanged(model), pytest.raises(error, match=message):
        slt.attach(model, **arguments)


@pytest.mark.parametrize("model", [None, "model", torch.ones(2), Net], ids=repr)
def test_model_must_be_a_module(model, tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        slt.attach(model, sl.lora(1))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        slt.load(model, tmp_path / "a.safetensors")


def test_name_in_use_is_refused():
    model = make_net()
    slt.attach(model, sl.lora(1), ["q"])
    with unchanged(model), pytest.raises(sl.AdapterError, match=r"'superlora'.*Adapter.*detach"):
        slt.attach(model, sl.lora(1), ["v"])
    part = make_outer()
    slt.attach(part.inner, sl.lora(1), ["q"])
    slt.attach(part, sl.lora(1), ["extra"])


def test_name_in_use_is_refused_on_a_container():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    slt.attach(model, sl.lora(1), ["0"])
    with unchanged(model), pytest.raises(sl.AdapterError, match="'superlora'"):
        slt.attach(model, sl.lora(1), ["1"])
