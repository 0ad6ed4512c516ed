"""torch.compile(fullgraph=True) of merge operations: the same outputs and gradients."""

from collections.abc import Iterator

import pytest
import torch

from tests.torch.helpers import assert_near, loss_of, make_input
from tests.torch.support_cases import DESIGNS, SOME, attach_small, make_model

# torch's own tracer does what its own warnings forbid.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiles(call, adapter, backend):
    """Compare outputs and gradients with eager ones; from step to step nothing is traced again."""
    x = make_input(dtype=torch.float64).requires_grad_()
    run = torch.compile(call, fullgraph=True, backend=backend)

    def compare():
        found, expected = run(x), call(x)
        assert_near(found, expected)
        wanted = [x, *adapter.parameters()]
        for own, other in zip(
            torch.autograd.grad(loss_of(found), wanted, allow_unused=True),
            torch.autograd.grad(loss_of(expected), wanted, allow_unused=True),
            strict=True,
        ):
            assert (own is None) == (other is None)
            if own is not None:
                assert_near(own, other)
        return expected

    first = compare()
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad():
            for factor in adapter.parameters():
                factor.mul_(1.25)
        second = compare()
        adapter.scale = -0.5 * adapter.scale
        third = compare()
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


@pytest.mark.parametrize("key", ["glora", "ssf"])
def test_one_layer(key):
    model = make_model(depth=1, dtype=torch.float64)
    adapter = attach_small(model, key, targets=["q"])
    assert_compiles(model.blocks[0].q, adapter, "aot_eager")


OTHERS = [(key, layer) for key in SOME for layer in ("no-bias", "conv1d")]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "layer"), [*((key, "bias") for key in DESIGNS), *OTHERS])
def test_whole_models(key, layer):
    model = make_model(layer, depth=1, dtype=torch.float64)
    assert_compiles(model, attach_small(model, key), "aot_eager")


@pytest.mark.slow
def test_a_merged_one_beside_an_active_one():
    model = make_model("no-bias", depth=1, dtype=torch.float64)
    below = attach_small(model, "glora", "below", 3)
    above = attach_small(model, "glora, matrix", "above", 4)
    below.merge()
    assert_compiles(model, above, "aot_eager")
