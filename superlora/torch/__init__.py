"""The torch binding: factors become trainable parameters of any model."""

from superlora.torch.adapter import Adapter
from superlora.torch.attach import attach
from superlora.torch.lycoris import from_lycoris
from superlora.torch.peers import Export
from superlora.torch.peft import from_peft
from superlora.torch.row_wise import rows
from superlora.torch.state import load

__all__ = ["Adapter", "Export", "attach", "from_lycoris", "from_peft", "load", "rows"]
