"""The tables in README.md that come from code: ``python docs/tables.py`` rewrites them."""

from __future__ import annotations

from pathlib import Path

import superlora as sl

README = Path(__file__).parent.parent / "README.md"
SHAPES = {
    f"blocks.{layer}.{part}": (768, 768) for layer in range(12) for part in ("query", "value")
}
PRESETS = (
    ("sl.dense()", "dense fine-tuning", "M = 1"),
    ("sl.lora(rank=8)", "LoRA", "M = 2, identity core"),
    ("sl.lokr(rank=8)", "LoKr", "K = 2, first split dense, second of rank r"),
    ("sl.lokr(rank=8, decompose_both=True)", "LoKr", "K = 2, both splits of rank r"),
    ("sl.loha(rank=8)", "LoHa", "K = 2, Hadamard product"),
    ("sl.krona()", "KronA", "K = 2, both splits dense"),
    ("sl.lonkr(rank=2, splits=3)", "LoNKr", "K = 3"),
    ("sl.lotr(rank=16)", "LoTR = FacT-TT", "G = 1, stack of weights, un-factored layer mode"),
    ("sl.fact_tk(rank=16)", "FacT-TK", "G = 1, stack of weights, M = 3"),
    ("sl.vera(rank=256)", "VeRA", "Hadamard product, two trained vectors for each weight"),
    ("sl.fourierft(size=1000)", "FourierFT", "M = 1, F a sparse Fourier transform"),
    ("sl.waveft(size=1000)", "WaveFT", "M = 1, F a sparse wavelet transform"),
    ("sl.c3a(block=256)", "C3A", "M = 1, F of circulant blocks"),
    ("sl.unilora(size=256)", "Uni-LoRA", "LoRA whose factors are a map of one vector"),
    ("sl.nola(size=64)", "NOLA", "LoRA whose factors are sums of random matrices"),
    ("sl.lora_xs(rank=8)", "LoRA-XS", "singular vectors frozen, core trained"),
    ('sl.Spec(rank=8, groups=1, fold="balanced")', "SuperLoRA 2-D", "G = 1, nearly square fold"),
    (
        'sl.Spec(rank=8, groups=1, fold="balanced", map=sl.maps.Fastfood(), ratio=0.1)',
        "SuperLoRA 2-D, projected",
        "the same, F fastfood",
    ),
    ("sl.lorta(rank=8)", "LoRTA 3-D", "G = 1, M = 3, full core"),
    ("sl.lorta(rank=8, order=4)", "LoRTA 4-D", "G = 1, M = 4, full core"),
    (
        'sl.lorta(rank=8, fold="aligned")',
        "LoRTA 3-D, aligned",
        "last mode divides every input width",
    ),
)


def preset_table() -> str:
    """Return the presets with their parameters for query and value of a ViT-B."""
    dense = sl.Plan(sl.dense(), SHAPES).num_dense
    lines = [
        "| preset | method | point of the equation | parameters | of dense |",
        "|---|---|---|--:|--:|",
    ]
    for code, method, point in PRESETS:
        count = sl.Plan(eval(code, {"sl": sl}), SHAPES).num_parameters
        lines.append(f"| `{code}` | {method} | {point} | {count:,} | {count / dense:.3%} |")
    return "\n".join(lines)


def between(text: str, name: str) -> str:
    """Return what stands between the markers of a table."""
    return text.split(f"<!-- {name} -->\n", 1)[1].split(f"\n<!-- /{name} -->", 1)[0]


def replaced(text: str, name: str, table: str) -> str:
    """Return `text` with another table between the markers."""
    return text.replace(
        f"<!-- {name} -->\n{between(text, name)}\n<!-- /{name} -->",
        f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
    )


def main() -> None:
    """Rewrite the presets' table."""
    text = replaced(README.read_text("utf-8"), "presets", preset_table())
    README.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
