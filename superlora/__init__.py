"""Parameter-efficient adaptation by one equation; this import leaves torch and jax alone."""

# `__all__` names the presets, which a type checker finds by it.
# ruff: noqa: F405
from superlora import maps, operations, presets
from superlora.algebra.folding import fold_group, unfold_group
from superlora.algebra.kronecker import kronecker
from superlora.algebra.tucker import tucker
from superlora.design.axes import Axes
from superlora.design.spec import Spec
from superlora.design.supports import OPERATIONS, Supports, support_shape
from superlora.errors import AdapterError
from superlora.maps.walsh_hadamard import fwht
from superlora.plan import Plan
from superlora.presets import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "OPERATIONS",
    "AdapterError",
    "Axes",
    "Plan",
    "Spec",
    "Supports",
    "bitfit",
    "c3a",
    "cdka",
    "dense",
    "did",
    "fact_tk",
    "fact_tt",
    "fold_group",
    "fourierft",
    "fwht",
    "glora",
    "gralora",
    "ia3",
    "krona",
    "kronecker",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lora_fa",
    "lora_xs",
    "lorta",
    "lorta_cp",
    "lotr",
    "maps",
    "metatt",
    "miss",
    "monarch",
    "nola",
    "operations",
    "presets",
    "prompt_add",
    "repadapter",
    "said",
    "share_lora",
    "ssf",
    "support_shape",
    "tenslora",
    "tied_lora",
    "tinylora",
    "tt_lora",
    "tucker",
    "unfold_group",
    "unilora",
    "vera",
    "waveft",
]
