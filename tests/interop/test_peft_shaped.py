"""Convolutions and embeddings as PEFT's LoRA: PEFT computes what the adapter computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import fill, seeded

peft = pytest.importorskip("peft")


class Words(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.convolution = nn.Conv1d(6, 8, 3, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.convolution(self.embedding(x).mT).mT)


@pytest.mark.parametrize("spec", [sl.lora(2, alpha=5), sl.lokr(2, scale=0.7)], ids=["lora", "lokr"])
def test_peft_computes_alike(spec, tmp_path):
    with seeded(0):
        model = Words()
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    adapter = fill(slt.attach(copy.deepcopy(model), spec, ["embedding", "convolution", "out"]))
    y = adapter.model(x)
    export = adapter.to_peft(tmp_path / "peft", rank=8)
    assert all(error < 1e-6 for error in export.errors.values())
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 4, 3), nn.LayerNorm(4)]
)
def test_what_peft_lacks_is_refused(layer, tmp_path):
    adapter = slt.attach(nn.Sequential(layer), sl.dense(), ["0"])
    with pytest.raises(ValueError, match=rf"'0' of type {type(layer).__name__}"):
        adapter.to_peft(tmp_path, rank=2)


def test_tied_once_says_nothing_of_weights_of_their_own(tmp_path):
    adapter = slt.attach(nn.Sequential(nn.Linear(4, 4)), sl.lora(2), tied="once")
    assert set(adapter.to_peft(tmp_path).methods) == {"0"}
