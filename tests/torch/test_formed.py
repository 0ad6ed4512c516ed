"""Updates that are formed: several on one layer, of any dtypes, under autocast, interrupted."""

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import fill, make_input, make_net, seeded


def assert_near(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def layer(width=6, **to):
    with seeded(0):
        return nn.Sequential(nn.Linear(width, width)).to(**to)


@pytest.mark.parametrize("spec", [sl.lora(2), sl.lokr(2), sl.dense()], ids=str)
def test_autocast_and_a_base_that_is_trained(spec):
    model = layer()
    adapter = fill(slt.attach(model, spec, apply="formed"))
    model[0].weight.requires_grad_()
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        merged = nn.functional.linear(x, model[0].weight + adapter.delta("0"), model[0].bias)
    assert torch.equal(y, merged)  # the update is formed in the factors' own precision
    y.sum().backward()
    expected = torch.ones(6, 3) @ x.detach()
    assert_near(model[0].weight.grad, expected, 1e-2)


def test_every_parameter_has_a_gradient_of_its_own():
    model = layer()
    adapters = [slt.attach(model, sl.dense(), name=name, apply="formed") for name in "ab"]
    model(torch.randn(3, 6)).sum().backward()
    own = [parameter for adapter in adapters for parameter in adapter.parameters()]
    assert len({parameter.grad.data_ptr() for parameter in own}) == len(own)
    norm = nn.utils.clip_grad_norm_(own, 1e-3)
    assert norm > 1e-3
    found = torch.stack([parameter.grad.norm() for parameter in own]).norm()
    assert_near(found, torch.tensor(1e-3), 1e-3)


def test_each_adapter_has_gradients_of_its_own_precision():
    model = layer(dtype=torch.float64)
    single = fill(slt.attach(model, sl.dense(), name="a", apply="formed", dtype=torch.float32))
    double = fill(slt.attach(model, sl.dense(), name="b", apply="formed", dtype=torch.float64))
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    with torch.no_grad():
        of_weight = 2 * model(x).t() @ x
    (one,), (other,) = ([p.grad for p in own.parameters()] for own in (single, double))
    assert one.dtype == torch.float32
    assert other.dtype == torch.float64
    assert_near(one.double().reshape(6, 6), of_weight, 1e-6)
    assert_near(other.reshape(6, 6), of_weight, 1e-14)


def test_an_update_has_nothing_of_a_pass_that_was_interrupted():
    model = make_net()
    mapped = sl.Spec(rank=2, groups=1, fold="balanced", map=sl.maps.Fastfood(), ratio=0.5)
    adapter = fill(slt.attach(model, mapped))
    name, *_ = adapter.layers()

    def interrupt(*_):
        raise KeyboardInterrupt

    *_, last = adapter.layers().values()
    hook = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(make_input())
    hook.remove()
    for parameter in adapter.parameters():
        parameter.data.mul_(2)
    expected = adapter.plan.delta(adapter.factors(), name)
    with torch.no_grad():
        assert_near(adapter.delta(name), expected, 1e-6)
