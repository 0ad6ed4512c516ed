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
_EXPRESSIONS = (ast.Attribute, ast.Subscript, ast.Name)
_QUESTIONS = frozenset({"getattr", "hasattr", "id", "isinstance", "len", "type"})
_DEPTH = 6


def is_read(module: nn.Module, path: Chain) -> bool:
    """Return whether the forward of a module reads what lies at a path of attributes from it."""
    return any(_matches(chain, path) for chain in _chains(cast(Any, type(module))))


def _matches(chain: Chain, path: Chain) -> bool:
    return len(chain) == len(path) and all(
        own == other or (own == "*" and other not in ("weight", "bias"))
        for own, other in zip(chain, path, strict=True)
    )


@functools.cache
def _chains(kind: Any) -> frozenset[Chain]:
    """Return what the forward of a class reads, of itself and of its parts."""
    found: set[Chain] = set()
    seen: set[Any] = set()
    _follow(kind.forward, kind, {0: ()}, found, seen, 0)
    return frozenset(found)


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
    named = {
        names[k] if isinstance(k, int) else k: c
        for k, c in known.items()
        if not isinstance(k, int) or k < len(names)
    }
    parts = _Parts(dict(named))
    for node in ast.walk(tree):
        parts.assign(node)
    for node, parent in _with_parents(tree):
        chain = parts.chain(node)
        if chain and isinstance(node, _EXPRESSIONS) and not _is_about(node, parent):
            # A list as a whole is read as its items.
            found |= {chain, (*chain, "*")}
            prop = inspect.getattr_static(kind, chain[0], None)
            if len(chain) == 1 and isinstance(prop, property) and prop.fget is not None:
                _follow(prop.fget, kind, {0: ()}, found, seen, depth + 1)
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
        method, first = _method(callee, function, kind, parts)
        shift = {k + first if isinstance(k, int) else k: c for k, c in given.items()}
        if method is not None and not _is_of_module(method):
            _follow(method, kind, {0: (), **shift} if first else shift, found, seen, depth + 1)
        return
    if isinstance(callee, ast.Name) and given:
        other = function.__globals__.get(callee.id)
        if isinstance(other, FunctionType):
            _follow(other, kind, given, found, seen, depth + 1)


def _method(
    callee: ast.Attribute, function: FunctionType, kind: Any, parts: _Parts
) -> tuple[FunctionType | None, int]:
    """Return the method of the module that is called, and whether the module is given to it."""
    value, name = callee.value, callee.attr
    found: Any = None
    if parts.chain(value) == ():
        found = inspect.getattr_static(kind, name, None)
        if isinstance(found, staticmethod):
            return found.__func__, 0  # type: ignore[return-value]
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        if value.func.id == "super":
            owners = [own for own in kind.__mro__ if name in own.__dict__]
            own = [n for n, each in enumerate(owners) if each.__dict__[name] is function]
            found = owners[own[0] + 1].__dict__[name] if own and own[0] + 1 < len(owners) else None
    elif isinstance(value, ast.Name):
        other = function.__globals__.get(value.id)
        if isinstance(other, type) and issubclass(kind, other):  # Base.forward(self, …)
            found = inspect.getattr_static(other, name, None)
            return (found, 0) if isinstance(found, FunctionType) else (None, 0)
    return (found, 1) if isinstance(found, FunctionType) else (None, 1)


def _is_of_module(method: FunctionType) -> bool:
    torch_own = method.__module__.partition(".")[0] == "torch"
    return torch_own and method.__qualname__.startswith("Module.")


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


def _is_about(node: ast.expr, parent: ast.AST | None) -> bool:
    """Return whether an expression is looked at without its numbers, or is a step to another."""
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


def ignores_bias(module: nn.Module) -> bool:
    """Return whether the forward of a class of its own certainly never reads the module's bias."""
    kind: Any = type(module)
    function = inspect.unwrap(kind.forward)
    known = isinstance(function, FunctionType) and _tree(function) is not None
    inherited = any(kind.forward is getattr(own, "forward", None) for own in kind.__mro__[1:])
    called = {chain[-1] for chain in _chains(kind)}
    return known and not inherited and "bias" not in called


def returns_several(module: nn.Module) -> bool:
    """Return whether the forward of a module returns a tuple, by its source."""
    function = inspect.unwrap(type(module).forward)
    tree = _tree(function) if isinstance(function, FunctionType) else None
    if tree is None:
        return False
    returned = [each.value for each in ast.walk(tree) if isinstance(each, ast.Return)]
    return any(isinstance(each, (ast.Tuple, ast.Dict)) for each in returned)
