"""Which weights of its parts a module reads itself, by its source, instead of calling the part."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, cast

from torch import nn

# From the module on, as ("out_proj", "weight"); "*" is any item of a list of modules.
Chain = tuple[str, ...]
# What is asked of a weight without reading its numbers.
_ABOUT = frozenset({"device", "dtype", "layout", "names", "shape"}).union(
    {"dim", "element_size", "ndim", "ndimension", "nelement", "numel", "itemsize", "size"},
    {"is_cpu", "is_cuda", "is_floating_point", "is_meta", "is_quantized", "requires_grad"},
    {"stride", "untyped_storage"},
)
_QUESTIONS = frozenset({"getattr", "hasattr", "id", "isinstance", "len", "type"})
_LEAST, _DEPTH = 2, 6


def is_read(module: nn.Module, path: Chain) -> bool:
    """Return whether the forward of a module reads what lies at a path of attributes from it."""
    return any(_matches(chain, path) for chain in _chains(cast(Any, type(module))))


def _matches(chain: Chain, path: Chain) -> bool:
    return len(chain) == len(path) and all(
        own in ("*", other) for own, other in zip(chain, path, strict=True)
    )


@functools.cache
def _chains(kind: Any) -> frozenset[Chain]:
    """Return what the forward of a class reads, of itself and of its parts."""
    found: set[Chain] = set()
    seen: set[Any] = set()
    _follow(kind.forward, kind, {0: ()}, found, seen, 0)
    return frozenset(chain for chain in found if len(chain) >= _LEAST)


def _follow(
    function: Callable[..., Any],
    kind: Any,
    known: Mapping[int | str, Chain],
    found: set[Chain],
    seen: set[Any],
    depth: int,
) -> None:
    """Add what a function reads, whose arguments at some places are known parts of a module."""
    function = inspect.unwrap(function)
    key = (function, frozenset(known.items()))
    if depth > _DEPTH or key in seen or not isinstance(function, FunctionType):
        return
    seen.add(key)
    tree = _tree(function)
    if tree is None:
        return
    names = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args)]
    named = {names[k] if isinstance(k, int) else k: c for k, c in known.items() if k != len(names)}
    parts = _Parts(dict(named))
    for node in ast.walk(tree):
        parts.assign(node)
    for node, parent in _with_parents(tree):
        chain = parts.chain(node)
        if chain is not None and isinstance(node, ast.Attribute) and not _is_about(node, parent):
            found.add(chain)
        if isinstance(node, ast.Call):
            _follow_call(node, function, kind, parts, found, seen, depth)


def _follow_call(
    call: ast.Call,
    function: FunctionType,
    kind: Any,
    parts: _Parts,
    found: set[Chain],
    seen: set[Any],
    depth: int,
) -> None:
    given: dict[int | str, Chain] = {}
    for index, argument in enumerate(call.args):
        chain = parts.chain(argument)
        if chain is not None:
            given[index] = chain
    for keyword in call.keywords:
        chain = parts.chain(keyword.value)
        if keyword.arg is not None and chain is not None:
            given[keyword.arg] = chain
    callee = call.func
    if isinstance(callee, ast.Attribute):
        owner = parts.chain(callee.value)
        method = inspect.getattr_static(kind, callee.attr, None)
        if owner == () and isinstance(method, FunctionType):  # a method of the module itself
            if method.__module__.partition(".")[0] == "torch" and method.__qualname__.startswith(
                "Module."
            ):
                return
            shifted = {k + 1 if isinstance(k, int) else k: c for k, c in given.items()}
            _follow(method, kind, {0: (), **shifted}, found, seen, depth + 1)
        return
    if isinstance(callee, ast.Name) and given:
        other = function.__globals__.get(callee.id)
        if isinstance(other, FunctionType):
            _follow(other, kind, given, found, seen, depth + 1)


class _Parts:
    """Which expressions of a function are parts of a module, and which."""

    def __init__(self, names: dict[Any, Chain]) -> None:
        self.names = names

    def assign(self, node: ast.AST) -> None:
        """Note a name that is given a part."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._name(node.targets[0], self.chain(node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            held = self.chain(node.iter)
            self._name(node.target, None if held is None else (*held, "*"))

    def _name(self, target: ast.expr, chain: Chain | None) -> None:
        if isinstance(target, ast.Name) and chain is not None:
            self.names.setdefault(target.id, chain)

    def chain(self, node: ast.AST) -> Chain | None:
        """Return the attributes that lead from the module to a part."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.chain(node.value)
            return None if owner is None else (*owner, node.attr)
        if isinstance(node, ast.Subscript):
            owner = self.chain(node.value)
            return None if owner is None else (*owner, "*")
        return None


def _is_about(node: ast.Attribute, parent: ast.AST | None) -> bool:
    """Return whether an attribute is looked at without its numbers, or is a step to another."""
    if isinstance(parent, ast.Attribute):
        # `weight.t()` reads the weight, `weight.dtype` does not, `self.part.weight` reads a part.
        return parent.attr in _ABOUT
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in _QUESTIONS
    if isinstance(parent, ast.Compare):
        return all(isinstance(each, (ast.Is, ast.IsNot)) for each in parent.ops)
    return isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))


def _with_parents(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    rest: list[tuple[ast.AST, ast.AST | None]] = [(tree, None)]
    while rest:
        node, parent = rest.pop()
        yield node, parent
        rest += [(child, node) for child in ast.iter_child_nodes(node)]


@functools.lru_cache(maxsize=4096)
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    """Return a function's source as a tree; None where there is none."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        (tree,) = ast.parse(source).body
    except Exception:  # of whatever stands in for a file that is not there
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def returns_several(module: nn.Module) -> bool:
    """Return whether the forward of a module returns a tuple, by its source."""
    function = inspect.unwrap(type(module).forward)
    tree = _tree(function) if isinstance(function, FunctionType) else None
    if tree is None:
        return False
    returned = [each.value for each in ast.walk(tree) if isinstance(each, ast.Return)]
    return any(isinstance(each, (ast.Tuple, ast.Dict)) for each in returned)
