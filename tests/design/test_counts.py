"""Parameter counts that the papers print, or that follow from their formulas."""

from __future__ import annotations

import pytest

import superlora as sl
from tests.strategies import Permuting, make_plan


def square_weights(layers, width, parts="qv"):
    return {f"blocks.{i}.{part}": (width, width) for i in range(layers) for part in parts}


VIT = square_weights(12, 768)
ROBERTA = VIT
GPT2 = square_weights(24, 1024)
FACT = square_weights(12, 768, parts="abcdefghijkl")  # q, k, v, o and four blocks of fc1 and fc2
PLANES = {"fold": "balanced"}


def cp(rank, order, **changes):
    return sl.Spec(rank=rank, order=order, core="identity", fold="balanced", **changes)


ROWS = [
    ("dense GPT-2-M", sl.dense(), GPT2, 50_331_648),
    ("dense ViT-B", sl.dense(), VIT, 14_155_776),
    ("LoRA GPT-2-M", sl.lora(rank=4), GPT2, 393_216),
    *[
        (f"LoRA ViT-B r={rank}", sl.lora(rank=rank), VIT, count)
        for rank, count in {1: 36_864, 8: 294_912, 34: 1_253_376, 128: 4_718_592}.items()
    ],
    *[
        (f"2-D reshape G={groups}", sl.lora(rank=1, groups=groups, **PLANES), VIT, count)
        for groups, count in {1: 7_552, 4: 15_104, 8: 21_504, 12: 26_112, 24: 36_864}.items()
    ],
    *[
        (f"no reshape G={groups}", sl.lora(rank=1, groups=groups, fold="stack"), VIT, count)
        for groups, count in {1: 19_200, 4: 21_504, 8: 24_576, 12: 27_648, 24: 36_864}.items()
    ],
    *[
        (f"LoRTA {order}-D r={rank}", sl.lorta(rank=rank, order=order), VIT, count)
        for order, rank, count in [
            (3, 1, 729),
            (3, 5, 3_765),
            (3, 6, 4_584),
            (3, 27, 39_339),
            (3, 28, 42_336),
            (4, 4, 1_240),
            (4, 8, 6_064),
            (4, 16, 69_472),
            (5, 4, 1_568),
            (5, 5, 3_805),
            (5, 8, 33_856),
        ]
    ],
    *[
        (
            f"a map of ratio {ratio}",
            sl.dense(groups=1, fold="balanced", map=Permuting(), ratio=ratio),
            VIT,
            count,
        )
        for ratio, count in {
            1.0: 14_155_776,
            0.5: 7_077_888,
            0.25: 3_538_944,
            0.1: 1_415_578,
            0.01: 141_558,
        }.items()
    ],
    ("0.12M: G=2, r=6", sl.lora(rank=6, groups=2, **PLANES), GPT2, 122_880),
    ("0.12M: G=3, r=5", sl.lora(rank=5, groups=3, **PLANES), GPT2, 122_880),
    ("0.12M: G=8, r=3", sl.lora(rank=3, groups=8, **PLANES), GPT2, 122_880),
    ("0.12M: no reshape", sl.lora(rank=2, groups=12, fold="stack"), GPT2, 122_880),
    ("0.12M: LoRTA G=2, r=32", sl.lorta(rank=32, groups=2), GPT2, 122_880),
    ("0.12M: LoRTA G=4, r=24", sl.lorta(rank=24, groups=4), GPT2, 122_880),
    ("0.12M: CP G=48, r=8", cp(8, 3, groups=48), GPT2, 122_880),
    ("0.115M: G=1, r=8", sl.lora(rank=8, groups=1, **PLANES), GPT2, 114_688),
    ("LoTR RoBERTa", sl.lotr(rank=2), ROBERTA, 3_168),
    ("FacT-TT r=16", sl.fact_tt(rank=16), FACT, 61_440),
    ("FacT-TT r=8", sl.fact_tt(rank=8), FACT, 21_504),
    ("FacT-TK r=16", sl.fact_tk(rank=16), FACT, 30_976),
    ("FacT-TK r=32", sl.fact_tk(rank=32), FACT, 86_528),
    # (24 x 32)(24 x 32) of 768 x 768, each weight: the first split dense, the second of rank 8
    ("LoKr ViT-B", sl.lokr(rank=8), VIT, 24 * (24 * 24 + 8 * (32 + 32))),
    ("LoKr of two", sl.lokr(rank=8, decompose_both=True), VIT, 24 * 8 * (48 + 64)),
    ("KronA ViT-B", sl.krona(), VIT, 24 * (24 * 24 + 32 * 32)),
    # 768 = 8 * 8 * 12
    ("LoNKr ViT-B", sl.lonkr(rank=2, splits=3), VIT, 24 * 2 * (16 + 16 + 24)),
    ("GraLoRA ViT-B is LoRA's", sl.gralora(rank=8, blocks=4), VIT, 294_912),
    ("Monarch ViT-B", sl.monarch(blocks=4), VIT, 24 * 4 * 2 * 768),
    ("MiSS ViT-B", sl.miss(rank=64), VIT, 24 * 64 * 768),
    ("MiSS ViT-B, mini", sl.miss(rank=64, mini=1), VIT, 24 * 64),
    ("CDKA ViT-B", sl.cdka(rows=2, columns=8, terms=4), VIT, 24 * 4 * (384 * 8 + 2 * 96)),
    ("CDKA of numbers is LoRA", sl.cdka(rows=1, columns=1, terms=8), VIT, 294_912),
    ("ShareLoRA ViT-B", sl.share_lora(rank=8), VIT, 8 * 768 * (24 + 1)),
    ("ShareLoRA ViT-B, both", sl.share_lora(rank=8, which="AB"), VIT, 8 * 2 * 768),
    ("Tied-LoRA ViT-B", sl.tied_lora(rank=8), VIT, 8 * 2 * 768 + 24 * (768 + 8)),
    ("TensLoRA ViT-B", sl.tenslora((4, 2, 8, 8), fold=(12, 2, 768, 768)), VIT, 64 * 200 + 52),
    # 768 = 24 * 32
    ("TT-LoRA ViT-B", sl.tt_lora(rank=8), VIT, 24 * (8 * 24 + 64 * (32 + 24) + 8 * 32)),
    ("a train of ViT-B", sl.metatt(rank=8), VIT, 8 * 24 + 64 * 768 + 8 * 768),
]


@pytest.mark.parametrize(
    ("spec", "shapes", "count"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_the_count_is_the_published_one(spec, shapes, count):
    assert make_plan(spec, shapes).num_parameters == count


def test_lortas_formulas_hold_for_every_rank():
    for order, widths in {3: 728, 4: 246, 5: 136}.items():
        for rank in range(1, 24):
            plan = sl.Plan(sl.lorta(rank=rank, order=order), VIT)
            assert plan.num_parameters == rank**order + rank * widths
