"""SuperLoRA's Figure 4 in small: a vision transformer on few digits, every method's rate searched.

The paper adapts a ViT-B to CIFAR-100: `cifar100`, ready for a machine with a GPU.
"""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.families import SHOWN, main, planar, projected, random_dense
from superlora import maps

METHODS = [
    *main(square=(1, 2, 4, 8, 16)),
    *projected("fastfood", maps.Fastfood()),
    *projected("one-hot", maps.OneHot()),
    *projected("separable", maps.Separable()),
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
    *random_dense(),
    Method("SuperLoRA 2-D r4, shuffled", "", planar(4, map=maps.Shuffle())),
]

EXPERIMENT = Experiment(
    title="ViT-S/14 on 500 MNIST digits of 28 pixels, query and value weights",
    task="digits",
    settings={
        **{"train": 500, "validation": 1400, "test": 1000, "resolution": 28},
        **{"epochs": 4, "batch_size": 20, "head_rate": 2e-3, "head_alone": 6e-3},
    },
    methods=METHODS,
    shown=SHOWN,
)
