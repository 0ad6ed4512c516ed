"""A vision transformer in plain torch, with weights read from an ONNX file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LINEAR_LAYERS = {
    "query": "attention/attention/query",
    "key": "attention/attention/key",
    "value": "attention/attention/value",
    "proj": "attention/output/dense",
    "fc1": "mlp/fc1",
    "fc2": "mlp/fc2",
}
"""Linear layers of a block: our name, and where the exporter's graph has them."""


class Block(nn.Module):
    """One pre-norm transformer block whose two branches are scaled per channel.

    Parameters
    ----------
    width : int
        Channels D.
    heads : int
        Attention heads; a divisor of `width`.
    hidden : int
        Channels inside the MLP.
    fused : bool
        Whether query, key and value are one layer ``qkv``, in this order.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, fused: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.fused = fused
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, tokens, D) to tokens of the same shape."""
        tokens = tokens + self.scale1 * self.attend(self.norm1(tokens))
        hidden = F.gelu(self.fc1(self.norm2(tokens)))
        out: Tensor = tokens + self.scale2 * self.fc2(hidden)
        return out

    def attend(self, tokens: Tensor) -> Tensor:
        """Multi-head self-attention, (batch, tokens, D) to the same shape."""
        if self.fused:
            parts = self.qkv(tokens).chunk(3, dim=-1)
        else:
            parts = tuple(layer(tokens) for layer in (self.query, self.key, self.value))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return out


class VisionTransformer(nn.Module):
    """A vision transformer without a head.

    Parameters
    ----------
    width : int
        Channels D of a token.
    depth : int
        Blocks.
    heads : int
        Attention heads a block.
    hidden : int
        Channels inside a block's MLP.
    patch : int
        Side of a square patch, in pixels.
    grid : int
        Patches a side for which the position embedding is stored; it is interpolated to others.
    fused : bool
        Whether query, key and value of a block are one layer.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        hidden: int = 1536,
        patch: int = 14,
        grid: int = 37,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self._sizes = (width, depth, heads, hidden, patch, grid)
        self.patch = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_position = nn.Parameter(torch.zeros(1, grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, fused=fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to one feature vector each.

        Parameters
        ----------
        images : Tensor, shape (batch, 3, height, width)
            Normalised; height and width are cut down to whole patches.

        Returns
        -------
        Tensor, shape (batch, D)
            The class token after the last norm.
        """
        patches = self.patch(images)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        first = (self.class_token + self.class_position).expand(len(images), -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, 0])  # the norm is per token: one is enough
        return features

    def fuse(self) -> VisionTransformer:
        """Return the same transformer with query, key and value of a block in one layer.

        Returns
        -------
        VisionTransformer
            A new one, frozen, in eval mode, on this one's device and of its dtype.
        """
        weights = self.state_dict()
        for index in range(len(self.blocks)):
            for kind in ("weight", "bias"):
                names = [f"blocks.{index}.{layer}.{kind}" for layer in ("query", "key", "value")]
                joined = torch.cat([weights.pop(name) for name in names])
                weights[f"blocks.{index}.qkv.{kind}"] = joined
        model = VisionTransformer(*self._sizes, fused=True).to(self.class_token)
        model.load_state_dict(weights)
        return model.requires_grad_(False).eval()

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding of `rows` x `columns` patches, shape (1, rows * columns, D)."""
        square = self.patch_position.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


def load_onnx(data: bytes, *, heads: int = 6) -> VisionTransformer:
    """Build the transformer that an ONNX file of a DINOv2-style backbone holds.

    Sizes are read from the file. Exported linear weights have no name of their own and are
    transposed; the name is that of the MatMul node that uses them.

    Parameters
    ----------
    data : bytes
        The ONNX file.
    heads : int
        Attention heads, which the weights don't tell.

    Returns
    -------
    VisionTransformer
        float32, on the CPU, in eval mode, no parameter requires a gradient.

    Raises
    ------
    ValueError
        If the file lacks a weight, or has it in another shape.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    for node in graph.node:  # give the anonymous weights their place's name
        if node.op_type in ("MatMul", "Concat", "Reshape"):
            anonymous = [name for name in node.input if name in stored]
            place = node.name.removeprefix("/backbone/").rpartition("/")[0]
            for name in anonymous:
                stored.setdefault(f"{node.op_type} {place}", stored[name])
    weights = {name: _find(stored, source) for name, source in _sources(stored).items()}
    weights = {
        name: tensor.t() if _is_linear_weight(name) else tensor for name, tensor in weights.items()
    }
    width, _, patch, _ = weights["patch.weight"].shape
    model = VisionTransformer(
        width=width,
        depth=_depth(stored),
        heads=heads,
        hidden=weights["blocks.0.fc1.weight"].shape[0],
        patch=patch,
        grid=round(weights["patch_position"].shape[1] ** 0.5),
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"data: the ONNX file is not a DINOv2-style backbone: {error}") from error
    return model.requires_grad_(False).eval()


def _sources(stored: dict[str, Tensor]) -> dict[str, str]:
    """Our name of every parameter, and the file's."""
    sources = {
        "patch.weight": "backbone.embeddings.patch_embeddings.projection.weight",
        "patch.bias": "backbone.embeddings.patch_embeddings.projection.bias",
        "class_token": "backbone.embeddings.cls_token",
        "class_position": "Concat embeddings",
        "patch_position": "Reshape embeddings",
        "norm.weight": "backbone.layernorm.weight",
        "norm.bias": "backbone.layernorm.bias",
    }
    for index in range(_depth(stored)):
        ours, theirs = f"blocks.{index}", f"encoder/layer.{index}"
        dotted = f"backbone.{theirs.replace('/', '.')}"
        for side in (1, 2):
            sources[f"{ours}.norm{side}.weight"] = f"{dotted}.norm{side}.weight"
            sources[f"{ours}.norm{side}.bias"] = f"{dotted}.norm{side}.bias"
            sources[f"{ours}.scale{side}"] = f"{dotted}.layer_scale{side}.lambda1"
        for layer, place in LINEAR_LAYERS.items():
            sources[f"{ours}.{layer}.weight"] = f"MatMul {theirs}/{place}"
            sources[f"{ours}.{layer}.bias"] = f"{dotted}.{place.replace('/', '.')}.bias"
    return sources


def _depth(stored: dict[str, Tensor]) -> int:
    return sum(name.endswith(".norm1.weight") for name in stored)


def _is_linear_weight(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR_LAYERS


def _find(stored: dict[str, Tensor], source: str) -> Tensor:
    if source not in stored:
        raise ValueError(f"data: the ONNX file must hold {source!r}; it has no such weight")
    return stored[source]
