"""Named methods as points of the design space: each returns a `Spec`, nothing else."""

from superlora.presets.mapped import did, fourierft, nola, said, unilora
from superlora.presets.partly_frozen import lora_fa, lora_xs, tinylora, vera
from superlora.presets.shared import fact_tk, fact_tt, lorta, lorta_cp, lotr
from superlora.presets.weightwise import dense, krona, loha, lokr, lonkr, lora

# The package names them too.  pylint: disable=duplicate-code
__all__ = [
    "dense",
    "did",
    "fact_tk",
    "fact_tt",
    "fourierft",
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
    "nola",
    "said",
    "tinylora",
    "unilora",
    "vera",
]
