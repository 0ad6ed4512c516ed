"""Parameter-efficient adaptation by one equation; this import leaves torch and jax alone."""

from superlora import maps, operations, presets
from superlora.algebra.fit import FitReport
from superlora.algebra.folding import fold_group, unfold_group
from superlora.algebra.kronecker import kronecker
from superlora.algebra.tucker import tucker
from superlora.choose.candidates import Candidate, Candidates
from superlora.choose.compare import compare
from superlora.choose.spectrum import Spectrum, spectrum
from superlora.choose.suggest import suggest
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
    "Candidate",
    "Candidates",
    "FitReport",
    "Plan",
    "Spec",
    "Spectrum",
    "Supports",
    "compare",
    "fold_group",
    "fwht",
    "kronecker",
    "maps",
    "operations",
    "presets",
    "spectrum",
    "suggest",
    "support_shape",
    "tucker",
    "unfold_group",
]
__all__ += presets.__all__
