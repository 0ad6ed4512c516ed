"""Every preset, forward and backward, on a device that does not exist; run in a process of its own.

Tensors are fake: they have a device, a shape and a dtype, and an operation of tensors on two
devices raises. So nothing of an adapter stays on the CPU.
"""

import os
import sys
import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import superlora as sl
import superlora.torch as slt

DEVICE = "fakegpu"


def specs():
    """Yield every preset that reads no weight's values, set to fit four 16 x 16 weights."""
    sizes = {
        "c3a": {"block": 4},
        "cdka": {"rows": 2, "columns": 4},
        "did": {"size": 5},
        "fourierft": {"size": 10},
        "gralora": {"rank": 4},
        "lorta_cp": {"rank": 2, "fold": (2, 2, 4, 4, 16)},
        "miss": {"rank": 4},
        "nola": {"size": 5},
        "tenslora": {"rank": 2, "fold": (2, 2, 16, 16)},
        "unilora": {"size": 8},
        "waveft": {"size": 10},
    }
    # Two read the weights' values. One keeps a tensor of one number, which has a value in torch's
    # fake mode too, and is moved to the device in earnest.
    left_out = {"lora_xs", "tinylora", "said"}
    for name in sl.presets.__all__:
        if name not in left_out:
            yield name, getattr(sl, name)(**sizes.get(name, {}))
    balanced = {"rank": 2, "groups": 1, "fold": "balanced"}
    yield "2-D balanced", sl.Spec(**balanced)
    for fixed in (sl.maps.OneHot(), sl.maps.Fastfood(), sl.maps.Separable()):
        yield type(fixed).__name__, sl.Spec(**balanced, map=fixed, ratio=0.3)


def step(spec):
    """Attach, run forward and backward, and return the devices of all that came of it."""
    model = nn.Sequential(*(nn.Linear(16, 16, device=DEVICE) for _ in range(4)))
    adapter = slt.attach(model, spec)
    x = torch.empty(3, 16, device=DEVICE, requires_grad=True)
    found = []
    for applied in ("auto", "formed"):
        adapter.applied = applied
        y = model(x)
        y.sum().backward()
        found += [y, x.grad, *(factor.grad for factor in adapter.parameters())]
    with torch.no_grad():
        found += [model(x), *adapter.deltas().values()]  # merging asks whether numbers are finite
    return {tensor.device.type for tensor in found if tensor is not None}


def main() -> None:
    """Try every preset, and that the check can fail."""
    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend(DEVICE)
    wrong = {}
    with FakeTensorMode(allow_non_fake_inputs=False):
        for name, spec in specs():
            try:
                devices = step(spec)
            except Exception as error:  # of any kind: all presets are told of at once
                wrong[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            if devices != {DEVICE}:
                wrong[name] = f"on {devices}"
        try:
            torch.empty(3, device=DEVICE) + torch.empty(3)
        except RuntimeError:
            pass
        else:
            wrong["the check itself"] = "tensors of two devices were added"
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    sys.stdout.flush()
    os._exit(bool(wrong))  # torch's own threads do not end well on a device that is not there


if __name__ == "__main__":
    main()
