"""Named methods as points of the design space: each returns a `Spec` or `Supports`."""

from superlora.presets.blockwise import cdka, gralora, miss, monarch
from superlora.presets.mapped import c3a, did, fourierft, nola, said, unilora, waveft
from superlora.presets.operations import bitfit, glora, ia3, prompt_add, repadapter, ssf
from superlora.presets.partly_frozen import lora_fa, lora_xs, tinylora, vera
from superlora.presets.shared import (
    fact_tk,
    fact_tt,
    lorta,
    lorta_cp,
    lotr,
    metatt,
    share_lora,
    tenslora,
    tied_lora,
)
from superlora.presets.weightwise import dense, krona, loha, lokr, lonkr, lora, tt_lora

__all__ = [
    "bitfit",
    "c3a",
    "cdka",
    "dense",
    "did",
    "fact_tk",
    "fact_tt",
    "fourierft",
    "glora",
    "gralora",
    "ia3",
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
    "metatt",
    "miss",
    "monarch",
    "nola",
    "prompt_add",
    "repadapter",
    "said",
    "share_lora",
    "ssf",
    "tenslora",
    "tied_lora",
    "tinylora",
    "tt_lora",
    "unilora",
    "vera",
    "waveft",
]
