"""What GLoRA is not: methods that change more than a layer's weight and bias, in numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

import superlora as sl
from tests.reductions.glora_cases import attach_with, draw, linear, same

WIDTH = 8


def attention(x, weights, biases, prompt=None):
    """Return a head's outputs at the tokens themselves, (..., tokens, width)."""
    whole = x if prompt is None else torch.cat([x, prompt.expand(*x.shape[:-2], 1, WIDTH)], -2)
    query, key, value = (
        part @ weight.T + bias
        for part, weight, bias in zip((x, whole, whole), weights, biases, strict=True)
    )
    shares = torch.softmax(query @ key.transpose(-1, -2) / WIDTH**0.5, -1)
    return shares @ value


def matrices(seed):
    return draw(3, WIDTH, WIDTH, seed=seed), draw(3, WIDTH, seed=seed + 1)


def best_affine(inputs, outputs):
    """Return what the best map M x + m leaves of the outputs, relative to their size."""
    inputs, outputs = inputs.reshape(-1, WIDTH), outputs.reshape(-1, WIDTH)
    extended = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
    assert len(extended) > 20 * extended.shape[1]
    fitted = extended @ torch.linalg.lstsq(extended, outputs).solution
    return float((outputs - fitted).norm() / outputs.norm())


def best_bias(outputs):
    outputs = outputs.reshape(-1, WIDTH)
    return float((outputs - outputs.mean(0)).norm() / outputs.norm())


@pytest.mark.parametrize("seed", range(3))
def test_an_appended_prompt_beside_uniform_attention(seed):
    """With Wq = Wk = 0 it gives (T mean + v) / (T + 1), which depends on the number T of tokens.

    A bias gives mean + b. At one number of tokens an affine map of the values does as well,
    at several none does.
    """
    weights, biases = matrices(seed)
    weights[:2], biases[:2] = 0, 0
    prompt = draw(1, WIDTH, seed=7)
    value = (prompt @ weights[2].T + biases[2])[0]
    means, found = {}, {}
    for tokens in (1, 2, 4, 16):
        x = draw(300, tokens, WIDTH, seed=tokens)
        mean = attention(x, weights, biases)
        same(mean, (x @ weights[2].T + biases[2]).mean(1, keepdim=True).expand_as(mean))
        found[tokens] = attention(x, weights, biases, prompt)
        same(found[tokens], (tokens * mean + value) / (tokens + 1))
        means[tokens] = mean
        assert best_affine(mean, found[tokens]) < 1e-12
    changes = {tokens: found[tokens] - means[tokens] for tokens in found}
    # One token of each, so that none of the lengths counts for more.
    inputs = torch.cat([mean[:, 0] for mean in means.values()])
    outputs = torch.cat([change[:, 0] for change in changes.values()])
    assert best_affine(inputs, outputs) > 0.25
    assert best_bias(outputs) > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_no_weights_and_biases_tell_how_many_equal_tokens_there_are(seed):
    """Attention over copies of one token is that token's value, whatever its matrices are; with
    a prompt appended it is not: so no change of weights and biases is that prompt."""
    token, prompt = draw(1, WIDTH, seed=seed), draw(1, WIDTH, seed=seed + 10)
    weights, biases = matrices(seed + 20)
    weights[:2] *= 0.1  # so that no share is near 0 or 1, which would leave nothing to see
    copies = [token.expand(tokens, WIDTH) for tokens in (1, 2, 5)]
    plain = [attention(x, weights, biases)[0] for x in copies]
    for other in plain[1:]:
        same(other, plain[0])
    prompted = [attention(x, weights, biases * 0.1, prompt)[0] for x in copies]
    size = prompted[0].norm()
    assert all((a - b).norm() > 0.05 * size for a, b in itertools.pairwise(prompted))


@pytest.mark.parametrize("seed", range(3))
def test_the_best_bias_and_the_best_layer_leave_most_of_an_appended_prompt(seed):
    """At one number of tokens, for attention that looks at what the tokens are."""
    weights, biases = matrices(seed)
    weights = weights / WIDTH**0.5
    prompt = draw(1, WIDTH, seed=seed + 9)
    x = draw(400, 4, WIDTH, seed=seed + 5)
    before = attention(x, weights, biases)
    change = attention(x, weights, biases, prompt) - before
    assert best_bias(change) > 0.5
    assert best_affine(before, change) > 0.3


def test_added_prompts_are_what_the_bias_can_say():
    layer, x, prompt = linear(6, WIDTH), draw(5, WIDTH), draw(WIDTH, seed=3)
    expected = layer(x + prompt).detach()
    attach_with(layer, sl.prompt_add(), {"weight_to_bias": prompt})
    same(layer(x), expected)


def adaptformer(x, down, up, bias):
    return torch.relu(x @ down.T + bias) @ up.T


@pytest.mark.parametrize("seed", range(3))
def test_adaptformer_is_no_affine_map(seed):
    """f(x) + f(-x) = 2 f(0) holds for every merged layer, and not for a ReLU bottleneck."""
    down, up = draw(3, WIDTH, seed=2 + seed), draw(WIDTH, 3, seed=3 + seed)
    bias = draw(3, seed=4 + seed)
    x = draw(2000, WIDTH)
    zero = torch.zeros(1, WIDTH).double()
    layer = linear(WIDTH, WIDTH)
    blocks = {
        operation: (draw(WIDTH, 2, seed=5), draw(WIDTH, 2, seed=6))
        for operation in ("scale_weight", "add_weight")
    }
    blocks |= {
        "weight_to_bias": (draw(WIDTH, 2, seed=7), draw(1, 2, seed=8)),
        "scale_bias": draw(WIDTH, seed=9),
        "add_bias": draw(WIDTH, seed=10),
    }
    attach_with(layer, sl.glora(2), blocks)
    same(layer(x) + layer(-x), (2 * layer(zero)).expand_as(x), 1e-11)
    found = adaptformer(x, down, up, bias)
    bent = found + adaptformer(-x, down, up, bias) - 2 * adaptformer(zero, down, up, bias)
    assert bent.norm() > 0.3 * found.norm()
    assert best_affine(x, found) > 0.15
    # Without the ReLU it is one: that is what makes the difference.
    assert best_affine(x, (x @ down.T + bias) @ up.T) < 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (9, 6), (7, 7)])
def test_the_matrix_of_repadapter_is_no_thin_hadamard_product(rows, columns):
    """W0 U V = W0 o A asks for A = (W0 U V) / W0, which has full rank: no thin A will do."""
    weight = linear(rows, columns).weight.detach()
    product = draw(columns, 2, seed=2) @ draw(2, columns, seed=3)
    quotient = weight @ product / weight
    same(weight * quotient, weight @ product)
    # Far from rounding: W0 is not near zero, nor is the least singular value.
    assert weight.abs().min() > 1e-3
    assert torch.linalg.matrix_rank(weight @ product) == 2
    assert torch.linalg.matrix_rank(quotient, rtol=1e-6) == min(rows, columns) > 2
    singular = torch.linalg.svdvals(quotient)
    assert singular[2:].norm() > 0.1 * singular.norm()
