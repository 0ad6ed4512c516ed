"""Blocks that come near a dense tensor, by TensorLy's decompositions: where a fit starts."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy
import tensorly
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from tensorly.tenalg.svd import svd_interface

from superlora.algebra.tucker import tucker
from superlora.design.splits import Split

Blocks = dict[str, numpy.ndarray]
_Found = TypeVar("_Found")

# Columns that a randomised decomposition draws beyond the rank, TensorLy's default, and the
# products with the matrix that it takes: two power iterations and the last one.
_OVERSAMPLED, _PASSES = 5, 6
# Sweeps of CP-ALS, and of HOOI, whose are dear; the fit goes on from there.
_SWEEPS, _ITERATIONS = 100, 10


def on_numpy(function: Callable[[], _Found]) -> _Found:
    """Call a function of TensorLy's whose arrays are numpy's, whatever the process's backend is."""

    # A backend that is set for one thread ends with the thread.
    def call() -> _Found:
        tensorly.set_backend("numpy", local_threadsafe=True)
        return function()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(call).result()


def is_randomised(shape: Sequence[int], rank: int) -> bool:
    """Return whether products with a few random columns cost less than all singular vectors."""
    return _PASSES * (rank + _OVERSAMPLED) < min(shape)


def svd(matrix: numpy.ndarray, rank: int, seed: int) -> tuple[numpy.ndarray, ...]:
    """Return the leading singular vectors, (m, rank) and (n, rank), and singular values."""
    method = "randomized_svd" if is_randomised(matrix.shape, rank) else "truncated_svd"
    left, numbers, right = svd_interface(
        matrix, method=method, n_eigenvecs=min(rank, *matrix.shape), random_state=seed
    )
    return left, numbers, right.T


def start_group(
    splits: Sequence[Split],
    count: int,
    combine: str,
    tensor: numpy.ndarray,
    seed: int,
    pulled: Callable[[int, numpy.ndarray], numpy.ndarray],
) -> list[Blocks]:
    """Return blocks of the splits of all products, `count` a product, that are near a tensor."""
    # `pulled` takes the tensor of the split of an index to that before a map of single modes.
    terms = [splits[first : first + count] for first in range(0, len(splits), count)]

    def near(term: Sequence[Split], parts: Sequence[numpy.ndarray]) -> list[Blocks]:
        pairs = enumerate(zip(term, parts, strict=True))
        return [start(own, pulled(index, part), seed) for index, (own, part) in pairs]

    if combine == "kronecker" and count > 1:
        nearest = _nearest_kronecker(terms[0], tensor, len(terms), seed)
        pairs = zip(terms, nearest, strict=True)
        return [blocks for term, parts in pairs for blocks in near(term, parts)]
    if len(terms) == 1:
        return near(terms[0], _roots(tensor, count))
    found: list[Blocks] = []
    rest = tensor
    for term in terms:
        blocks = near(term, _roots(rest, count))
        found += blocks
        made = [formed(own, block) for own, block in zip(term, blocks, strict=True)]
        rest = rest - functools.reduce(operator.mul, made)
    return found


def _roots(tensor: numpy.ndarray, count: int) -> list[numpy.ndarray]:
    """Return tensors whose Hadamard product is one: roots, of which the last has the signs."""
    if count == 1:
        return [tensor]
    root = numpy.abs(tensor) ** (1 / count)
    return [root] * (count - 1) + [root * numpy.sign(tensor)]


def _nearest_kronecker(
    splits: Sequence[Split], tensor: numpy.ndarray, terms: int, seed: int
) -> list[list[numpy.ndarray]]:
    """Return the splits' tensors of the nearest sum of Kronecker products."""
    # The entries are arranged so that a Kronecker product is a tensor of rank one, whose mode k has
    # the entries of split k (Van Loan and Pitsianis 1993): exact for two splits, by CP-ALS above.
    order, count = len(splits[0].shape), len(splits)
    digits = tensor.reshape([own.shape[mode] for mode in range(order) for own in splits])
    axes = [mode * count + split for split in range(count) for mode in range(order)]
    sizes = [math.prod(own.shape) for own in splits]
    arranged = digits.transpose(axes).reshape(sizes)
    factors = _thin(arranged, terms, seed) if count == 2 else _cp(arranged, terms, seed)
    return [
        [own[:, term].reshape(split.shape) for own, split in zip(factors, splits, strict=True)]
        for term in range(terms)
    ]


def _cp(tensor: numpy.ndarray, rank: int, seed: int) -> list[numpy.ndarray]:
    init = "svd" if rank <= min(tensor.shape) else "random"
    try:
        _, factors = on_numpy(
            lambda: parafac(
                tensor, rank, n_iter_max=_SWEEPS, init=init, random_state=seed, tol=1e-8
            )
        )
    except numpy.linalg.LinAlgError:  # a singular step: columns that became parallel
        return random_factors(tensor.shape, rank, seed)
    if all(numpy.isfinite(own).all() for own in factors):
        return list(factors)
    return random_factors(tensor.shape, rank, seed)


def random_factors(shape: Sequence[int], rank: int, seed: int) -> list[numpy.ndarray]:
    """Draw factors of a CP decomposition."""
    drawn = numpy.random.default_rng(seed)
    return [drawn.standard_normal((size, rank)) for size in shape]


def start(split: Split, tensor: numpy.ndarray, seed: int) -> Blocks:
    """Return blocks of one split whose tensor, of the shape that a product takes, is near."""
    tensor = tensor.reshape(split.sizes)
    order = len(split.sizes)
    if split.core == "train":
        cores = on_numpy(lambda: tensor_train(tensor, [1, *split.ranks, 1]))
        return {f"core{mode}": numpy.asarray(core) for mode, core in enumerate(cores)}
    if split.core == "full":
        modes = [mode for mode in range(order) if split.factored[mode]]
        if not modes:
            return {"core": tensor.copy()}
        core, factors = on_numpy(lambda: _tucker(tensor, split.ranks, modes, seed))
        return {"core": core, **{f"factor{m}": own for m, own in zip(modes, factors, strict=True)}}
    rank = split.ranks[0]
    factors = _thin(tensor, rank, seed) if order == 2 else _cp(tensor, rank, seed)
    blocks = {f"factor{mode}": factor for mode, factor in enumerate(factors)}
    if split.core == "diagonal":
        blocks["core"] = numpy.ones(rank)
    return {leaf: blocks[leaf] for leaf in split.block_shapes}


def _thin(matrix: numpy.ndarray, rank: int, seed: int) -> list[numpy.ndarray]:
    """Return two factors of the nearest matrix of a rank (Eckart and Young 1936), balanced."""
    left, numbers, right = on_numpy(lambda: svd(matrix, rank, seed))
    # A column that is not needed is zero in one factor alone, so that it can be trained.
    needed = numbers > numbers[0] * max(matrix.shape) * numpy.finfo(float).eps
    first = left * numpy.where(needed, numbers, numbers[0]) ** 0.5
    second = right * numpy.where(needed, numbers, 0.0) ** 0.5
    more = rank - len(numbers)
    if more:  # the rank is above the matrix's smaller side
        scale = (numbers[0] / len(matrix)) ** 0.5
        drawn = random_factors(matrix.shape[:1], more, seed)[0] * scale
        first, second = numpy.hstack([first, drawn]), numpy.pad(second, ((0, 0), (0, more)))
    return [first, second]


def _tucker(tensor: numpy.ndarray, ranks: Sequence[int], modes: Sequence[int], seed: int) -> Any:
    """Return core and factors of a Tucker tensor: HOSVD, then HOOI (De Lathauwer et al. 2000)."""
    # No mode has a rank above the product of the others'. The columns beyond it are drawn, and
    # meet zeros in the core, which can be trained.
    needed = [*ranks]
    for mode in modes:
        needed[mode] = min(needed[mode], math.prod(needed) // needed[mode])
    rest = [tensor.size // tensor.shape[mode] for mode in modes]
    randomised = all(
        is_randomised((tensor.shape[mode], columns), needed[mode])
        for mode, columns in zip(modes, rest, strict=True)
    )
    (core, factors), _ = partial_tucker(
        tensor,
        [needed[mode] for mode in modes],
        modes=list(modes),
        svd="randomized_svd" if randomised else "truncated_svd",
        random_state=seed,
        n_iter_max=_ITERATIONS,
        tol=1e-5,
    )
    more = [rank - own for rank, own in zip(ranks, needed, strict=True)]
    drawn = [random_factors([tensor.shape[mode]], more[mode], seed)[0] for mode in modes]
    factors = [numpy.hstack(both) for both in zip(factors, drawn, strict=True)]
    return numpy.pad(core, [(0, own) for own in more]), factors


def formed(split: Split, blocks: Blocks) -> numpy.ndarray:
    """Return the tensor of a split, of the shape that a product takes."""
    order = len(split.sizes)
    if split.core == "train":
        found: numpy.ndarray = blocks["core0"]
        for mode in range(1, order):
            found = numpy.tensordot(found, blocks[f"core{mode}"], axes=1)
    else:
        factors = [blocks.get(f"factor{mode}") for mode in range(order)]
        found = tucker(blocks.get("core"), factors)
    return found.reshape(split.shape)
