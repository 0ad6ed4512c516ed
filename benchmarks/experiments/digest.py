"""Digests of code and data: what is kept is found again by what it depends on."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


def code_digest(files: Iterable[Path]) -> str:
    """Return a digest of Python files, without their comments and docstrings."""
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def content_digest(settings: Any, *tensors: Tensor) -> str:
    """Return a digest of settings, as JSON writes them, and of tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
