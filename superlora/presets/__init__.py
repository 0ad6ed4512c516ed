"""Named methods as points of the design space: each returns a `Spec`, nothing else."""

from superlora.presets.partly_frozen import lora_fa, lora_xs, tinylora, vera
from superlora.presets.shared import fact_tk, fact_tt, lorta, lorta_cp, lotr
from superlora.presets.weightwise import dense, krona, loha, lokr, lonkr, lora

# The package names them too.  pylint: disable=duplicate-code
__all__ = [
    "dense",
    "fact_tk",
    "fact_tt",
    "krona",
    "loha",
    "lokr",
    "lonkr",
    "lora",
    "lora_fa",
    "lora_xs",
    "lorta",
    "lorta_cp",
    "lotr",
    "tinylora",
    "vera",
]
