r"""
What is simple for a Kronecker product?
=======================================

Every matrix is a sum of Kronecker products. How many does it need, and is that another number than
its rank?

Van Loan's rearrangement :math:`\mathcal R` writes the blocks of a matrix as rows. It turns a
Kronecker product into a matrix of rank one,

.. math::

   \mathcal R (A \otimes B) = \operatorname{vec}(A) \operatorname{vec}(B)^{\mathsf T} ,

so that the least number of products is the rank of :math:`\mathcal R(W)`, the Kronecker rank of
:math:`W`, and the nearest sum of a few is a truncated SVD. For :math:`W` of :math:`144 \times 144`
and factors of :math:`12 \times 12` a product has 288 parameters, as many as a rank of LoRA.
"""

import matplotlib.pyplot as plt
import numpy as np

import superlora as sl

rng = np.random.default_rng(0)
second = 2 * np.eye(12) - np.eye(12, k=1) - np.eye(12, k=-1)
matrices = {
    "a Laplacian on a 12 × 12 grid": np.kron(second, np.eye(12)) + np.kron(np.eye(12), second),
    "a product of 144 × 2 and 2 × 144": rng.normal(size=(144, 2)) @ rng.normal(size=(2, 144)),
    "noise": rng.normal(size=(144, 144)),
}
terms = range(1, 9)
designs = {
    "sum of t Kronecker products": [sl.krona(terms=t) for t in terms],
    "LoRA of rank t": [sl.lora(rank=t) for t in terms],
}

figure, row = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
for axes, (title, matrix) in zip(row, matrices.items(), strict=True):
    for name, specs in designs.items():
        fits = [sl.Plan(spec, {"w": matrix.shape}).fit({"w": matrix})[1] for spec in specs]
        axes.plot(terms, [fit.error for fit in fits], "o-", label=name)
    axes.set(title=title, xlabel="t (288 parameters each)", ylim=(-0.05, 1.05))
    axes.title.set_size(10)
row[0].set_ylabel("relative error of the nearest")
row[0].legend(fontsize=8)

# %%
# The Laplacian has full rank and Kronecker rank 2. A random matrix of rank 2 is hardly nearer to a
# sum of 8 products than noise is, for which both curves are the same. Neither structure contains
# the other: which one an update has is a question for data, and :doc:`/fit` answers it.
