"""What is not in the forward pass is said: layers passed over, changed, shared, or doubled."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.torch.site import holders_of
from tests.torch.helpers import fill, make_input, make_net, unchanged

LORA = sl.lora(2, scale=0.7)


class Reading(nn.Module):
    """Has layers; subclasses read the weight of one themselves."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4, bias=False)
        self.o = nn.Linear(4, 4)
        self.several = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])

    def helped(self, x):
        return x @ self.q.weight.T


class Plain(Reading):
    def forward(self, x):
        return self.o(nn.functional.linear(x, self.q.weight))


class Alias(Reading):
    def forward(self, x):
        layer = self.q
        return self.o(x @ layer.weight.t())


class Method(Reading):
    def forward(self, x):
        return self.o(self.helped(x))


class Function(Reading):
    def forward(self, x):
        return self.o(multiplied(x, self.q))


class Listed(Reading):
    def forward(self, x):
        for layer in self.several:
            x = x @ layer.weight
        return self.o(x)


class Hidden(Reading):
    """In a way that the source does not show."""

    def forward(self, x):
        return self.o(x @ getattr(self, "".join(["q"])).weight.t())


def multiplied(x, layer):
    return x @ layer.weight.t()


class Asking(nn.Module):
    """Asks a weight for what needs no numbers."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x):
        if self.q.weight is not None and isinstance(self.q.weight, torch.Tensor):
            x = x.to(self.q.weight.dtype).to(self.q.weight.device)
        return self.q(x.reshape(-1, self.q.weight.shape[1], *self.q.weight.size()[:0]))


class Routed(nn.Module):
    """Calls one of its experts, and its optional part only when asked to."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))
        self.direct = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.more = nn.Linear(4, 4)

    def forward(self, x, more=False):
        x = self.direct[1](self.experts[0]["up"](x))
        return self.more(x) if more else x


@pytest.mark.parametrize("kind", [Plain, Alias, Method, Function, Listed])
def test_a_weight_that_is_read_is_adapted(kind):
    model, x = kind(), torch.randn(3, 4)
    adapter = fill(slt.attach(model, LORA, ["several.0"] if kind is Listed else ["q", "o"]))
    base, y = model.o(torch.zeros(3, 4)), model(x)
    y.sum().backward()
    assert base.shape == y.shape
    assert all(factor.grad is not None for factor in adapter.parameters())
    assert all(adapter.reached().values())
    adapter.merge()
    torch.testing.assert_close(model(x), y)


def test_a_weight_that_is_asked_for_its_dtype_is_not_formed():
    model = Asking()
    slt.attach(model, LORA, ["q"])
    assert not holders_of(model)
    model(torch.randn(3, 4))


def test_a_layer_that_is_passed_over_is_warned_of_and_not_merged():
    model, x = Hidden(), torch.randn(3, 4)
    adapter = fill(slt.attach(model, LORA, ["q", "o"]))
    assert adapter.reached() == {"q": None, "o": None}
    with pytest.warns(UserWarning, match=r"'q' had no effect.*Hidden"):
        model(x)
    assert adapter.reached() == {"q": False, "o": True}
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        model(x)
    with unchanged(model), pytest.raises(sl.AdapterError, match=r"'q' did not run.*unreached"):
        adapter.merge()
    adapter.merge(unreached="merge")
    adapter.unmerge()
    model.q(x)
    assert adapter.reached() == {"q": True, "o": True}
    adapter.merge()


def test_experts_without_tokens_are_not_warned_of():
    model, x = Routed(), torch.randn(3, 4)
    adapter = slt.attach(model, LORA, ["up", "direct.0", "direct.1"])
    model(x)
    found = adapter.reached()
    assert found == {
        "experts.0.up": True,
        "experts.1.up": None,
        "direct.0": None,
        "direct.1": True,
    }
    adapter.merge()


def test_nothing_ran_yet_and_is_merged():
    model = make_net()
    adapter = fill(slt.attach(model, LORA, ["q"]))
    adapter.merge()
    assert adapter.merged


def test_a_copy_has_a_watch_of_its_own():
    model = Hidden()
    slt.attach(model, LORA, ["q"])
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="'q' had no effect"):
        other(torch.randn(3, 4))
    assert model.superlora.reached() == {"q": None}


def _replaced(model):
    model.blocks[0].q = nn.Linear(16, 8)


def _resized(model):
    model.blocks[0].q.weight = nn.Parameter(torch.zeros(9, 16))


def _pruned(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(model.blocks[0].q, "weight", 0.5)


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].q)


def _hook_removed(model):
    del model.blocks[0].q.forward


CHANGES = {
    "replaced": (_replaced, "another Linear"),
    "resized": (_resized, r"shape \(9, 16\) now, \(8, 16\) before"),
    "pruned": (_pruned, "computed now"),
    "parametrized": (_parametrized, "computed now"),
    "hook removed": (_hook_removed, "put back"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_changed_layer_is_said(change, message, tmp_path):
    model = make_net()
    adapter = fill(slt.attach(model, LORA, ["q", "v"]))
    model(make_input())
    change(model)
    fits = contextlib.nullcontext() if change is not _resized else pytest.raises(RuntimeError)
    with pytest.warns(UserWarning, match=rf"(?s)'blocks.0.q'.*{message}"), fits:
        model(make_input())
    for call in (adapter.merge, lambda: adapter.save(tmp_path / "a.safetensors")):
        with pytest.raises(sl.AdapterError, match=rf"'blocks.0.q'.*{message}"):
            call()
    assert not adapter.merged
    adapter.detach()
    assert not model._forward_pre_hooks


def test_quantize_dynamic_is_said():
    model = nn.Sequential(nn.Linear(16, 16))
    slt.attach(model, LORA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.warns(
        UserWarning, match="'0'.*(another Linear in its place|had no effect)|'0' had no effect"
    ):
        quantised(torch.randn(2, 16))


def test_memory_that_two_parameters_share_is_shared():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    with unchanged(model), pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' are one"):
        slt.attach(model, LORA)
    whole = torch.randn(8, 4)
    model["a"].weight, model["b"].weight = map(nn.Parameter, (whole[:4], whole[4:]))
    slt.attach(model, LORA)  # in the same memory, but not the same part of it


def test_memory_that_is_shared_later_is_not_merged():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    adapter = fill(slt.attach(model, LORA, ["a"]))
    model["b"].weight = model["a"].weight
    with pytest.raises(sl.AdapterError, match=r"'a' lies in the memory of 'b.weight'"):
        adapter.merge()


def test_a_merged_checkpoint_is_known_by_its_tensors(tmp_path):
    def make():
        model = make_net()
        return model, slt.attach(model, LORA, ["q"])

    model, adapter = make()
    fill(adapter)
    save_file(model.state_dict(), tmp_path / "unmerged.safetensors")
    y = model(make_input())
    adapter.merge()
    save_file(model.state_dict(), tmp_path / "merged.safetensors")
    other, _ = make()
    with unchanged(other), pytest.raises(sl.AdapterError, match="counts twice"):
        other.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    other.load_state_dict(load_file(tmp_path / "unmerged.safetensors"))
    torch.testing.assert_close(other(make_input()), y)


def test_gained_biases_are_said():
    class Saved(nn.Module):
        """As a model of transformers."""

        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"attention_bias": False})()
            self.q = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.q(x)

        @classmethod
        def from_pretrained(cls):
            raise NotImplementedError

    model = Saved()
    adapter = fill(slt.attach(model, sl.glora(2), ["q"]))
    with unchanged(model), pytest.raises(sl.AdapterError, match=r"'q' gain a bias.*attention_bias"):
        adapter.merge(bias="refuse")
    with pytest.warns(UserWarning, match=r"from_pretrained drops.*config.attention_bias"):
        adapter.merge()
    adapter.unmerge()
    adapter.merge(bias="ignore")


@pytest.mark.parametrize("arguments", [{"bias": "no"}, {"unreached": True}])
def test_bad_arguments_of_merge(arguments):
    model = make_net()
    adapter = slt.attach(model, LORA, ["q"])
    with unchanged(model), pytest.raises(ValueError, match="must be one of"):
        adapter.merge(**arguments)


def test_fused_projections_are_said():
    """As ``fuse_projections`` of diffusers does it."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
            self.fused_projections = False

        def fuse(self):
            self.to_qkv = nn.Linear(4, 12)
            self.fused_projections = True

        def forward(self, x):
            if self.fused_projections:
                return sum(self.to_qkv(x).chunk(3, -1))
            return self.to_q(x) + self.to_k(x) + self.to_v(x)

    model, x = Fused(), torch.randn(2, 4)
    adapter = slt.attach(model, LORA)
    model(x)
    model.fuse()
    with pytest.warns(UserWarning, match="'to_q': it was fused into 'to_qkv'"):
        model(x)
    adapter.detach()
    adapter = slt.attach(model, LORA)
    assert list(adapter.layers()) == ["to_qkv"]
    assert "fused into 'to_qkv'" in adapter.summary()["left_out"]["to_q"]
