"""What work takes on a device, measured once a process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import torch
from torch._guards import detect_fake_mode

from superlora.costs import Machine
from superlora.torch.formed import without_autocast

# Of the products and passes that are timed: as large as those of a layer.
_WIDTH, _TOKENS = 768, 256
# Too many for a cache.
_ENTRIES = 1 << 22
_REPEATS = 9
_WARM = 2

_known: dict[str, Machine] = {}
_lock = threading.Lock()
_PLAIN = Machine()


def machine_of(device: torch.device) -> Machine:
    """Return what work takes on a device, measured or, before `calibrate`, as is usual.

    Parameters
    ----------
    device : torch.device
        The device; all of one type count as alike.

    Returns
    -------
    Machine
        What the cost model needs.
    """
    return _known.get(device.type, _PLAIN)


def calibrate(device: torch.device | str = "cpu", *, again: bool = False) -> Machine:
    """Measure how fast a device multiplies, moves numbers and begins an operation.

    `attach` and `load` do it for the devices of the layers, in some milliseconds, once a
    process; under ``torch.use_deterministic_algorithms(True)`` they do not, and usual
    figures decide which way an update is applied.

    Parameters
    ----------
    device : torch.device or str
        The device.
    again : bool
        Whether to measure what was measured before.

    Returns
    -------
    Machine
        Rounded to powers of two, so that noise seldom changes how an update is applied.

    Raises
    ------
    ValueError
        If there is no such device, or it is the meta device, on which nothing takes time.

    Examples
    --------
    >>> import superlora.torch as slt
    >>> machine = slt.calibrate("cpu")
    >>> 0 < machine.multiply < machine.call
    True
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch has: got {device!r}") from error
    if device.type == "meta":
        raise ValueError("device must have memory to be measured: got 'meta'")
    with _lock:
        if again or device.type not in _known:
            with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
                _known[device.type] = _measured(device)
        return _known[device.type]


def calibrate_once(device: torch.device) -> None:
    """Measure a device that was not measured before, unless results must not depend on it."""
    if device.type == "meta" or device.type in _known or detect_fake_mode() is not None:
        return
    if not torch.are_deterministic_algorithms_enabled():
        calibrate(device)


def _measured(device: torch.device) -> Machine:
    # Of no default dtype or device, and without random numbers: those are the user's.
    options = {"dtype": torch.float32, "device": device}
    x = torch.ones((_TOKENS, _WIDTH), **options)  # type: ignore[call-overload]
    weight = torch.ones((_WIDTH, _WIDTH), **options)  # type: ignore[call-overload]
    small = torch.ones((8, 8), **options)  # type: ignore[call-overload]
    passed = torch.ones(_ENTRIES, **options)  # type: ignore[call-overload]
    target = torch.empty_like(passed)
    call = _seconds(device, lambda: torch.mm(small, small))
    product = _seconds(device, lambda: torch.mm(x, weight))
    sweep = _seconds(device, lambda: torch.add(passed, passed, out=target))
    return Machine(
        multiply=_rounded(max(product - call, call / 8) / (_TOKENS * _WIDTH * _WIDTH)),
        move=_rounded(max(sweep - call, call / 8) / (2 * _ENTRIES)),
        call=_rounded(call),
    )


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    found = []
    for _ in range(_WARM + _REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found[_WARM:])  # what others do on the machine only adds


def _wait(device: torch.device) -> None:
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)


def _rounded(seconds: float) -> float:
    return 2.0 ** round(math.log2(max(seconds, 1e-15)))
