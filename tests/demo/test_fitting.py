"""`Fit` and `evaluator`: training that can go on, and accuracies."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from superlora.demo.fitting import Fit, Schedule, evaluator  # noqa: E402
from superlora.demo.train import new_head, rate_share  # noqa: E402
from superlora.search import Supernet  # noqa: E402
from tests.demo.search_cases import make_base, make_task  # noqa: E402


def test_a_fit_that_goes_on_gives_the_same_numbers() -> None:
    task = make_task()

    def fit(epochs: int = 4) -> Fit:
        model = make_base().fuse()
        adapter = Supernet(model, ["qkv", "fc2"], (2,), seed=3)
        head = new_head(model, 10)
        schedule = Schedule(epochs, 20, 1e-2, 1e-3, weight_decay=0.01, seed=5)
        return Fit(model, head, adapter.parameters(), task.train, 28, schedule, adapter.draw)

    whole = fit()
    losses = [whole.run_epoch() for _ in range(4)]
    first = fit()
    found = [first.run_epoch(), first.run_epoch()]
    state = first.state()
    second = fit()
    second.restore(state)
    found += [second.run_epoch(), second.run_epoch()]
    assert found == losses
    assert second.done
    for one, other in zip(whole.factors, second.factors, strict=True):
        assert torch.equal(one, other)
    assert losses[-1] < losses[0]


def test_factors_move_at_their_own_rates() -> None:
    task = make_task()
    model = make_base().fuse()
    supernet = Supernet(model, ["proj"], (2,))
    supernet.use(supernet.space.fixed(add_weight=2, add_bias="vector"))
    found = supernet.stored("blocks.0.proj")
    factors = {1e-2: [found["add_weight"][0]], 1e-4: [found["add_bias"][0]]}
    schedule = Schedule(1, 60, 1.0, 1e-3)
    head = new_head(model, 10)
    torch.nn.init.normal_(head.weight)
    fit = Fit(model, head, factors, task.train, 28, schedule)
    fit.run_epoch()  # one step of AdamW, which moves each number by its rate
    share = rate_share(0, 1)
    for rate, (factor,) in factors.items():
        moved = factor.detach().abs()
        torch.testing.assert_close(moved, torch.full_like(moved, share * rate), rtol=1e-3, atol=0)


def test_the_steps_of_a_fit_draw_one_configuration_each() -> None:
    task = make_task()
    model = make_base().fuse()
    drawn: list[int] = []
    supernet = Supernet(model, ["qkv"], (2,))

    def choose(step: int) -> None:
        drawn.append(step)
        supernet.draw(step)

    schedule = Schedule(2, 25, 1e-2, 1e-3)
    fit = Fit(model, new_head(model, 10), supernet.parameters(), task.train, 28, schedule, choose)
    fit.run_epoch()
    fit.run_epoch()
    assert drawn == list(range(6))  # 60 images are three batches


def test_an_evaluator_measures_the_model_as_it_is_then() -> None:
    task = make_task()
    model = make_base().fuse()
    head = new_head(model, 10)
    accuracy = evaluator(model, head, task.validation, 28)
    zero = int((task.validation.labels == 0).sum()) / 20
    assert accuracy() == zero  # a head of zeros says class 0
    with torch.no_grad():
        head.bias[3] = 1
    assert accuracy() == int((task.validation.labels == 3).sum()) / 20
