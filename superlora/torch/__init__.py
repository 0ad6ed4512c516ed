"""The torch binding: factors become trainable parameters of any model."""

from superlora.torch.adapter import Adapter
from superlora.torch.attach import attach
from superlora.torch.combine import combine
from superlora.torch.files.load import load
from superlora.torch.interop import Export as Export
from superlora.torch.interop.from_lycoris import from_lycoris
from superlora.torch.interop.from_peft import from_peft
from superlora.torch.row_wise import rows
from superlora.torch.sensitivity import mean_gradients, sensitivity

__all__ = [
    "Adapter",
    "attach",
    "combine",
    "from_lycoris",
    "from_peft",
    "load",
    "mean_gradients",
    "rows",
    "sensitivity",
]
