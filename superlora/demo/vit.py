"""A vision transformer in plain torch, with weights read from an ONNX file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What stands for each part of a name in the ONNX file.
OUR_NAMES = {
    "backbone.": "",
    "embeddings.patch_embeddings.projection": "patch",
    "embeddings.cls_token": "class_token",
    "encoder.layer.": "blocks.",
    "attention.attention.": "",
    "attention.output.dense": "proj",
    "mlp.": "",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
    "layernorm": "norm",
}


class Block(nn.Module):
    """One pre-norm transformer block whose two branches are scaled per channel."""

    def __init__(self, width: int, heads: int, hidden: int, *, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = ("qkv",) if fused else ("query", "key", "value")
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        for name in self.inputs:
            setattr(self, name, nn.Linear(width, 3 * width // len(self.inputs)))
        self.proj = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, tokens, width) to tokens of the same shape."""
        tokens = tokens + self.scale1 * self.attend(self.norm1(tokens))
        hidden = F.gelu(self.fc1(self.norm2(tokens)))
        out: Tensor = tokens + self.scale2 * self.fc2(hidden)
        return out

    def attend(self, tokens: Tensor) -> Tensor:
        """Return multi-head self-attention, of the tokens' shape."""
        made = [getattr(self, name)(tokens) for name in self.inputs]
        parts = [part for own in made for part in own.chunk(3 // len(made), dim=-1)]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return out


class VisionTransformer(nn.Module):
    """A vision transformer without a head; `grid` is the side of its position embedding."""

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
        self.width, self.grid = width, grid
        self.sizes = (width, depth, heads, hidden, patch, grid)
        self.patch = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_position = nn.Parameter(torch.zeros(1, grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, fused=fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to the class token (batch, width) after the norm."""
        patches = self.patch(images)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        first = (self.class_token + self.class_position).expand(len(images), -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, 0])  # the norm is per token: one is enough
        return features

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding of so many patches, (1, rows * columns, width)."""
        square = self.patch_position.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


def load_onnx(data: bytes, *, heads: int = 6) -> VisionTransformer:
    """Return the frozen transformer of a DINOv2-style ONNX file, which tells all but its heads."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    weights = {_our_name(name): stored[name] for name in stored if name.startswith("backbone.")}
    anonymous = {name for name in stored if name.startswith("onnx::")}
    for node in graph.node:  # which alone says what they are
        place = _our_name(node.name.strip("/").replace("/", ".")).rpartition(".")[0]
        for tensor in (stored[name] for name in node.input if name in anonymous):
            if node.op_type == "MatMul":
                weights[f"{place}.weight"] = tensor.t()
            elif place == "embeddings":
                part = "class" if node.op_type == "Concat" else "patch"
                weights[f"{part}_position"] = tensor
    width, _, patch, _ = weights["patch.weight"].shape
    depth = sum(name.endswith(".norm1.weight") for name in weights)
    hidden = len(weights["blocks.0.fc1.weight"])
    grid = round(weights["patch_position"].shape[1] ** 0.5)
    model = VisionTransformer(width, depth, heads, hidden, patch, grid)
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def _our_name(name: str) -> str:
    for theirs, ours in OUR_NAMES.items():
        name = name.replace(theirs, ours)
    return name
