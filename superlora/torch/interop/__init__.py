"""The formats of PEFT and LyCORIS."""

from superlora.torch.interop.formats import Export

__all__ = ["Export"]
