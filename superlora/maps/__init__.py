"""The fixed linear maps F between a folded tensor and its group.

A map takes a vector of the fold's entries to one of the group's entries; it has
no trainable parameters. A map of your own is a frozen dataclass that derives
from `Map`; its fields are what a file stores. `take` and `scatter_add` are for
such maps, and `check` tests them.
"""

from superlora._backend import scatter_add, take
from superlora.maps._base import Map, Place, map_from_dict
from superlora.maps._check import check
from superlora.maps.composed import BlockDiagonal, Composed
from superlora.maps.fastfood import Fastfood
from superlora.maps.gaussian import Gaussian
from superlora.maps.index_maps import Broadcast, Identity, Selection, Shuffle
from superlora.maps.one_hot import OneHot
from superlora.maps.separable import Separable
from superlora.maps.weight_transforms import Circulant, Fourier, Wavelet

__all__ = [
    "BlockDiagonal",
    "Broadcast",
    "Circulant",
    "Composed",
    "Fastfood",
    "Fourier",
    "Gaussian",
    "Identity",
    "Map",
    "OneHot",
    "Place",
    "Selection",
    "Separable",
    "Shuffle",
    "Wavelet",
    "check",
    "map_from_dict",
    "scatter_add",
    "take",
]
