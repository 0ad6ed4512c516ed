"""Every way in which a file is wrong gets a clear error, and the model stays as it was."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import attach_filled, make_net, unchanged


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.safetensors"
    attach_filled(make_net(), "lora").save(path)
    return path


def parts_of(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["superlora"])
        return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118


def write(path, tensors, header):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"superlora": text})


def assert_refused(path, message, error=ValueError, model=None):
    model = make_net() if model is None else model
    with unchanged(model), pytest.raises(error, match=message) as caught:
        slt.load(model, path)
    assert len(str(caught.value)) < 2000, "a message is for people to read"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert_refused(saved, "a.safetensors must be a whole safetensors file")


def test_truncated_at_every_small_length(saved):
    content = saved.read_bytes()
    model = make_net()
    with unchanged(model):
        for length in [*range(20), len(content) - 1]:
            saved.write_bytes(content[:length])
            with pytest.raises(ValueError, match="whole safetensors file"):
                slt.load(model, saved)


@pytest.mark.parametrize(
    "content",
    [b"{}", b"\0" * 64, b"\xff" * 64, b"PK\x03\x04 a zip file", b"\x02" + bytes(7) + b"{}"],
    ids=["json", "zeros", "ones", "zip", "no tensors"],
)
def test_not_an_adapter(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert_refused(path, "must be (a whole safetensors file|a superlora adapter)")


def test_plain_safetensors_file(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", "must be a superlora adapter")
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_refused(tmp_path / "a.safetensors", "must be a superlora adapter")


def test_no_file(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "no adapter file at.*none", FileNotFoundError)
    assert_refused(tmp_path, "no adapter file at|is a directory", OSError)


HEADERS = {
    "empty": "",
    "broken": "{",
    "list": "[]",
    "number": "3",
    "null": "null",
    "text": '"text"',
    "deeply nested": "[" * 100_000,
    "no version": "{}",
    "no spec": '{"format_version": 1, "weights": []}',
    "no weights": json.dumps({"format_version": 1, "spec": sl.lora(2).to_dict()}),
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS)
def test_unreadable_header(saved, text):
    write(saved, parts_of(saved)[0], text)
    assert_refused(saved, "must have a (readable|valid) superlora header")


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, True, [1]], ids=repr)
def test_other_format_version(saved, version):
    tensors, header = parts_of(saved)
    write(saved, tensors, {**header, "format_version": version})
    assert_refused(saved, f"must be of format version 1: got {version!r}".replace("[", r"\["))


SPECS = {
    "rank zero": {"rank": 0},
    "rank negative": {"rank": -1},
    "rank a text": {"rank": "many"},
    "rank null": {"rank": None},
    "rank a dict": {"rank": {}},
    "rank infinite": {"rank": float("inf")},
    "order zero": {"order": 0},
    "splits a float": {"splits": 1.5},
    "fold unknown": {"fold": "origami"},
    "fold a dict": {"fold": {}},
    "groups unknown": {"groups": "all"},
    "groups a list": {"groups": [1]},
    "core a list": {"core": []},
    "cut unknown": {"cut": "odd"},
    "alpha nan": {"alpha": float("nan")},
    "alpha huge": {"alpha": 10**400},
    "scale beside alpha": {"scale": 1.0},
    "map unknown": {"map": {"name": "Mystery"}},
    "map nameless": {"map": {}},
    "map a list name": {"map": {"name": ["Identity"]}},
    "map null": {"map": None},
    "map with a wrong field": {"map": {"name": "Identity", "seed": 3}},
    "ratio zero": {"ratio": 0},
    "unknown field": {"dropout": 0.5},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_invalid_spec(saved, changes):
    tensors, header = parts_of(saved)
    write(saved, tensors, {**header, "spec": {**header["spec"], **changes}})
    assert_refused(saved, "must have a (readable|valid) superlora header")


WEIGHTS = {
    "null": None,
    "a number": 3,
    "a dict": {"blocks.0.q": [8, 16]},
    "a name alone": ["blocks.0.q"],
    "three widths": [["blocks.0.q", [8, 16, 1]]],
    "a text as shape": [["blocks.0.q", "ab"]],
    "null as shape": [["blocks.0.q", None]],
    "a list as name": [[["blocks.0.q"], [8, 16]]],
    "a number as name": [[3, [8, 16]]],
    "zero wide": [["blocks.0.q", [0, 16]]],
    "negative": [["blocks.0.q", [-8, 16]]],
    "fractional": [["blocks.0.q", [8.0, 16.0]]],
    "none at all": [],
    "one name twice": [["blocks.0.q", [8, 16]], ["blocks.0.q", [8, 16]]],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_invalid_weights(saved, weights):
    tensors, header = parts_of(saved)
    write(saved, tensors, {**header, "weights": weights})
    assert_refused(saved, "must have a valid superlora header|must hold the factors of its spec")


def test_other_tensors_are_all_listed(saved):
    tensors, header = parts_of(saved)
    del tensors["0.0.factor0"], tensors["5.0.factor1"]
    tensors.update({"9.9.core": torch.ones(1), "extra": torch.ones(1)})
    tensors["1.0.factor0"] = torch.ones(3, 2)
    write(saved, tensors, header)
    listed = ("missing '0.0.factor0'", "missing '5.0.factor1'", "extra '9.9.core'", "extra 'extra'")
    shape = r"'1.0.factor0' of shape \(3, 2\) instead of \(8, 2\)"
    assert_refused(saved, "".join(rf"(?=.*{text})" for text in (*listed, shape)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_factors_that_are_not_real_numbers(saved, dtype):
    tensors, header = parts_of(saved)
    write(saved, {name: tensor.to(dtype) for name, tensor in tensors.items()}, header)
    assert_refused(saved, "0.0.factor0.*(dtype|floating)", (TypeError, ValueError))


def test_factors_of_two_dtypes(saved):
    """They could not be multiplied, or would make outputs of another dtype."""
    tensors, header = parts_of(saved)
    tensors["0.0.factor0"] = tensors["0.0.factor0"].double()
    write(saved, tensors, header)
    model = make_net()
    try:
        slt.load(model, saved)
    except (TypeError, ValueError) as error:
        assert "dtype" in str(error) or "float64" in str(error)  # noqa: PT017
        return
    assert model(torch.ones(2, 16)).dtype == torch.float32


def test_other_names_and_shapes_of_layers_are_all_listed(saved):
    model = make_net()
    model.blocks[0].q = torch.nn.Linear(16, 9)
    model.blocks[0].v = torch.nn.ReLU()
    del model.blocks[1].o
    listed = (r"'blocks.0.q'.*\(9, 16\).*\(8, 16\)", "'blocks.0.v'.*ReLU", "'blocks.1.o'")
    assert_refused(saved, "".join(f"(?=.*{text})" for text in listed), model=model)


def test_wholly_other_model(saved):
    assert_refused(saved, "no layer 'blocks.0.q'", model=torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_message_about_thousands_of_layers_is_short(tmp_path):
    path = tmp_path / "a.safetensors"
    weights = [[f"layers.{i}.q", [4, 4]] for i in range(3000)]
    header = {"format_version": 1, "spec": sl.lora(1).to_dict(), "weights": weights}
    write(path, {"0.0.factor0": torch.ones(4, 1)}, header)
    assert_refused(path, "no layer 'layers.0.q'.* and 2980 more")


def test_name_in_use(saved):
    model = make_net()
    slt.load(model, saved)
    assert_refused(saved, "'superlora'.*Adapter", sl.AdapterError, model)


def test_name_that_is_no_identifier(saved):
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="identifier"):
        slt.load(model, saved, name="a.b")


def test_layers_unfit_for_the_file(saved):
    tied = make_net()
    tied.blocks[1].q.weight = tied.blocks[0].q.weight
    assert_refused(saved, "share", model=tied)
    integer = make_net()
    weight = torch.zeros(8, 16, dtype=torch.int8)
    integer.blocks[0].q.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert_refused(
        saved,
        r"'blocks\.0\.q' has no weight of a floating-point type: it is torch\.int8",
        TypeError,
        integer,
    )


HUGE = {
    "groups": ({"groups": 10**9, "fold": "balanced", "alpha": None}, [10**6, 10**6]),
    "splits": ({"splits": 10**12}, [8, 16]),
    "order": ({"order": 10**12, "fold": "balanced"}, [8, 16]),
    "rank": ({"rank": 10**30}, [8, 16]),
    "widths": ({}, [10**30, 10**30]),
    "balanced widths": ({"fold": "balanced", "groups": 1}, [10**30 + 57, 10**30 + 3]),
    "aligned widths": ({"fold": "aligned", "groups": 1}, [10**18 + 9, 10**18 + 9]),
    "fold": ({"fold": [10**18, 10**18]}, [10**18, 10**18]),
    "split widths": ({"splits": 8}, [10**18 + 9, 10**18 + 9]),
    "deep order": ({"order": 16, "splits": 16, "fold": "balanced"}, [10**9, 10**9]),
}
LIMITED = """
import resource, signal, sys
import torch, superlora.torch as slt

def give_up(*_):
    raise TimeoutError("two seconds of processor time")

signal.signal(signal.SIGVTALRM, give_up)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[1:]:
    signal.setitimer(signal.ITIMER_VIRTUAL, 2)
    try:
        slt.load(torch.nn.Linear(8, 8), path)
    except BaseException as error:
        print(type(error).__name__)
    else:
        print("loaded")
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
"""


def test_absurd_numbers_cost_neither_memory_nor_time(tmp_path):
    pytest.importorskip("resource", reason="the system limits no memory")
    for key, (spec, shape) in HUGE.items():
        header = {
            "format_version": 1,
            "spec": {**sl.lora(2).to_dict(), **spec},
            "weights": [["", shape]],
        }
        write(tmp_path / key, {"0.0.factor0": torch.ones(8, 2)}, header)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *(str(tmp_path / key) for key in HUGE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert dict(zip(HUGE, done.stdout.split(), strict=True)) == dict.fromkeys(HUGE, "ValueError")
