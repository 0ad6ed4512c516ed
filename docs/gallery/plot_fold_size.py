r"""
Why does one folded tensor need fewer parameters?
=================================================

A LoRA of rank :math:`r` has :math:`r (m + n)` parameters for a matrix of :math:`m n` entries. How
many does it need if all entries of a model are one tensor, folded to other modes?

Of all modes :math:`d_1, \dots, d_M` with a given number of entries :math:`N`, equal ones have the
least sum (the inequality of arithmetic and geometric means):

.. math::

   r (d_1 + \dots + d_M) \ge r M N^{1/M} \\
   \text{where } d_1 \cdots d_M = N .

For :math:`L` weights of :math:`d \times d` this gives :math:`2 L d r` for a LoRA each,
:math:`(L + 1) d r` for one of all weights stacked, :math:`2 \sqrt L d r` for a square, and
:math:`3 (L d^2)^{1/3} r + r^3` for a cube with a full core.
"""

import matplotlib.pyplot as plt

import superlora as sl

designs = {
    "a LoRA for each weight": sl.lora(rank=8),
    "one matrix, stacked": sl.Spec(rank=8, groups=1, fold="stack"),
    "one matrix, square": sl.Spec(rank=8, groups=1, fold="balanced"),
    "one tensor, cube": sl.lorta(rank=8),
}
counts = [1, 2, 4, 8, 16, 32, 64, 128]

figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for name, spec in designs.items():
    parameters = []
    for count in counts:
        shapes = {f"{layer}.q": (768, 768) for layer in range(count)}
        parameters.append(sl.Plan(spec, shapes).num_parameters)
    axes.loglog(counts, parameters, "o-", label=name)
axes.set(xlabel="weights of 768 × 768", ylabel="parameters at rank 8")
axes.legend()

# %%
# The lines have slope 1, 1, 1/2 and 1/3: with a square, four times as many layers need twice the
# parameters. What is given up is freedom for each weight: all of them share one rank, so that the
# figure compares sizes, not what the updates can be. :doc:`plot_fold_locality` shows which entries
# then share a parameter.
