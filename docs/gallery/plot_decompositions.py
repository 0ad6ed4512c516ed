r"""
CP, Tucker or tensor train?
===========================

Twelve layers have updates of :math:`24 \times 24`, which are one tensor of three modes. Which of
its three decompositions is nearest for as many parameters?

.. math::

   \text{CP:}\; & \textstyle \sum_a A_{i a} B_{j a} C_{k a} \\
   \text{Tucker:}\; & \textstyle \sum_{a b c} G_{a b c} A_{i a} B_{j b} C_{k c} \\
   \text{train:}\; & \textstyle \sum_{a b} G^1_{i a} G^2_{a j b} G^3_{b k}

Of rank :math:`r` they have :math:`r \sum d`, :math:`r \sum d + r^3`, and
:math:`r (d_1 + d_3) + r^2 d_2` parameters. Each is tried on a tensor of its own kind, and on the
others', with a tenth of noise.
"""

import matplotlib.pyplot as plt
import numpy as np

import superlora as sl

shapes = {f"{layer}.q": (24, 24) for layer in range(12)}


def plan_of(core, rank):
    spec = sl.Spec(rank=rank, order=3, groups=1, fold="stack", core=core)
    return sl.Plan(spec, shapes)


cores = {"CP": "identity", "Tucker": "full", "tensor train": "train"}
made = {
    "CP of rank 8": ("identity", 8),
    "Tucker of rank 5": ("full", 5),
    "train of rank 4": ("train", 4),
}

figure, row = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True, layout="constrained")
for axes, (title, (core, rank)) in zip(row, made.items(), strict=True):
    plan, rng = plan_of(core, rank), np.random.default_rng(1)
    factors = {name: rng.normal(size=shape) for name, shape in plan.factor_shapes.items()}
    deltas = plan.deltas(factors)
    size = np.std(list(deltas.values()))
    deltas = {name: own + 0.1 * size * rng.normal(size=own.shape) for name, own in deltas.items()}
    for name, kind in cores.items():
        plans = [plan_of(kind, rank) for rank in range(1, 17)]
        plans = [each for each in plans if each.num_parameters <= 1000]
        errors = [each.fit(deltas, restarts=2, tolerance=1e-4)[1].error for each in plans]
        axes.plot([each.num_parameters for each in plans], errors, "o-", label=name, markersize=4)
    axes.axhline(0.1, color="0.7", linestyle=":", zorder=0)
    axes.set(title=title, xlabel="parameters", xlim=(0, 1000), ylim=(0, 1))
    axes.title.set_size(10)
row[0].set_ylabel("relative error")
row[0].legend(fontsize=8)

# %%
# Each reaches the noise (dotted) with the fewest parameters on its own kind. A Tucker tensor is
# also a train of the ranks of its outer modes, which has one core of :math:`r^2 d` numbers where
# Tucker has :math:`r^3 + r d`. CP has the fewest parameters a rank, but needs larger ranks: the
# generic rank of :math:`5 \times 5 \times 5` tensors, as the core of the second picture, is 10.
