"""The transformer with query, key and value in one layer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from superlora.demo.vit import VisionTransformer  # noqa: E402
from tests.demo.search_cases import make_base  # noqa: E402


def test_fusing_joins_the_weights_and_leaves_the_outputs() -> None:
    base = make_base().double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fused = base.fuse()
    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(fused(images), base(images), rtol=1e-13, atol=1e-13)
    for index, block in enumerate(fused.blocks):
        for kind in ("weight", "bias"):
            joined = [
                before[f"blocks.{index}.{layer}.{kind}"] for layer in ("query", "key", "value")
            ]
            assert torch.equal(getattr(block.qkv, kind), torch.cat(joined))
    assert not fused.training
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_fused_block_has_four_linear_layers() -> None:
    fused = make_base().fuse()
    names = [
        name.rpartition(".")[2]
        for name, module in fused.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert names == ["qkv", "proj", "fc1", "fc2"] * 2
    assert not any("query" in name for name in fused.state_dict())


def test_the_fused_weights_are_copies() -> None:
    base = make_base()
    fused = base.fuse()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert all(bool(parameter.any()) for parameter in base.parameters())


def test_sizes_are_kept() -> None:
    base = VisionTransformer(width=8, depth=3, heads=4, hidden=12, patch=7, grid=3)
    fused = base.fuse()
    assert [block.heads for block in fused.blocks] == [4, 4, 4]
    images = torch.randn(2, 3, 21, 14)
    torch.testing.assert_close(fused(images), base(images))
