r"""
How much does a random map distort?
===================================

A fixed map :math:`F` makes a long vector of the fold's entries. Does it keep lengths, and what
does that depend on?

The paper's fastfood is :math:`F = B H \Pi G H` with Hadamard matrices :math:`H`, a permutation
:math:`\Pi`, random signs :math:`B` and normal numbers :math:`G`. Over the draws

.. math::

   \mathbb E \, \lVert F x \rVert^2 = \lVert x \rVert^2 ,

but one draw may be far from it: :math:`H` turns a constant vector into a single entry, which then
meets a single number of :math:`G`. Le et al. have the signs first, which spreads it.
"""

import matplotlib.pyplot as plt
import numpy as np

from superlora import maps

before, after, seeds = 250, 1000, 100
families = {
    "Fastfood, paper": lambda seed: maps.Fastfood(seed=seed),
    "Fastfood, Le et al.": lambda seed: maps.Fastfood(seed=seed, order="le"),
    "Fastfood, G of signs": lambda seed: maps.Fastfood(seed=seed, values="sign"),
    "Gaussian": lambda seed: maps.Gaussian(seed=seed),
    "OneHot": lambda seed: maps.OneHot(seed=seed),
}
constant = np.ones(before)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, family in families.items():
    norms = [np.sum(family(seed).apply(constant, after) ** 2) / before for seed in range(seeds)]
    left.plot(np.sort(norms), np.linspace(0, 1, seeds), label=name)
    matrix = np.stack([family(0).apply(row, after) for row in np.eye(before)], axis=1)
    right.plot(np.linalg.svd(matrix, compute_uv=False))
left.set(xlabel="|F x|² / |x|² of a constant x", ylabel=f"share of {seeds} seeds", xlim=(0, 4))
left.legend(fontsize=8)
right.set(xlabel="number", ylabel=f"singular value of F, {before} to {after}")

# %%
# With the paper's order a constant vector is stretched or shrunk by a factor that a seed draws.
# Signs in the place of normal numbers keep all lengths nearly, as the permutation of ``OneHot``
# does exactly. The steepness on the right is what an optimiser meets where the fold is dense:
# :doc:`/maps` has the numbers.
