"""SuperLoRA's Figure 4 in small: a vision transformer on few digits, every method's rate searched.

The paper adapts a ViT-B to CIFAR-100; `cifar100` is that, ready for a machine with a GPU.
"""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from superlora import maps


def planar(rank: int, **changes: object) -> sl.Spec:
    """All weights in one group, which is folded to a nearly square matrix."""
    return sl.Spec(rank=rank, groups=1, fold="balanced", **changes)  # type: ignore[arg-type]


MAPS = {"fastfood": maps.Fastfood(), "one-hot": maps.OneHot(), "separable": maps.Separable()}
RATIOS = (0.5, 0.25, 0.1, 0.02, 0.01)

METHODS = [
    Method("head only", "", None),
    *family("LoRA", "r{rank}", sl.lora, rank=(1, 2, 4, 8)),
    *family("SuperLoRA 2-D", "r{rank}", planar, rank=(1, 2, 4, 8, 16)),
    *family("LoRTA 3-D", "r{rank}", lambda rank: sl.lorta(rank=rank, groups=1), rank=(5, 8, 16)),
    Method("dense", "", sl.dense()),
    *[
        made
        for name, own in MAPS.items()
        for made in family(
            f"2-D r8, {name}",
            "ρ {ratio}",
            lambda ratio, own=own: planar(8, map=own, ratio=ratio),
            ratio=RATIOS,
        )
    ],
    *family(
        "SuperLoRA 2-D by groups",
        "G {groups}",
        lambda groups: sl.Spec(rank=4, groups=groups, fold="balanced"),
        groups=(4, 8, 12),
    ),
    *family(
        "2-D without a fold",
        "r{rank}",
        lambda rank: sl.Spec(rank=rank, groups=1, fold=(9216, 384)),
        rank=(1, 4),
    ),
    *family(
        "LoRTA 4-D", "r{rank}", lambda rank: sl.lorta(rank=rank, order=4, groups=1), rank=(3, 5, 8)
    ),
    *family(
        "LoRTA 5-D", "r{rank}", lambda rank: sl.lorta(rank=rank, order=5, groups=1), rank=(3, 5)
    ),
    *family("LoKr", "r{rank}", sl.lokr, rank=(2, 8)),
    *family("LoNKr", "r{rank}", sl.lonkr, rank=(2, 4)),
    *family("LoTR", "r{rank}", sl.lotr, rank=(8, 16)),
    *family("MetaTT", "r{rank}", sl.metatt, rank=(4, 8)),
    *family("TT-LoRA", "r{rank}", sl.tt_lora, rank=(2, 4)),
    *family("LoRA-XS", "r{rank}", sl.lora_xs, rank=(8, 16)),
    *family("VeRA", "r{rank}", sl.vera, rank=(64, 256)),
    *family("Uni-LoRA", "{size}", sl.unilora, size=(256, 1024, 4096)),
    *family("WaveFT", "{size} a weight", sl.waveft, size=(100, 500)),
    *family("TinyLoRA", "{projections}", sl.tinylora, projections=(16, 64)),
    *family(
        "dense, fastfood",
        "ρ {ratio}",
        lambda ratio: sl.Spec(order=1, groups=1, map=maps.Fastfood(), ratio=ratio),
        ratio=(0.01, 0.001),
    ),
    Method("SuperLoRA 2-D r4, shuffled", "", planar(4, map=maps.Shuffle())),
]

EXPERIMENT = Experiment(
    title="ViT-S/14 on 500 MNIST digits of 28 pixels, query and value weights",
    task="digits",
    settings={
        **{"train": 500, "validation": 300, "test": 1000, "resolution": 28},
        **{"epochs": 4, "batch_size": 20, "head_rate": 2e-3},
    },
    methods=METHODS,
    rates=(2e-4, 0.2),
    shown=(
        *("LoRA", "SuperLoRA 2-D", "LoRTA 3-D", "2-D r8, fastfood", "2-D r8, one-hot"),
        *("LoKr", "LoTR", "Uni-LoRA", "VeRA", "LoRA-XS"),
    ),
)
