"""What leaves Python: torch.export with a batch of any size, ONNX, a compiler block by block."""

import subprocess
import sys
import warnings

import numpy
import onnxruntime
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import superlora as sl
import superlora.torch as slt
from tests.torch.fake_device import specs
from tests.torch.helpers import fill, slow_but

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:no Kronecker structure"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SPECS = dict(specs())
    SPECS |= {"lora_xs": sl.lora_xs(2), "tinylora": sl.tinylora(2), "said": sl.said(8)}
BATCH = {0: torch.export.Dim("batch")}
# One that is applied as factors, formed, of several operations, by a map, and of frozen blocks.
QUICK = ("lora", "dense", "glora", "Fastfood", "vera")
every_preset = pytest.mark.parametrize("key", slow_but(QUICK, SPECS))


def adapted(spec):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).eval()
    adapter = fill(slt.attach(model, spec))
    return model, adapter, torch.randn(3, 16)


@every_preset
def test_an_adapted_model_is_exported_with_a_batch_of_any_size(key):
    model, _, x = adapted(SPECS[key])
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(BATCH,))
        for rows in (1, 3, 50):
            other = torch.randn(rows, 16)
            expected = model(other)
            bound = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(program.module()(other), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("way", ["auto", "factored", "formed"])
def test_every_way_is_exported(way):
    model, adapter, x = adapted(sl.lora(2, alpha=3))
    adapter.applied = way
    program = torch.export.export(model, (x,), dynamic_shapes=(BATCH,))
    other = torch.randn(9, 16)
    expected = model(other)
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(program.module()(other), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "key", slow_but(["lora", "glora"], ["lora", "lokr", "lorta", "glora", "metatt", "OneHot"])
)
def test_onnx_computes_what_the_model_does(key, merged, tmp_path):
    model, adapter, x = adapted(SPECS[key])
    if merged:
        adapter.merge()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=(BATCH,))
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    other = torch.randn(5, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    expected = model(other).detach().numpy()
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.q(x))


def compilations(spec, blocks):
    """Return how often equal blocks are compiled, each on its own."""
    torch._dynamo.reset()
    model, counter = nn.Sequential(*(Block() for _ in range(blocks))), CompileCounter()
    if spec is not None:
        slt.attach(model, spec, targets=["q"])
    for block in list(model):
        block.compile(backend=counter, fullgraph=True)
    model(torch.randn(3, 8))
    return counter.frame_count


@pytest.mark.parametrize(
    "spec", [sl.lora(2), sl.lora(2, alpha=3), sl.lokr(2), sl.glora(2), sl.vera(2)]
)
def test_equal_blocks_of_their_own_groups_are_compiled_once(spec):
    assert compilations(spec, 12) == compilations(None, 12)


def test_blocks_that_are_slices_of_one_group_are_compiled_one_by_one():
    """Every slice is code of its own; torch stops at eight: compile the whole model then."""
    spec = sl.Spec(rank=2, groups=1, fold="balanced")
    assert compilations(spec, 6) == 6
    model = nn.Sequential(*(Block() for _ in range(12)))
    slt.attach(model, spec, targets=["q"])
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.compile(model, backend=counter, fullgraph=True)(torch.randn(3, 8))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are constants of a trace
@pytest.mark.parametrize("key", slow_but(QUICK, SPECS))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_is_saved(key, tmp_path):
    """No function of Python is left in it, with gradients on as without."""
    model, _, x = adapted(SPECS[key])
    torch.jit.trace(model, x, check_trace=False).save(tmp_path / "traced.pt")
    other = torch.randn(9, 16)
    found, expected = torch.jit.load(tmp_path / "traced.pt")(other), model(other)
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_scripting_says_what_to_do():
    model, _, _ = adapted(sl.lora(2))
    with pytest.raises(
        sl.AdapterError, match=r"must be merged and detached, .* torch\.jit\.script"
    ):
        torch.jit.script(model)


@pytest.mark.slow
def test_nothing_stays_on_another_device():
    found = subprocess.run(
        [sys.executable, "-m", "tests.torch.fake_device"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
