r"""
Which entries does one parameter move?
======================================

A parameter of LoRA moves one row or one column of one weight. What does it move where the weights
are folded to other modes, multiplied as Kronecker factors, or mixed by a map?

The update is linear in each block, so that a step :math:`E` in one entry of a factor :math:`A`
changes it by exactly

.. math::

   \Delta W (A + E) - \Delta W (A) .
"""

import matplotlib.pyplot as plt
import numpy as np

import superlora as sl

square = sl.Spec(rank=2, groups=1, fold="balanced")
designs = {
    "LoRA": (sl.lora(rank=2), "factor0"),
    "one square": (square, "factor0"),
    "one cube, first mode": (sl.lorta(rank=2), "factor0"),
    "one cube, last mode": (sl.lorta(rank=2), "factor2"),
    "LoKr, the factor of low rank": (sl.lokr(rank=2), "factor0"),
    "one square and fastfood": (square.replace(map=sl.maps.Fastfood(), ratio=0.5), "factor0"),
}
shapes = {"q": (24, 18), "v": (24, 18)}

figure, rows = plt.subplots(2, 3, figsize=(9, 5.4), layout="constrained")
for axes, (name, (spec, leaf)) in zip(rows.flat, designs.items(), strict=True):
    plan, rng = sl.Plan(spec, shapes), np.random.default_rng(0)
    factors = {block: rng.normal(size=shape) for block, shape in plan.factor_shapes.items()}
    block = next(block for block in factors if block.endswith(leaf))
    changed = factors | {block: factors[block].copy()}
    changed[block][1, 0] += 1
    before, after = plan.deltas(factors), plan.deltas(changed)
    moves = np.hstack([after[weight] - before[weight] for weight in shapes])
    largest = np.abs(moves).max()
    axes.imshow(moves, cmap="RdBu", vmin=-largest, vmax=largest)
    axes.axvline(17.5, color="black")
    axes.set(title=f"{name}: {np.count_nonzero(moves)} of {moves.size}", xticks=[], yticks=[])
    axes.title.set_size(10)
    axes.set_xlabel("q | v")

# %%
# A square moves a row of the fold: neighbours, cut at other places than the weights' rows. In a
# cube a parameter of the first mode moves a slab, and one of the last mode an entry here and there
# of both weights. A Kronecker factor moves the same row of many blocks. After a mixing map every
# parameter moves every entry a little: nothing is local any more.
