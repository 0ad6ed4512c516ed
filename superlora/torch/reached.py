"""Whether adapted layers are what they were, take part in the forward pass, and can be merged."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves

from superlora.design.spec_checks import check_choice
from superlora.errors import AdapterError, some
from superlora.torch.autograd import is_traced
from superlora.torch.memory import Owners
from superlora.torch.offload import is_offloaded, keep_in_memory
from superlora.torch.placed import FAST, INSIDE
from superlora.torch.sharded import check_gathers, is_running, refuse_copy, refuse_plans
from superlora.torch.site import Reader, Site, holders_of
from superlora.torch.targets import FUSED, fused_into
from superlora.torch.walk import outside_adapters, submodule

# Of architectures whose configurations say which layers have a bias.
_FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "bias")


# By thread: the first pass of a model that is under way, and the frame that began it.
_OPEN: dict[int, tuple[_Reads, FrameType]] = {}
_NONE = (None, None)
# By thread: the models whose passes are under way and the frames that began them, and what holds
# up new ones.
_RUNNING: dict[int, list[tuple[ChangeWatch, FrameType]]] = {}
_CHANGING = threading.RLock()


class ChangeWatch:
    """A hook on a model that warns of layers that are not what they were when adapted.

    One for all adapters of the model, however many.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = (model,)
        self.names: dict[Site, str] = {}
        self._held: dict[Any, Mapping[Site, str]] = {}  # by adapter
        self._warned: set[str] = set()
        self._unseen: set[Site] = set()  # of no pass so far
        self._parents: dict[Site, nn.Module] = {}
        self._handles = [
            model.register_forward_pre_hook(self.see),
            model.register_forward_hook(self.end, always_call=True),
        ]

    @classmethod
    def on(
        cls,
        model: nn.Module,
        adapter: Any,
        sites: Mapping[Site, str],
        parents: Mapping[Site, nn.Module],
    ) -> ChangeWatch:
        """Watch the layers of one more adapter, by their names and the modules around."""
        close_interrupted()
        held = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        watch = next((each for each in held if isinstance(each, cls)), None) or cls(model)
        watch._held[adapter] = sites
        watch.names |= sites
        watch._parents |= parents
        watch._warned -= set(sites.values())
        watch._unseen |= {site for site in sites if not site.seen}
        return watch

    def drop(self, adapter: Any) -> None:
        """Watch no layer of an adapter alone; without any the hook is gone."""
        del self._held[adapter]
        self.names = {site: name for own in self._held.values() for site, name in own.items()}
        self._unseen &= set(self.names)
        self._parents = {site: own for site, own in self._parents.items() if site in self.names}
        if not self.names:
            for handle in self._handles:
                handle.remove()

    def changes(self, adapter: Any = None) -> dict[str, str]:
        """Return what was done to the layers of an adapter, or of all, by name."""
        found = {}
        for site, name in (self.names if adapter is None else self._held[adapter]).items():
            now = submodule(self.model[0], name)
            above, _, leaf = name.rpartition(".")
            if now is site.module and site.is_intact and leaf not in FUSED:
                continue
            if now is not site.module:
                kind = "nothing" if now is None else f"another {type(now).__name__}"
                found[name] = f"there is {kind} in its place"
            else:
                fused = fused_into(submodule(self.model[0], above), leaf)
                what = f"it was fused into {fused!r}" if fused else site.changed_since()
                found |= {name: what} if what else {}
        return found

    def see(self, module: nn.Module, *_: Any) -> None:
        """Warn of each changed layer once, and begin to look at what the first pass reads."""
        if torch.compiler.is_compiling() or is_traced() or _is_tracing():
            return
        with _CHANGING:  # once nobody changes weights
            running = _RUNNING.setdefault(threading.get_ident(), [])
            running[:] = [each for each in running if _is_under_way(each[1], sys._getframe())]
            running.append((self, sys._getframe(1)))
        refuse_copy(module)
        for adapter in self._held:  # without a call, since there may be hundreds
            first = adapter.blocks.first
            if first.owner._parameters[first.leaf].is_meta:
                keep_in_memory(adapter)
        if is_running():
            for adapter in self._held:
                check_gathers(adapter)
            refuse_plans((n, s.module, s.held.parameter) for s, n in self.names.items())
        found = self.changes()
        new = {name: what for name, what in found.items() if name not in self._warned}
        if new:
            self._warned |= set(new)
            warnings.warn(
                f"adapters have no effect where layers were changed since: {listed(new)}; detach "
                "and attach them again",
                stacklevel=2,
            )
        close_interrupted()
        thread = threading.get_ident()
        if self._unseen and thread not in _OPEN and not _is_compiled(self.model[0]):
            reads = _Reads(self, self._unseen)
            _OPEN[thread] = reads, sys._getframe(1)
            reads.begin(watched=not _takes_other_kernels(self.model[0]))

    def end(self, module: nn.Module, *_: Any) -> None:
        """Warn of weights that the pass read outside of their layers."""
        if torch.compiler.is_compiling():
            return
        running = _RUNNING.get(threading.get_ident(), [])
        own = [place for place, (watch, _) in enumerate(running) if watch is self]
        del running[own[-1] if own else len(running) :]  # an interrupt runs no hook of inner passes
        reads = _OPEN.get(threading.get_ident(), _NONE)[0]
        if reads is None or reads.watch is not self:
            return
        _close(reads)
        passed = self._passed_over(reads.ran)
        if passed:
            warnings.warn(
                f"the update of {some(map(repr, passed))} had no effect: the module around, a "
                f"{type(self._parents[next(iter(passed.values()))]).__name__}, ran without calling "
                "the layer; it may read the layer's weight itself",
                stacklevel=2,
            )
        # What stands in for a layer's forward may be anything.
        found = [site for site in reads.found if site in self.names and site.stands]
        for site in found:
            site.missed = True
        # Those that did not run either have been warned of.
        new = [self.names[site] for site in found if site.reached is not False]
        if new:
            warnings.warn(
                f"the weights of {some(map(repr, new))} are read in the forward pass of "
                f"{type(module).__name__} outside of their layers, without the updates: these are "
                "missing there, and a merge would change the output",
                stacklevel=2,
            )

    def _passed_over(self, ran: Container[int]) -> dict[str, Site]:
        """Note which layers did not run while the module that has them did."""
        found = {}
        for site in self._unseen:
            site.seen = True
            parent = self._parents.get(site)
            if site.reached is None and site.stands and id(parent) in ran:
                site.reached = False
                found[self.names[site]] = site
        self._unseen.clear()
        return found


@contextmanager
def changing(watch: ChangeWatch | None, verb: str) -> Iterator[None]:
    """Let no other thread begin a pass of a model, or refuse where one is under way."""
    with _CHANGING:
        tops = sys._current_frames()
        del tops[threading.get_ident()]
        if any(
            other is watch and _is_under_way(begun, top)
            for thread, top in tops.items()
            for other, begun in tuple(_RUNNING.get(thread, ()))
        ):
            raise AdapterError(
                f"an adapter must not be {verb} while another thread runs a forward pass of its "
                "model, which would read some layers with the update and some without"
            )
        yield


def _close(reads: _Reads) -> None:
    del _OPEN[threading.get_ident()]
    reads.end()


def close_interrupted() -> None:
    """End a first pass that a keyboard interrupt has ended, which runs no hook."""
    reads, begun = _OPEN.get(threading.get_ident(), _NONE)
    if reads is not None and begun is not None and not _is_under_way(begun, sys._getframe()):
        _close(reads)


def _is_under_way(begun: FrameType, top: FrameType | None) -> bool:
    """Return whether a frame is still on the stack of which another is the top."""
    while top is not None and top is not begun:
        top = top.f_back
    return top is begun


class _Reads(TorchFunctionMode):
    """Sees which operations read adapted weights while none of their own forwards runs."""

    def __init__(self, watch: ChangeWatch, sites: Iterable[Site]) -> None:
        super().__init__()
        self.watch = watch
        self.found: dict[Site, None] = {}
        self.ran: set[int] = set()  # identities of modules
        self._owners: dict[int, list[Site]] = {}
        for site in sites:
            # An offloaded weight is replaced in each pass, and its memory may become another's.
            away = not site.held.summable or is_offloaded(site.module, site.held.parameter)
            memory = None if away else _storage(site.held.parameter)
            if memory is not None:
                self._owners.setdefault(memory, []).append(site)

    def begin(self, watched: bool) -> None:
        """Note modules that run from now on, and operations where that changes none of them."""
        self._thread, self._watched = threading.get_ident(), watched
        self._hook = register_module_forward_hook(self._note)
        if watched:
            INSIDE[self._thread] = []
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Note no more."""
        self._hook.remove()
        if self._watched:
            del INSIDE[self._thread]
            if _get_current_function_mode() is self:
                self.__exit__(None, None, None)

    def _note(self, module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self.ran.add(id(module))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note the weights that it reads."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        hits = [(each, _storage(each)) for each in given]
        hits = [(each, memory) for each, memory in hits if memory in self._owners]
        if hits:
            # What gives no tensor, such as a shape, reads no number.
            made = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
            hits = hits if made else []
            views = {_storage(each) for each in made}
            inside = {id(each.held.parameter) for each in INSIDE.get(threading.get_ident(), ())}
            for each, memory in hits:
                # A view reads no number, nor does a move to another device.
                moved = any(other.device != each.device for other in made)
                owners = self._owners[memory]  # type: ignore[index]
                if (
                    memory in views
                    or moved
                    or any(id(own.held.parameter) in inside for own in owners)
                ):
                    continue
                self.found |= dict.fromkeys(owners)
        return found


def _is_tracing() -> bool:
    return torch._C._get_tracing_state() is not None  # of torch.jit.trace


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):
        return None


def _is_compiled(model: nn.Module) -> bool:
    """Return whether a part of a model is compiled, and would be again after it was watched."""
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )


def _takes_other_kernels(model: nn.Module) -> bool:
    """Return whether attention of torch, which no reader stands in for, would compute otherwise."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FAST) and module not in inside:
            if not any(isinstance(each, Reader) for each in holders_of(module)):
                return True
            inside |= set(module.modules())
    return False


def listed(changes: Mapping[str, str]) -> str:
    """Return what was changed for a message."""
    return some(f"{name!r}: {what}" for name, what in changes.items())


def check_mergeable(
    adapter: Any,
    model: nn.Module,
    sites: Mapping[str, Site],
    twins: Sequence[Site],
    unreached: str,
    bias: str,
) -> None:
    """Refuse to merge where the merged model would not be the adapted one, or could not be."""
    check_choice("unreached", unreached, ("refuse", "merge"))
    check_choice("bias", bias, ("warn", "refuse", "ignore"))
    quantised = [name for name, site in sites.items() if not site.held.summable]
    if quantised:
        raise AdapterError(
            "weights must not be quantised to be merged, since they would be rounded: "
            f"{some(map(repr, quantised))} are"
        )
    missed = [name for name, site in sites.items() if site.missed or site.reached is False]
    if missed and unreached == "refuse":
        raise AdapterError(
            f"layers must take part in the forward pass to be merged: {some(map(repr, missed))} "
            "did not run when the module around did, or their weights were read without the "
            "update, so that merging would change the output; merge(unreached='merge') merges "
            "nevertheless"
        )
    owners = Owners(dict(outside_adapters(model)))
    known = {(site.module, site.held.key) for site in (*sites.values(), *twins)}
    by_name = dict(outside_adapters(model))
    for name, site in sites.items():
        others = []
        for other in owners.others(site.module, site.held.key):
            path, _, key = other.rpartition(".")
            if (by_name[path], key) not in known or not twins:
                others.append(other)
        if others:
            raise AdapterError(
                f"a weight must not be shared to be merged: that of {name!r} lies in the memory "
                f"of {some(map(repr, others))} since it was attached"
            )
    gained = adapter.gains_bias
    if gained and bias != "ignore":
        message = (
            f"{some(map(repr, gained))} gain a bias by the merge{_flags_of(model)}; to save the "
            "adapter itself loses nothing"
        )
        if bias == "refuse":
            raise AdapterError(message)
        if hasattr(model, "from_pretrained"):
            warnings.warn(f"{message}; merge(bias='ignore') says nothing", stacklevel=3)


def _flags_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    flags = [flag for flag in _FLAGS if getattr(config, flag, None) is False]
    if not hasattr(model, "from_pretrained"):
        return ""
    rest = f", but where the configuration says so: {some(f'config.{f}' for f in flags)}"
    return ", which from_pretrained drops" + rest * bool(flags)


def check_not_wrapped(adapter: str, sites: Sequence[Site]) -> None:
    """Refuse to take an adapter away below another library's wrapper, which would still call it."""
    for site in sites:
        own: list[Site | Reader] = [*site.readers]
        for holder in own if site.held.kind == "parameter" else [site, *own]:
            forward = holder.module.__dict__.get("forward")
            lost = forward is None or getattr(forward, "__self__", None) is holder.module
            if not lost and holder not in holders_of(holder.module):
                raise AdapterError(
                    f"adapter {adapter!r} cannot be detached while the forward of "
                    f"{next(iter(site.links.values())).name!r} is wrapped by something attached "
                    "later: remove that first"
                )
