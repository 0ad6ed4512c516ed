"""Parameter-efficient adaptation by one equation; this import leaves torch and jax alone."""

from typing import TYPE_CHECKING

from superlora import maps, operations, presets
from superlora.design.axes import Axes
from superlora.errors import AdapterError
from superlora.folding import fold_group, unfold_group
from superlora.kronecker import kronecker
from superlora.plan import Plan
from superlora.presets import (
    bitfit,
    dense,
    did,
    fact_tk,
    fact_tt,
    fourierft,
    ia3,
    krona,
    loha,
    lokr,
    lonkr,
    lora,
    lora_fa,
    lora_xs,
    lorta,
    lorta_cp,
    lotr,
    nola,
    prompt_add,
    repadapter,
    said,
    ssf,
    tinylora,
    unilora,
    vera,
)
from superlora.spec import Spec
from superlora.supports import OPERATIONS, support_shape
from superlora.tucker import tucker
from superlora.walsh_hadamard import fwht

if TYPE_CHECKING:
    from superlora.presets import glora
else:  # the package of this name, which can be called as the preset
    from superlora import glora

__version__ = "0.1.0"

__all__ = [
    "OPERATIONS",
    "AdapterError",
    "Axes",
    "Plan",
    "Spec",
    "bitfit",
    "dense",
    "did",
    "fact_tk",
    "fact_tt",
    "fold_group",
    "fourierft",
    "fwht",
    "glora",
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
    "nola",
    "operations",
    "presets",
    "prompt_add",
    "repadapter",
    "said",
    "ssf",
    "support_shape",
    "tinylora",
    "tucker",
    "unfold_group",
    "unilora",
    "vera",
]
