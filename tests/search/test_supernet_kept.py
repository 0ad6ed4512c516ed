"""Updated weights that evaluation keeps: formed once, and dropped when something changes."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import superlora.search.supernet_site as site  # noqa: E402
from superlora.search import Supernet  # noqa: E402
from tests.search.supernets import RANKS, TARGETS, fill, make_supernet  # noqa: E402
from tests.torch.conftest import _one_thread  # noqa: E402, F401
from tests.torch.helpers import (  # noqa: E402
    WIDTH,
    every_layer,
    make_input,
    make_net,
    seeded,
)


@pytest.fixture
def formed(monkeypatch):
    """Count how often an updated weight is formed."""
    count = []
    form = site.SupernetSite._form

    def counted(self, *arguments):
        count.append(self.name)
        return form(self, *arguments)

    monkeypatch.setattr(site.SupernetSite, "_form", counted)
    return count


@every_layer
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_evaluation_forms_each_weight_once(layer, context, formed):
    model, supernet = make_supernet(layer)
    x = make_input()
    with supernet.using(supernet.space.most):
        expected = model(x)
        assert not formed
        with context():
            for _ in range(5):
                torch.testing.assert_close(model(x), expected)
        assert sorted(formed) == sorted(supernet.layers())
    with context(), supernet.using(supernet.space.fixed(add_weight="constant")):
        model(x)
        model(x)
    assert len(formed) == 12


def test_evaluation_multiplies_once_a_layer():
    """It costs what the base does: nothing but one product for each layer."""
    model = make_net()
    x = make_input(2, 5)

    def operations(net):
        with torch.profiler.profile() as profile, torch.no_grad():
            net(x)
        return sorted(
            (event.key, event.count) for event in profile.key_averages() if event.key != "aten::to"
        )

    base = operations(model)
    supernet = fill(Supernet(model, TARGETS, ranks=RANKS))
    supernet.use(supernet.space.most)
    with torch.no_grad():
        model(x)
    assert operations(model) == base


def _step(model, supernet):
    """Change a parameter in place."""
    with torch.no_grad():
        supernet.stored("blocks.0.q")["add_weight"][0].add_(1)


def _optimise(model, supernet):
    optimizer = torch.optim.SGD(supernet.parameters(), lr=1.0)
    parameter = supernet.stored("blocks.0.q")["add_weight"][0]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.grad = None


def _load(model, supernet):
    state = {name: 2 * value for name, value in supernet.state_dict().items()}
    supernet.load_state_dict(state)


def _base(model, supernet):
    with torch.no_grad():
        model.blocks[0].q.weight.mul_(2)


def _bias(model, supernet):
    with torch.no_grad():
        model.blocks[0].q.bias.mul_(2)


def _other_weight(model, supernet):
    model.blocks[0].q.weight = nn.Parameter(2 * model.blocks[0].q.weight.detach(), False)


def _exchange(model, supernet):
    own = supernet.stored("blocks.0.q")["add_weight"][0]
    own.data = 2 * own.data


def _inference(model, supernet):
    with torch.inference_mode():
        supernet.stored("blocks.0.q")["add_weight"][0].add_(1)


@pytest.mark.parametrize(
    "change",
    [_step, _optimise, _load, _base, _bias, _other_weight, _exchange, _inference],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_kept_weight_is_dropped_when_something_changes(change, formed):
    model, supernet = make_supernet()
    x = make_input()
    supernet.use(supernet.space.most)
    with torch.no_grad():
        before = model(x)
        formed.clear()
        model(x)
        assert not formed
    change(model, supernet)
    with torch.no_grad():
        after = model(x)
    assert "blocks.0.q" in formed
    assert not torch.allclose(after, before)
    torch.testing.assert_close(model(x), after)


def test_another_view_of_the_same_memory_is_seen():
    with seeded(0):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    supernet = fill(Supernet(model, ranks=RANKS))
    supernet.use(supernet.space.most)
    with torch.no_grad():
        before = model(make_input())
        model[0].weight = nn.Parameter(model[0].weight.detach().t(), requires_grad=False)
        after = model(make_input())
    assert not torch.allclose(after, before)
    torch.testing.assert_close(model(make_input()), after)


def test_a_kept_weight_is_dropped_with_gradients_and_with_the_configuration():
    model, supernet = make_supernet()
    supernet.use(supernet.space.most)
    with torch.no_grad():
        model(make_input())
    assert all(own._kept is not None for own in supernet._sites.values())
    model(make_input())
    assert all(own._kept is None for own in supernet._sites.values())
    with torch.no_grad():
        model(make_input())
    supernet.use(supernet.space.fixed(add_weight=2))
    assert all(own._kept is None for own in supernet._sites.values())
    with torch.no_grad():
        model(make_input())
    supernet.draw(0)
    with torch.no_grad():
        model(make_input())
    assert all(own._kept is None for own in supernet._sites.values())


def test_another_dtype_is_followed():
    model, supernet = make_supernet(to={"dtype": torch.float64})
    supernet.use(supernet.space.most)
    with torch.no_grad():
        expected = model(make_input(dtype=torch.float64))
        model.float()
        found = model(make_input())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
