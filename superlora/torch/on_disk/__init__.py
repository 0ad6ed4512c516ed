"""Checkpoints and adapters as files: read and written a tensor at a time, without a model."""

from superlora.torch.on_disk.adapters import inspect_adapter
from superlora.torch.on_disk.compare import average_files, diff_files
from superlora.torch.on_disk.fitting import convert_files, extract_files, resize_files
from superlora.torch.on_disk.merge import merge_files
from superlora.torch.on_disk.planning import plan_checkpoint

__all__ = [
    "average_files",
    "convert_files",
    "diff_files",
    "extract_files",
    "inspect_adapter",
    "merge_files",
    "plan_checkpoint",
    "resize_files",
]
