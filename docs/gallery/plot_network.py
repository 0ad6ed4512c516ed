r"""
In which order are the blocks multiplied?
=========================================

An update is a tensor network: blocks are points, and what is summed over are lines between them.
The value does not depend on the order in which they are contracted. What does?

The work. A contraction of two tensors costs the product of the sizes of all labels that one of
them has. For :math:`\Delta W = C \times_1 A_1 \times_2 A_2 \times_3 A_3 \times_4 A_4` of a weight
of :math:`64 \times 64` folded to :math:`8 \times 8 \times 8 \times 8`:
"""

import matplotlib.pyplot as plt

import superlora as sl

plan = sl.Plan(sl.lorta(rank=3, order=4), {"q": (64, 64)})
network = plan.network("q")
print(network)
plt.figure(plan.plot("q"))

# %%
# The order is chosen once, from the sizes alone. Every step takes two tensors and leaves one; the
# numbers are the entries of the result.

(term,) = network.terms()
contraction = term.contraction
count = len(contraction.operands)
blocks = [network.sources[operand.source].block for operand in term.operands]
places = {}


def place(value):
    """Give a tensor a place right of what it is made of; return its height."""
    if value < count:
        places[value] = 0, sum(x == 0 for x, _ in places.values())
    else:
        step = contraction.steps[value - count]
        height = (place(step.left) + place(step.right)) / 2
        places[value] = 1 + max(places[step.left][0], places[step.right][0]), height
    return places[value][1]


last = count + len(contraction.steps) - 1
place(last)

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for value, (x, y) in places.items():
    if value < count:
        axes.annotate(blocks[value], (x - 0.06, y), ha="right", va="center")
    else:
        step = contraction.steps[value - count]
        for source in (step.left, step.right):
            axes.plot([places[source][0], x], [places[source][1], y], color="0.6", zorder=0)
        axes.annotate(f"{step.entries:,}", (x, y + 0.22), ha="center")
    axes.plot(x, y, "o", color="C0" if value < count else "C1")
axes.set(xlim=(-0.8, places[last][0] + 0.5), ylim=(-0.6, count - 0.2))
axes.axis("off")
print(f"{network.cost.multiplications:,} multiplications; ΔW has {64 * 64:,} entries")

# %%
# Every step meets one more factor, and the result of the full size comes last.
# ``Plan.network`` is what NumPy, PyTorch and JAX run; with inputs they are one more operand, and
# another order is best (:doc:`/equation/scatter`).
