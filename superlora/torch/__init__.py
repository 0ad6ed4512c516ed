"""The torch binding: factors become trainable parameters of any model."""

from superlora.torch.adapter import Adapter
from superlora.torch.attach import attach
from superlora.torch.state import load

__all__ = ["Adapter", "attach", "load"]
