"""What is not in the forward pass is said: layers passed over, changed, shared, or doubled."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.errors import AdapterError
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
    model.q(x)  # which the model does not
    assert adapter.reached() == {"q": False, "o": True}


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


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.middle = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.middle(self.embedding(x)), self.embedding.weight)


class ByParent(Base):
    def forward(self, x):
        return 2 * super().forward(x)


class ByName(Base):
    def forward(self, x):
        return 2 * Base.forward(self, x)


class ByProperty(Base):
    @property
    def head(self):
        return self.embedding.weight

    def forward(self, x):
        return self.middle(self.embedding(x)) @ self.head.T


class ByHelper(Base):
    @staticmethod
    def project(x, layer):
        return x @ layer.weight.T

    def forward(self, x):
        return self.project(self.middle(self.embedding(x)), self.embedding)


@pytest.mark.parametrize("kind", [Base, ByParent, ByName, ByProperty, ByHelper])
def test_a_weight_that_is_called_and_read_has_both_updates(kind):
    model, x = kind().double(), torch.tensor([[1, 2], [3, 4]])
    adapter = fill(slt.attach(model, LORA, ["embedding", "middle"]))
    y = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y)


class Holder(nn.Module):
    """Is never called: others read what it has."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4, bias=False)

    def apply_to(self, x):
        return x @ self.q.weight.T


class Unseen(nn.Module):
    """Reads weights in ways that its source does not show, beside calls."""

    def __init__(self, way):
        super().__init__()
        self.way, self.held, self.q = way, Holder(), nn.Linear(4, 4, bias=False)
        self.register_buffer("same", self.q.weight.detach(), persistent=False)
        self.unregistered = [self.q]
        self.function = lambda x: x @ self.q.weight.T

    def forward(self, x):
        x = self.q(x)
        if self.way == "a module that is not called":
            return self.held.apply_to(x)
        if self.way == "a buffer":
            return x @ self.same.T
        if self.way == "a list":
            return x @ self.unregistered[0].weight.T
        return self.function(x)


@pytest.mark.parametrize("way", ["a module that is not called", "a buffer", "a list", "a lambda"])
def test_a_weight_that_is_read_unseen_is_warned_of_and_not_merged(way):
    model, x = Unseen(way), torch.randn(3, 4)
    name = "held.q" if "called" in way else "q"
    adapter = fill(slt.attach(model, LORA, re.escape(name)))
    with pytest.warns(UserWarning, match=rf"'{name}' are read in the forward pass of Unseen"):
        model(x)
    assert adapter.reached() == {name: False}
    with pytest.raises(sl.AdapterError, match=f"'{name}' did not run .* or their weights"):
        adapter.merge()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        model(x)
    adapter.merge(unreached="merge")
    with adapter.disabled():
        pass
    assert adapter.merged


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.some = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"a": torch.randn(4, 4), "b": torch.randn(4, 4)})

    def forward(self, x):
        x = x @ self.some[0] @ self.named["a"] @ self.named.b
        for weight in self.some:
            x = x @ weight
        return x


def test_lists_of_parameters_are_adapted():
    model, x = Lists().double(), torch.randn(3, 4).double()
    adapter = slt.attach(model, LORA, "all")
    assert list(adapter.layers()) == ["some.0", "some.1", "named.a", "named.b"]
    fill(adapter)
    y = model(x)
    y.sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in adapter.parameters())
    adapter.merge()
    torch.testing.assert_close(model(x), y)


class WithoutBias(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_operations_on_a_bias_that_is_not_read_or_shared_are_refused():
    bias = {"add_bias": sl.dense()}
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    shared = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    shared["b"].bias = shared["a"].bias
    groups = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    for model, target, message in (
        (nn.Sequential(WithoutBias(4, 4)), "0", "whose bias is read.*WithoutBias"),
        (tied, "a", "of their own bias"),
        (shared, "a", "of their own bias"),
        (groups, "0", "of several groups"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            slt.attach(model, bias, [target], tied="once")


class Standardised(nn.Conv2d):
    """Computes with a function of its weight, below its forward."""

    def _conv_forward(self, x, weight, bias):
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight, bias)


def test_a_function_of_a_convolutions_weight():
    model, x = nn.Sequential(Standardised(3, 8, 3)).double(), torch.randn(2, 3, 16, 16).double()
    adapter = fill(slt.attach(model, LORA, "all"))
    y = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y)


def test_a_forward_that_was_put_in_a_layers_place():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    layer = model[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.sin(), layer.bias)
    adapter = fill(slt.attach(model, LORA))
    y = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y)
    adapter.unmerge()
    adapter.detach()
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight.sin(), layer.bias))


def test_a_scale_set_before_the_backward_pass_is_an_error():
    model = nn.Sequential(nn.LayerNorm(8))
    adapter = fill(slt.attach(model, sl.dense(), ["0"]))
    y = model(torch.randn(3, 8, requires_grad=True)).square().sum()
    adapter.scale = 5.0
    with pytest.raises(RuntimeError, match="scales must not be changed"):
        y.backward()


def test_what_is_disabled_before_the_backward_pass_does_not_count():
    model, x = nn.Sequential(nn.LayerNorm(8)), torch.randn(3, 8)
    adapter = fill(slt.attach(model, sl.dense(), ["0"]))
    x.requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)
    y = model(x).square().sum()
    with adapter.disabled():
        torch.testing.assert_close(torch.autograd.grad(y, x), expected)


def test_a_weight_replaced_while_it_is_merged_is_not_overwritten():
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = fill(slt.attach(model, LORA))
    adapter.merge()
    model[0].weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(sl.AdapterError, match="the weight of '0' was replaced since"):
        adapter.unmerge()
    assert torch.equal(model[0].weight, torch.ones(8, 8))
    adapter.detach(keep_merged=True)


def test_threads_call_a_layer_at_once():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    fill(slt.attach(model, sl.dense(), ["0"]))
    x = torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
    wrong = []

    def run():
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(model(x), expected):
                    wrong.append(True)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_swap_takes_no_file_of_other_rows(tmp_path):
    def make(rows):
        model = nn.Sequential(nn.Linear(8, 24))
        return slt.attach(model, LORA, {"0": {"q": rows}})

    make((0, 8)).save(tmp_path / "a.safetensors")
    other = make((8, 16))
    with pytest.raises(ValueError, match=r"rows .*\(8, 16\).*: got .*\(0, 8\)"):
        other.swap(tmp_path / "a.safetensors")


def test_an_adapted_model_is_traced():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    fill(slt.attach(model, LORA)).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), model(x))


def test_scripted_and_uncoded_modules_are_left_out():
    class Mixed(nn.Module):
        """Has the sizes of a linear layer, and a buffer of integers."""

        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 16
            self.w = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(8, 8))
    model = nn.ModuleList([scripted, Mixed(), nn.Linear(8, 8)])
    assert list(slt.attach(model, LORA).layers()) == ["2"]


def test_a_first_pass_that_is_interrupted_leaves_nothing_open():
    from torch.overrides import _get_current_function_mode

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.stop = nn.Linear(4, 4), True

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt
            return self.q(x)

    model, x = Interrupted(), torch.randn(2, 4)
    slt.attach(model, LORA)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.stop = False
    model(x)
    assert _get_current_function_mode() is None
    model.stop = True
    other = nn.Sequential(nn.Linear(4, 4))
    slt.attach(model, LORA, name="more")
    with pytest.raises(KeyboardInterrupt):
        model(x)
    slt.attach(other, LORA)
    assert _get_current_function_mode() is None


def test_an_interrupted_pass_does_not_block_merges_of_other_threads():
    entered, go = threading.Event(), threading.Event()

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.stop = nn.Linear(4, 4), True

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt
            return self.q(x)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Interrupted()

        def forward(self, x):
            with contextlib.suppress(KeyboardInterrupt):
                self.inner(x)
            entered.set()
            go.wait(10)
            return x

    around, x = Around(), torch.randn(2, 4)
    adapter = slt.attach(around.inner, LORA)
    slt.attach(around, LORA, name="outer")

    thread = threading.Thread(target=around, args=(x,))
    thread.start()
    assert entered.wait(10)
    adapter.merge()  # the inner pass was interrupted, although the thread and the outer one run on
    with pytest.raises(AdapterError, match="while another thread runs"):
        around.outer.merge()
    adapter.unmerge()
    go.set()
    thread.join()
    around.outer.merge()
    around.outer.unmerge()
