"""What a supernet computes: options against loops over numbers, gradients, precision."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from superlora.search import Supernet  # noqa: E402
from tests.search.supernets import (  # noqa: E402
    RANKS,
    TARGETS,
    every_choice,
    expected_of,
    fill,
    fixed,
    make_lone,
    make_supernet,
)
from tests.torch.conftest import _one_thread  # noqa: E402, F401
from tests.torch.helpers import (  # noqa: E402
    LAYERS,
    WIDTH,
    assert_near,
    bits,
    every_layer,
    gradients,
    loss_of,
    make_input,
    make_net,
    seeded,
)

VARIED = [
    {"scale_weight": 3, "add_weight": 2, "weight_to_bias": 3},
    {"scale_weight": "vector", "add_weight": 3, "scale_bias": "vector", "add_bias": "constant"},
    {"scale_weight": 2, "add_weight": "constant", "weight_to_bias": "vector", "add_bias": "vector"},
    {"scale_weight": "constant", "add_weight": "vector", "scale_bias": "constant"},
    {"weight_to_bias": 2, "add_bias": "vector"},
    {"add_weight": "vector"},
]


def assert_near_together(found, expected):
    """Compare gradients of half precision: all entries together."""
    assert found.keys() == expected.keys()
    one = torch.cat([each.double().flatten() for each in found.values()])
    other = torch.cat([each.double().flatten() for each in expected.values()])
    assert (one - other).norm() < 0.03 * other.norm()


@every_layer
@pytest.mark.parametrize("kept", [False, True], ids=["trained", "kept"])
def test_all_options_equal_loops(layer, kept):
    """Every combination of the five operations' options, with gradients and without."""
    model, supernet = make_lone(layer)
    x = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(2, 4)
    choices = every_choice(supernet)
    assert len(choices) == (300 if layer == "no-bias" else 900)
    for options in choices:
        weight, bias = expected_of(model[0], supernet, "0", options)
        supernet.use({"0": options})
        with torch.set_grad_enabled(not kept):
            y = model(x)
        expected = torch.from_numpy(x.numpy() @ weight.T + bias)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, msg=str(options))


@every_layer
@pytest.mark.parametrize("options", VARIED, ids=str)
def test_gradients(layer, options):
    model, supernet = make_lone(layer)
    supernet.use(fixed(supernet, options))
    x = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    stored = [parameter.detach().clone() for parameter in supernet.parameters()]
    names = [name for name, _ in supernet.named_parameters()]

    def call(x, *tensors):
        own = {f"0.supernet.{name}": each for name, each in zip(names, tensors, strict=True)}
        return torch.func.functional_call(model, own, (x,))

    assert torch.autograd.gradcheck(call, (x, *(each.requires_grad_() for each in stored)))


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_starts_as_the_base_bit_for_bit(layer, dtype):
    model = make_net(layer, dtype=dtype)
    x = make_input(dtype=dtype)
    y = model(x)
    supernet = Supernet(model, TARGETS, ranks=RANKS)
    for step in range(20):
        configuration = supernet.draw(step)
        assert torch.equal(model(x), y)
        with torch.no_grad():
            assert torch.equal(model(x), y)
            with supernet.using(configuration):
                assert torch.equal(model(x), y)


def test_start_is_zero_on_the_left_and_random_on_the_right():
    model = nn.Sequential(nn.Linear(300, 200))
    supernet = Supernet(model, ranks=(100, 7))
    for left, *right in supernet.stored("0").values():
        assert not left.any()
        for each in right:
            deviation = each.shape[0] ** -0.5  # as that of a LoRA's
            assert abs(each.mean()) < 5 * deviation / each.numel() ** 0.5
            assert abs(each.std() - deviation) < 0.2 * deviation
    same = Supernet(nn.Sequential(nn.Linear(300, 200)), ranks=(100,))
    assert all(map(torch.equal, supernet.parameters(), same.parameters()))
    other = Supernet(nn.Sequential(nn.Linear(300, 200)), ranks=(100,), seed=1)
    assert not torch.equal(same.stored("0")["add_weight"][1], other.stored("0")["add_weight"][1])


@pytest.mark.parametrize(("rank", "count"), [(2, 884_832), (4, 1_603_776), (8, 3_041_664)])
def test_what_is_stored_for_a_vision_transformer(rank, count):
    """All four linear layers of the 12 blocks of ViT-B."""
    widths = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict({name: nn.Linear(*reversed(shape)) for name, shape in widths.items()})
            for _ in range(12)
        ]
        supernet = Supernet(nn.ModuleList(blocks), ranks=(rank,))
    assert supernet.num_parameters == count
    assert supernet.space.size == 432**48


def test_counts():
    model, supernet = make_supernet()
    rank = RANKS[0]
    shapes = [(8, 16), (8, 16), (16, 8)] * 2
    expected = sum(2 * rank * (o + i) + rank * (i + 1) + 2 * o for o, i in shapes)
    assert supernet.num_parameters == expected
    assert dict(supernet.space.layers) == dict(zip(supernet.layers(), shapes, strict=True))
    assert list(supernet.layers()) == [f"blocks.{b}.{name}" for b in range(2) for name in TARGETS]
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert trainable == supernet.num_parameters


def test_ranks_share_their_numbers():
    """What rank 2 learns, rank 3 has: its leading part is the same memory."""
    model, supernet = make_lone("bias")
    space = supernet.space
    small, large = space.fixed(add_weight=2), space.fixed(add_weight=3)
    x = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(2, 4)
    with torch.no_grad(), supernet.using(large):
        before = model(x)
    supernet.use(small)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    model(x).square().sum().backward()
    left, right = supernet.stored("0")["add_weight"]
    assert left.grad[:, :2].all()
    assert not left.grad[:, 2:].any()
    assert right.grad[:, :2].all()
    assert not right.grad[:, 2:].any()
    unread = [
        each for key, pair in supernet.stored("0").items() if key != "add_weight" for each in pair
    ]
    assert all(each.grad is None for each in unread)
    rest = left[:, 2:].detach().clone()
    optimizer.step()
    assert torch.equal(left[:, 2:], rest)
    with torch.no_grad(), supernet.using(large):
        after = model(x)
    expected = torch.from_numpy(
        x.numpy() @ expected_of(model[0], supernet, "0", large["0"])[0].T
        + model[0].bias.detach().numpy()
    )
    assert_near(after, expected)
    assert (after - before).abs().min() > 0


@pytest.mark.parametrize("operation", ["scale_weight", "add_weight", "weight_to_bias"])
def test_a_vector_is_the_first_column_of_the_ranks(operation):
    model, supernet = make_lone("bias")
    supernet.use(supernet.space.fixed({operation: "vector"}))
    model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    left, right = supernet.stored("0")[operation]
    assert left.grad[:, 0].all()
    assert not left.grad[:, 1:].any()
    assert right.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model, supernet = make_supernet(to={"dtype": dtype})
    assert supernet.dtype == torch.float32
    wide, other = make_supernet(to={"dtype": torch.float64})
    wide.load_state_dict(model.state_dict())
    x = make_input(dtype=dtype)
    for step in range(5):
        supernet.use(supernet.sample(step))
        other.use(supernet.sample(step))
        y = model(x)
        assert y.dtype == dtype
        expected = wide(x.double())
        assert_near(y, expected, torch.bfloat16)
        with torch.no_grad():
            assert_near(model(x), expected, torch.bfloat16)
        found, exact = gradients(supernet, loss_of(y.float())), gradients(other, loss_of(expected))
        assert_near_together(found, exact)


def test_a_small_update_is_not_rounded_away_while_it_is_trained():
    """Added to a weight of 1 in bfloat16 it would be; beside the weight it counts."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(16, 16, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(0, 2, (16, 16)) * 2 - 1)
    x = torch.tensor([1.0, -1.0] * 8, dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].weight[:, ::2] = model[0].weight[:, 1::2]  # so that the base gives zero
    supernet = Supernet(model, ranks=(2,))
    left, right = supernet.stored("0")["add_weight"]
    with torch.no_grad():
        left.fill_(1e-3)
        right.copy_(x.float()[:, None].expand(16, 2))
    supernet.use(supernet.space.fixed(add_weight=2))
    assert_near(model(x), torch.full((16,), 0.032), torch.bfloat16)


@every_layer
def test_autocast(layer):
    model, supernet = make_supernet(layer)
    x = make_input()
    for options in VARIED:
        supernet.use(fixed(supernet, options))
        exact = model(x)
        expected = gradients(supernet, loss_of(exact))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            with torch.no_grad():
                kept = model(x)
        assert y.dtype == torch.bfloat16
        # Eight bits, layer after layer: without biases one of these is 2.1 % off.
        bound = 0.025 if layer == "no-bias" else 0.02
        for found in (y, kept):
            error = (found.double() - exact.double()).abs().max()
            assert error <= bound * exact.abs().max()
        assert_near_together(gradients(supernet, loss_of(y.float())), expected)


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, 3, 4, WIDTH)], ids=str)
@every_layer
def test_shapes_of_inputs(layer, shape):
    model, supernet = make_supernet(layer, to={"dtype": torch.float64})
    with seeded(1):
        x = torch.randn(shape, dtype=torch.float64)
    supernet.use(supernet.space.most)
    y = model(x)
    assert y.shape == (*shape[:-1], 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


def test_inputs_by_name_and_none():
    model, supernet = make_lone("bias")
    supernet.use(supernet.space.most)
    x = torch.ones(2, 4, dtype=torch.float64)
    assert torch.equal(model[0](input=x), model[0](x))
    with pytest.raises(TypeError, match="input"):
        model[0]()
    with pytest.raises(TypeError):
        model[0](x, x)


def test_large_weights_are_formed_in_rows():
    """The rows that are formed at a time change nothing."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(3000, 200)).double()
        x = torch.randn(2, 3000, dtype=torch.float64, requires_grad=True)
    supernet = fill(Supernet(model, ranks=(3,)))
    for options in [{"scale_weight": 3, "add_weight": "constant"}, {"scale_weight": "vector"}]:
        supernet.use(fixed(supernet, options))
        y = model(x)
        with torch.no_grad():
            assert_near(y, model(x))
        found = torch.autograd.grad(y.square().sum(), [x, supernet.stored("0")["scale_weight"][0]])
        left = supernet.stored("0")["scale_weight"][0].detach().clone().requires_grad_()
        right = supernet.stored("0")["scale_weight"][1].detach()
        scale = left[:, :1] if options["scale_weight"] == "vector" else left @ right.t()
        shift = supernet.stored("0")["add_weight"][0][0, 0] if "add_weight" in options else 0
        own = model[0].weight
        plain = nn.functional.linear(x, own + own * scale + shift, model[0].bias)
        assert_near(y, plain)
        for one, other in zip(
            found, torch.autograd.grad(plain.square().sum(), [x, left]), strict=True
        ):
            assert_near(one, other)


def test_operations_may_be_few():
    """Only what the space can choose is stored."""
    model = make_net(dtype=torch.float64)
    supernet = Supernet(
        model,
        TARGETS,
        ranks=(2,),
        operations={
            "add_weight": (2, "none"),
            "add_bias": ("vector", "none"),
            "scale_bias": ("none",),
        },
    )
    assert supernet.space.size == 4**6
    stored = supernet.stored("blocks.0.q")
    assert {key: [tuple(each.shape) for each in pair] for key, pair in stored.items()} == {
        "add_weight": [(8, 2), (16, 2)],
        "add_bias": [(8,)],
    }
    fill(supernet)
    x = make_input(dtype=torch.float64)
    supernet.use(supernet.space.fixed())
    y = model(x)
    supernet.use(supernet.space.most)
    assert not torch.allclose(model(x), y)
    supernet.detach()
    assert torch.equal(model(x), y)


def test_the_base_stays_as_it_was_bit_for_bit():
    """After training, evaluation and detaching."""
    for layer in LAYERS:
        model = make_net(layer)
        before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        kinds = [type(module) for module in model.modules()]
        x = make_input()
        y = model(x)
        supernet = Supernet(model, TARGETS, ranks=RANKS)
        assert list(model.state_dict())[: len(before)] == list(before)
        optimizer = torch.optim.AdamW(supernet.parameters(), lr=0.1)
        for step in range(5):
            supernet.draw(step)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), supernet.using(supernet.space.most):
            assert not torch.allclose(model(x), y)
        supernet.detach()
        assert torch.equal(model(x), y)
        assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable
        assert [type(module) for module in model.modules()] == kinds
        assert not any("forward" in vars(module) for module in model.modules())


def test_the_optimum_is_learnt():
    """A layer whose updated weight and bias another configuration made is found again."""
    model, teacher = make_lone("bias")
    chosen = {"scale_weight": "vector", "add_weight": 2, "add_bias": "vector"}
    teacher.use(teacher.space.fixed(chosen))
    with seeded(5):
        x = torch.randn(64, 4, dtype=torch.float64)
    goal = model(x).detach()
    teacher.detach()
    supernet = Supernet(model, ranks=RANKS)
    supernet.use(supernet.space.fixed(chosen))
    optimizer = torch.optim.Adam(supernet.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 1e-4 * losses[0]
