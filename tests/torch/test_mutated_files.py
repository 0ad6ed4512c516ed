"""Mutated files: each is refused in words, or gives a right adapter; the model stays as it was."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from superlora.design import patterns
from superlora.search import Supernet
from superlora.torch.files.safetensors_file import write_tensors
from tests.mutations import SECONDS, mutate_file, within
from tests.search.supernets import make_supernet
from tests.torch.helpers import attach_filled, fill, make_input, make_net, unchanged
from tests.torch.support_cases import attach_small

OVERRIDES = {r".*blocks\.0\.(q|v)": {"rank": 3}, "o": {"rank": "full", "scale": -0.5}}
MADE = {
    "lora": lambda model: attach_filled(model, "lora"),
    "one-group": lambda model: attach_filled(model, "one-group"),
    "fastfood": lambda model: attach_filled(model, "fastfood"),
    "vera": lambda model: attach_filled(model, "vera"),
    "lora_xs": lambda model: attach_filled(model, "lora_xs"),
    "supports": lambda model: attach_small(model, "glora"),
    "overrides": lambda model: fill(
        slt.attach(model, sl.lora(2, alpha=5, overrides=OVERRIDES), ["q", "v", "o"])
    ),
    "rows": lambda model: fill(
        slt.attach(model, sl.lora(2, alpha=5), {"q": {"a": (0, 4), "b": (4, 8)}})
    ),
    "supernet": lambda _: make_supernet()[1],
}


def check(model, load, path, x=None):
    """Load a file that may be wrong; return whether it was loaded."""
    with unchanged(model):
        try:
            with within(SECONDS):
                adapter = load(model, path)
        except (ValueError, FileNotFoundError, TypeError, sl.AdapterError) as error:
            message = str(error)
            adapter = None
        if adapter is None:
            assert str(path) in message
            assert len(message) < 3000
            return False
        try:
            check_adapter(model, adapter, x)
        finally:
            adapter.detach()
    return True


def check_adapter(model, adapter, x=None):
    x = make_input() if x is None else x
    if isinstance(adapter, Supernet):
        options = {name: own[0] for name, own in adapter.space.operations.items()}
        adapter.use(adapter.space.fixed(options))
    adapter.eval()  # without the dropout that a file may ask for
    y = model(x)
    held = {} if adapter.replaced is None else adapter.replaced.tensors()
    every = [*adapter.factors().values(), *held.values()]
    factors = [each.detach().abs().max() for each in every if each.numel()]
    scales = [abs(scale.value) for scale in adapter.blocks.scales.values()]
    if max(*map(float, factors), *scales) > 1e4:  # finite numbers, whose products need not be
        return
    assert y.isfinite().all()
    adapter.merge(bias="ignore")
    error = (model(x) - y).abs().max() / y.abs().max()
    adapter.unmerge()
    assert error < 1e-3


@pytest.mark.filterwarnings("ignore:no Kronecker structure:UserWarning")
@pytest.mark.parametrize("count", [250, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MADE)
def test_mutated(kind, count, tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = MADE[kind](make_net())
    adapter.scale = 0.7
    adapter.save(path)
    content = path.read_bytes()
    model = make_net()
    load = Supernet.load if kind == "supernet" else slt.load
    loaded = 0
    for number in range(count):
        try:
            path.write_bytes(mutate_file(content, random.Random(f"{kind} {number}")))
        except RecursionError:  # deeper than Python's own reader goes
            continue
        try:
            loaded += check(model, load, path)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {kind}: {error!r}") from error
    assert 0 < loaded < count


def test_patterns_match_as_those_of_python():
    draw = random.Random(0)
    for _ in range(5000):
        pattern = draw_pattern(draw, 4)
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            continue
        name = "".join(draw.choice("ab.12_") for _ in range(draw.randrange(1, 8)))
        starts = patterns.starts_of(name)
        expected = any(compiled.fullmatch(name, place) for place in starts)
        assert patterns.matches(pattern, name, starts) == expected, (pattern, name)
        ends = patterns.ends_of(pattern, name, starts)
        assert bool(ends >> len(name) & 1) == expected, (pattern, name)


def draw_pattern(draw, depth):
    kind = draw.randrange(10 if depth else 4)
    if kind < 4:
        parts = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", r"[\d.]", "^", "$", r"\b"]
        return draw.choice(parts)
    inner = draw_pattern(draw, depth - 1)
    if kind < 6:
        return inner + draw_pattern(draw, depth - 1)
    if kind == 6:
        return f"({inner}|{draw_pattern(draw, depth - 1)})"
    if kind == 7:
        return f"{draw.choice(['(?=', '(?!'])}{inner})"
    return f"(?:{inner})" + draw.choice(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?"])


@pytest.mark.parametrize("pattern", ["((.|b)*)*!", "(((((((.*)*)*)*)*)*)*)*!", 60 * "(.*)" + "!"])
def test_patterns_that_would_hang(pattern):
    with within(SECONDS):
        assert not patterns.matches(pattern, 60 * "a")


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?i)a", "(a)?(?(1)b|c)"])
def test_patterns_that_have_no_bound(pattern):
    with pytest.raises(ValueError, match="no references to groups"):
        patterns.check_pattern(pattern)


def test_nan_is_read_only_where_it_is_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = attach_filled(make_net(), "lora")
    with torch.no_grad():
        next(iter(adapter.parameters()))[0, 0] = float("nan")
    adapter.save(path)
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=r"'0\.0\.factor0'"):
        slt.load(model, path)
    loaded = slt.load(model, path, allow_nonfinite=True)
    with unchanged(model), pytest.raises(ValueError, match="allow_nonfinite"):
        loaded.swap(path)
    loaded.swap(path, allow_nonfinite=True)


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    adapter = attach_filled(make_net(), "lora")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket"):
            with pytest.raises(ValueError, match="path must be a regular file"):
                adapter.save(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_save_left_is_removed(tmp_path):
    path = tmp_path / "a.safetensors"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pid = ended.pid
    stale, other = tmp_path / f".{path.name}.{pid}-1.part", tmp_path / f".b.{pid}-1.part"
    alive = tmp_path / f".{path.name}.{os.getppid()}-1.part"
    for each in (stale, other, alive):
        each.write_text("x")
    write_tensors(path, {"x": torch.ones(1)})
    assert {each.name for each in tmp_path.iterdir()} == {path.name, other.name, alive.name}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(1)})
    content = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.safetensors could not be written"):
            write_tensors(path, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
