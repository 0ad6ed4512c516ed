"""Presets of merge operations: each returns `Supports`, with a `Spec` for every operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from superlora.checks import check_count
from superlora.design.spec import Spec
from superlora.design.supports import Supports, check_operation
from superlora.maps import Broadcast
from superlora.presets._make import by_rank, refuse_rank
from superlora.presets.weightwise import dense, lora

Option = int | str

# What an option can be besides a rank.
OPTIONS = ("vector", "constant", "none")
_OF_WEIGHT = ("add_weight", "scale_weight")


def support(operation: str, option: Option, **changes: Any) -> Spec | None:
    """Return the design of one of GLoRA's support tensors."""
    check_operation(operation)
    if not isinstance(option, str):
        rank = check_count(f"{operation}'s rank", option)
        # Of a vector too: more entries than it has, as the method's authors count them.
        return lora(rank=rank, **{"dense_from": "never", **changes})
    if option not in OPTIONS:
        raise ValueError(
            f"the support of {operation!r} must be a rank or one of {OPTIONS}: got {option!r}"
        )
    if option == "none":
        return None
    if operation in ("right_weight", "left_weight"):
        raise ValueError(f"the support of {operation!r} must be a rank or 'none': got {option!r}")
    if option == "vector" and operation not in _OF_WEIGHT:
        return dense(**changes)
    fixed = Broadcast(along="inputs" if option == "vector" else "all")
    return dense(map=fixed, **changes)


def glora(
    rank: int = 8,
    *,
    scale_weight: Option | None = None,
    add_weight: Option | None = None,
    weight_to_bias: Option | None = None,
    scale_bias: Option = "vector",
    add_bias: Option = "vector",
    product: str = "hadamard",
    alpha: float | None = None,
    scale: float | None = None,
) -> Supports:
    """GLoRA (Chavan et al. 2023): ``W = W₀ + W₀ ∘ A + B``, ``b = b₀ + b₀ ∘ D + E + W₀ C``.

    Parameters
    ----------
    rank : int
        The inner dimension of A, B and C, where nothing else is said.
    scale_weight, add_weight, weight_to_bias, scale_bias, add_bias : int or str, optional
        A, B, C, D and E: a rank, ``"vector"``, ``"constant"`` or ``"none"``.
    product : {"hadamard", "matrix"}
        Whether A multiplies W₀ entry by entry, as in the released code and in PEFT, or as a
        matrix from the right, ``W₀ A``, as in LyCORIS and RepAdapter.
    alpha : float, optional
        Where a support is of some rank r, its scale is ``alpha / r``, as in LyCORIS; 1 without.
    scale : float, optional
        The number in front of each of A, B, C, D and E, in place of `alpha`.

    Returns
    -------
    Supports
        ``2 r (do + di) + r (di + 1) + 2 do`` parameters a layer with ``"hadamard"`` and nothing
        else changed.

    Raises
    ------
    ValueError
        If an option is none of these, all are ``"none"``, or both alpha and scale are given.

    Notes
    -----
    The paper's equation 10 does not say which product ``W₀ A`` is, and has ``C W₀``, which does
    not conform; this is what its code computes.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.glora(rank=1), {"q": (6, 4)}).num_parameters
    37
    """
    if product not in ("hadamard", "matrix"):
        raise ValueError(f"product must be 'hadamard' or 'matrix': got {product!r}")
    options = {
        "scale_weight" if product == "hadamard" else "right_weight": scale_weight,
        "add_weight": add_weight,
        "weight_to_bias": weight_to_bias,
        "scale_bias": scale_bias,
        "add_bias": add_bias,
    }
    Spec(alpha=alpha, scale=scale)  # refuses both, where no support has a rank too
    chosen = {op: rank if option is None else option for op, option in options.items()}
    own = {
        op: support(op, option, scale=scale, alpha=None if isinstance(option, str) else alpha)
        for op, option in chosen.items()
    }
    found = {op: spec for op, spec in own.items() if spec is not None}
    if not found:
        raise ValueError("one of the options must not be 'none'")
    return Supports(found)


def bitfit(**changes: Any) -> Supports:
    """BitFit (Ben Zaken et al. 2022): the biases of the adapted layers.

    Parameters
    ----------
    **changes : Any
        Other fields of the spec, such as ``scale``, in front of what is added to the bias.

    Returns
    -------
    Supports
        ``do`` parameters a layer.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.bitfit(), {"q": (6, 4)}).num_parameters
    6
    """
    refuse_rank("bitfit", changes)
    return Supports({"add_bias": dense(**changes)})


def ssf(*, scale: float | None = None) -> Supports:
    """SSF (Lian et al. 2022): ``y = γ ∘ (W₀ x + b₀) + β`` after each layer.

    Parameters
    ----------
    scale : float, optional
        The number in front of each of ``γ - 1`` and ``β``; 1 without.

    Returns
    -------
    Supports
        ``2 do`` parameters a layer; ``γ - 1`` scales weight and bias alike.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.ssf(), {"q": (6, 4)}).num_parameters
    12
    """
    outputs = dense(map=Broadcast(along="inputs"), scale=scale)
    add_bias = dense(scale=scale)
    return Supports({"scale_weight": outputs, "scale_bias": "scale_weight", "add_bias": add_bias})


def ia3(inputs: Sequence[str] = (), *, scale: float | None = None) -> Supports:
    """IA³ (Liu et al. 2022): every output, or every input, times a number.

    Parameters
    ----------
    inputs : sequence of str
        Layers whose inputs are scaled, as those of the second feed-forward layer are:
        regular expressions for a name or its end after a dot.
    scale : float, optional
        The number s where outputs, or inputs, are multiplied by ``1 + s l`` and l is trained; 1
        without.

    Returns
    -------
    Supports
        ``do`` parameters a layer, ``di`` where the inputs are scaled.

    Raises
    ------
    TypeError
        If `inputs` is one string.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.ia3(inputs=["fc2"]), {"k": (6, 4), "fc2": (6, 4)}).num_parameters
    10
    """
    if isinstance(inputs, str):
        raise TypeError(f"inputs must be a sequence of patterns: got the string {inputs!r}")
    overrides = {pattern: {"map": Broadcast(along="outputs")} for pattern in inputs}
    outputs = dense(map=Broadcast(along="inputs"), overrides=overrides, scale=scale)
    return Supports({"scale_weight": outputs, "scale_bias": "scale_weight"})


def repadapter(rank: int = 8, **changes: Any) -> Supports:
    """RepAdapter (Luo et al. 2023) without groups: ``W₀ (x + s (U (V x + c) + d)) + b₀``.

    Parameters
    ----------
    rank : int
        The inner dimension of ``U V``.
    **changes : Any
        Other fields of the spec of ``U V``. The scale s that ``scale``, or ``alpha``, gives is
        also that of ``U c + d``.

    Returns
    -------
    Supports
        ``2 r di + di`` parameters a layer: the vector ``U c + d`` is one of its own.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.repadapter(rank=1), {"q": (6, 4)}).num_parameters
    12
    """
    own = by_rank(changes, rank)
    overrides = {
        pattern: None if fields is None else {"scale": fields["scale"]}
        for pattern, fields in dict(own.get("overrides", {})).items()
        if fields is None or "scale" in fields
    }
    shift = dense(scale=own.get("scale"), overrides=overrides)
    return Supports({"right_weight": lora(rank=rank, **own), "weight_to_bias": shift})


def prompt_add(**changes: Any) -> Supports:
    """Add a prompt to every token: ``W₀ (x + s p) + b₀``.

    Parameters
    ----------
    **changes : Any
        Other fields of the spec, such as ``scale``, the number s.

    Returns
    -------
    Supports
        ``di`` parameters a layer.

    Notes
    -----
    What GLoRA's paper calls VPT-Deep. Prompts that are appended as tokens of their own
    are something else: they take part in the attention's softmax.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.prompt_add(), {"q": (6, 4)}).num_parameters
    4
    """
    refuse_rank("prompt_add", changes)
    return Supports({"weight_to_bias": dense(**changes)})
