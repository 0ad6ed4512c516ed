"""LyCORIS' modules: the peer is their training forward, which alone scales once everywhere."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from lycoris import LycorisNetwork, create_lycoris
from lycoris.logging import logger
from lycoris.modules.locon import LoConModule
from torch import nn

import superlora as sl
from tests.reductions.cases import (
    Case,
    Leaves,
    Options,
    Row,
    Take,
    TorchPeer,
    fill,
    make_net,
    options,
    transposed,
)
from tests.reductions.peft_rows import UNEQUAL, factors, has_factor, kronecker, kronecker_sizes

Modules = dict[str, Any]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Undo what LyCORIS writes on its class and says in its log."""
    before = {key: value for key, value in vars(LycorisNetwork).items() if key.isupper()}
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            setattr(LycorisNetwork, key, value)


def network(algo: str, **fields: Any) -> Callable[[nn.Module, Options], Modules]:
    def make(net: nn.Module, drawn: Options) -> Modules:
        more = {key: value(drawn) if callable(value) else value for key, value in fields.items()}
        with restored():
            made = create_lycoris(
                net, 1.0, linear_dim=drawn.rank, linear_alpha=drawn.alpha, algo=algo, **more
            )
            made.apply_to()
        return dict(zip(drawn.widths, made.loras, strict=True))

    return make


def rank_stabilised(net: nn.Module, drawn: Options) -> Modules:
    """Make what ``create_lycoris`` has no argument for."""
    found = {}
    for name in drawn.widths:
        layer = net.get_submodule(name)
        found[name] = LoConModule(name, layer, 1.0, drawn.rank, drawn.alpha, rs_lora=True)
        found[name].apply_to()
    return found


def lycoris_row(
    name: str,
    make: Callable[[nn.Module, Options], Modules],
    spec: Callable[[Options, Modules], sl.Spec],
    leaves: Callable[[Any], Leaves],
    drawn: st.SearchStrategy[Options],
    example: Options,
) -> Row:
    def build(drawn: Options) -> Case:
        net = make_net(drawn)
        model = copy.deepcopy(net)
        modules = make(model, drawn)
        for module in modules.values():
            module.double()
        trained = [p for module in modules.values() for p in module.parameters()]
        fill(trained, drawn.seed + 100)
        found = {key: leaves(module) for key, module in modules.items()}
        return Case(drawn, net, spec(drawn, modules), TorchPeer(model, trained, found))

    return Row(name, build, drawn, example)


def locon_leaves(module: Any) -> Leaves:
    return {
        "0.factor0": Take(module.lora_up.weight),
        "0.factor1": Take(module.lora_down.weight, transposed),
    }


def lokr_leaves(module: Any) -> Leaves:
    found: Leaves = {}
    for split, (key, whole) in enumerate((("w1", module.use_w1), ("w2", module.use_w2))):
        if whole:
            found[f"{split}.core"] = Take(getattr(module, f"lokr_{key}"))
        else:
            found[f"{split}.factor0"] = Take(getattr(module, f"lokr_{key}_a"))
            found[f"{split}.factor1"] = Take(getattr(module, f"lokr_{key}_b"), transposed)
    return found


def loha_leaves(module: Any) -> Leaves:
    return {
        "0.factor0": Take(module.hada_w1_a),
        "0.factor1": Take(module.hada_w1_b, transposed),
        "1.factor0": Take(module.hada_w2_a),
        "1.factor1": Take(module.hada_w2_b, transposed),
    }


def full_leaves(module: Any) -> Leaves:
    # Attached, the module holds the weight and its update in one.
    origin = module.org_weight.detach().clone()
    return {"0.core": Take(module.weight, lambda delta: delta.reshape(-1), origin)}


def lokr(drawn: Options, modules: Modules, **fields: Any) -> sl.Spec:
    """Say LyCORIS' scale, which is 1 whatever alpha is where both splits are dense."""
    dense = {
        key: {"scale": 1.0}
        for key, module in zip(drawn.keys, modules.values(), strict=True)
        if module.use_w1 and module.use_w2
    }
    return sl.lokr(drawn.rank, alpha=drawn.alpha, overrides=dense, **fields)


def unbalanced(drawn: Options, modules: Modules) -> sl.Spec:
    """Say a first split with the larger part of the outputs and the smaller of the inputs."""
    own = dict(lokr(drawn, modules).overrides)
    bounded = sl.design.fold_shape.bounded_splits
    folds = {}
    for key, module in zip(drawn.keys, modules.values(), strict=True):
        (small, inputs), (large, others) = bounded(module.shape, 2, None)
        folds[key] = {**dict(own.get(key, ())), "fold": ((large, inputs), (small, others))}
    return sl.lokr(drawn.rank, alpha=drawn.alpha, overrides=folds)


ROWS = [
    lycoris_row(
        "lora-lycoris",
        network("locon"),
        lambda drawn, _: sl.lora(drawn.rank, alpha=drawn.alpha),
        locon_leaves,
        options(),
        Options(UNEQUAL, 3),
    ),
    lycoris_row(
        "lora-lycoris-rslora",
        rank_stabilised,
        lambda drawn, _: sl.lora(drawn.rank, alpha=drawn.alpha, rslora=True),
        locon_leaves,
        options(),
        Options(UNEQUAL, 3),
    ),
    lycoris_row(
        "lokr-lycoris", network("lokr"), lokr, lokr_leaves, kronecker, Options(((16, 18), (9, 12)))
    ),
    lycoris_row(
        "lokr-lycoris-decompose_both",
        network("lokr", decompose_both=True),
        lambda drawn, modules: lokr(drawn, modules, decompose_both=True),
        lokr_leaves,
        kronecker,
        Options(((30, 42), (12, 9)), 2),
    ),
    lycoris_row(
        "lokr-lycoris-factor",
        network("lokr", factor=lambda drawn: drawn.extra),
        lambda drawn, modules: lokr(drawn, modules, factor=drawn.extra),
        lokr_leaves,
        options(sizes=kronecker_sizes, rank=st.integers(1, 7), extra=factors, fits=has_factor),
        Options(((16, 18), (128, 48)), 2, extra=16),
    ),
    lycoris_row(
        "lokr-lycoris-unbalanced",
        network("lokr", unbalanced_factorization=True),
        unbalanced,
        lokr_leaves,
        options(sizes=st.sampled_from([6, 8, 12, 18]), rank=st.integers(1, 7)),
        Options(((18, 32), (12, 8)), 2),
    ),
    lycoris_row(
        "krona-lycoris-full_matrix",
        network("lokr", full_matrix=True),
        lambda drawn, _: sl.krona(),  # LyCORIS forces the scale 1 here
        lokr_leaves,
        kronecker,
        Options(((16, 18), (9, 12)), 2),
    ),
    lycoris_row(
        "loha-lycoris",
        network("loha"),
        lambda drawn, _: sl.loha(drawn.rank, alpha=drawn.alpha),
        loha_leaves,
        options(),
        Options(UNEQUAL, 2),
    ),
    lycoris_row(
        "dense-lycoris-full",
        network("full"),
        lambda drawn, _: sl.dense(),
        full_leaves,
        options(layers=("no-bias",)),  # LyCORIS trains a bias too
        Options(UNEQUAL, layer="no-bias"),
    ),
]
