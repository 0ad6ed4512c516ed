r"""
How many parameters are there really?
=====================================

Factors of an update are not unique: :math:`A B^{\mathsf T} = (A G)(B G^{-\mathsf T})^{\mathsf T}`
for every invertible :math:`G`. How many numbers does an update depend on?

Near almost every point these are as many as the rank of the Jacobian of
:math:`\theta \mapsto \Delta W(\theta)`. The rest are directions in which the factors move and the
update does not. For a LoRA of rank :math:`r` the rank is

.. math::

   \operatorname{rank} \frac{\partial \Delta W}{\partial \theta} = r (m + n) - r^2 ,

the dimension of the matrices of rank :math:`r`.
"""

import matplotlib.pyplot as plt
import numpy as np

import superlora as sl


def jacobian(plan, factors):
    """Return the derivatives for every parameter; differences are exact in a multilinear map."""
    base, columns = plan.deltas(factors), []
    for name, block in factors.items():
        for index in np.ndindex(block.shape):
            changed = factors | {name: block.copy()}
            changed[name][index] += 1
            moved = plan.deltas(changed)
            columns.append(np.concatenate([(moved[w] - base[w]).ravel() for w in base]))
    return np.transpose(columns)


cube = {"rank": 2, "order": 3, "groups": 1, "fold": "stack"}
designs = {
    "LoRA, r = 2": (sl.lora(rank=2), "$r(m + n) - r^2$"),
    "CP, r = 2": (sl.Spec(**cube, core="identity"), r"$r(\sum d - 2)$"),
    "Tucker, r = 2": (sl.Spec(**cube), r"$r^3 + r\sum (d - r)$"),
    "train, r = 2": (sl.Spec(**cube, core="train"), r"$r(d_1 + r d_2 + d_3) - 2 r^2$"),
    "KronA": (sl.krona(), "$k_1 + k_2 - 1$"),
}

figure, row = plt.subplots(1, 5, figsize=(10, 3.2), sharey=True, layout="constrained")
for axes, (name, (spec, formula)) in zip(row, designs.items(), strict=True):
    plan, rng = (
        sl.Plan(spec, {f"{layer}.q": (8, 6) for layer in range(3)}),
        np.random.default_rng(0),
    )
    factors = {block: rng.normal(size=shape) for block, shape in plan.factor_shapes.items()}
    values = np.linalg.svd(jacobian(plan, factors), compute_uv=False)
    rank = int((values > 1e-10 * values[0]).sum())
    axes.semilogy(np.arange(1, len(values) + 1), np.maximum(values / values[0], 1e-17), ".")
    axes.axvline(rank + 0.5, color="C1")
    axes.set(title=f"{name}\n{rank} of {plan.num_parameters}\n{formula}", xlabel="singular value")
    axes.title.set_size(9)
row[0].set_ylabel("size, of the largest")

# %%
# There is no doubt where the rank ends: more than twelve orders of magnitude lie between. With
# groups of their own (LoRA, KronA) the formula holds for each of the three weights. What is left of
# the parameters is gauge: weight decay moves along it, and a fit need not find the factors that
# made an update, only the update.
