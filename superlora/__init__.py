"""Parameter-efficient adaptation by one equation; this import leaves torch and jax alone."""

from superlora import maps, presets
from superlora.errors import AdapterError
from superlora.folding import fold_group, unfold_group
from superlora.kronecker import kronecker
from superlora.plan import Plan
from superlora.presets import (
    dense,
    did,
    fact_tk,
    fact_tt,
    fourierft,
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
    said,
    tinylora,
    unilora,
    vera,
)
from superlora.spec import Spec
from superlora.tucker import tucker
from superlora.walsh_hadamard import fwht

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Plan",
    "Spec",
    "dense",
    "did",
    "fact_tk",
    "fact_tt",
    "fold_group",
    "fourierft",
    "fwht",
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
    "presets",
    "said",
    "tinylora",
    "tucker",
    "unfold_group",
    "unilora",
    "vera",
]
