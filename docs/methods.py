"""The tables of `methods.md`, from the presets: ``python docs/methods.py`` rewrites them."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import superlora as sl

sys.path.insert(0, str(Path(__file__).parent))
from tables import between, replaced  # noqa: F401  (the page's test reads between)

PAGE = Path(__file__).parent / "methods.md"
# What the symbols of the table stand for where it shows numbers: L weights of do x di.
EXAMPLE = {"L": 4, "do": 24, "di": 36, "r": 2, "a": 8, "u": 5, "n": 10, "K": 3, "H": 3}
EXAMPLE |= {"b": 6, "k": 2}


def map_text(fixed: sl.maps.Map) -> str:
    """Return a map with the fields that differ from their defaults."""
    values = [(item, getattr(fixed, item.name)) for item in dataclasses.fields(fixed)]
    changed = [f"{item.name}={value!r}" for item, value in values if value != item.default]
    return f"{type(fixed).__name__}({', '.join(changed)})"


def fields_text(spec: sl.Spec) -> str:
    """Return the fields of a spec that differ from those of a bare one."""
    plain = sl.Spec()
    shown = []
    for item in dataclasses.fields(sl.Spec):
        value = getattr(spec, item.name)
        if value != getattr(plain, item.name) and item.name != "alpha":
            value = dict(value) if item.name == "frozen" else value
            if item.name == "overrides":
                value = {pattern: own and dict(own) for pattern, own in value}
            text = map_text(value) if isinstance(value, sl.maps.Map) else repr(value)
            shown.append(f"{item.name}={text}")
    return ", ".join(shown) or "the defaults"


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes
    ----------
    code : str
        The preset, in the symbols of ``EXAMPLE``.
    source : str
        Where the method is from.
    update : str
        The update of one weight, or its weight and bias where several operations change them.
    count : str
        Trainable parameters of L weights, a Python expression in these symbols.
    peer : str
        What the tests compare it with.
    verdict : str
        What they show.
    """

    code: str
    source: str
    update: str
    count: str
    peer: str
    verdict: str

    @property
    def preset(self) -> str:
        """Name of the function."""
        return self.code.partition("(")[0].removeprefix("sl.")

    def spec(self) -> sl.Spec | sl.Supports:
        """Return the spec for the example's numbers, or one for each merge operation."""
        spec: sl.Spec | sl.Supports = eval(self.code, {"sl": sl, **EXAMPLE})
        return spec

    def plan(self) -> sl.Plan:
        """Return the plan for the example's weights."""
        size = (EXAMPLE["do"], EXAMPLE["di"])
        return sl.Plan(self.spec(), {f"{i}.weight": size for i in range(EXAMPLE["L"])})

    def counted(self) -> int:
        """Return the value of `count`, where o1 x i1 … are the splits and D1 x D2 … the fold."""
        group = self.plan().layout.groups[0]
        sizes = {f"D{mode}": size for mode, size in enumerate(group.fold, start=1)}
        for index, split in enumerate(group.splits, start=1):
            sizes |= {f"o{index}": split.shape[0], f"i{index}": split.shape[-1]}
        value: int = eval(self.count, {**EXAMPLE, **sizes})
        return value

    def settings(self) -> str:
        """Return the fields that differ from those of a bare `Spec`, of every operation."""
        design = self.spec()
        if isinstance(design, sl.Spec):
            return fields_text(design)
        return "; ".join(
            f"{name}: {fields_text(own) if isinstance(own, sl.Spec) else f'entries of {own}'}"
            for name, own in design.items()
        )


ADDED = (
    Method("sl.dense()", "dense fine-tuning", "any matrix", "L*do*di", "LyCORIS full", "equal"),
    Method(
        "sl.lora(rank=r, alpha=a)",
        "LoRA, Hu et al. 2021; `rslora=True`: Kalajdzievski 2023",
        r"$s A_1 A_2^{\mathsf T}$",
        "L*r*(do + di)",
        "PEFT LoRA, LyCORIS LoCon",
        "equal",
    ),
    Method(
        "sl.lora_fa(rank=r, alpha=a)",
        "LoRA-FA, Zhang et al. 2023",
        r"$s A_1 A_2^{\mathsf T}$, $A_2$ frozen",
        "L*r*do",
        "PEFT LoRA with a frozen A",
        "equal",
    ),
    Method(
        "sl.lokr(rank=r)",
        "LoKr, Yeh et al. 2024",
        r"$s X_1 \otimes A_1 A_2^{\mathsf T}$",
        "L*(o1*i1 + r*(o2 + i2))",
        "PEFT LoKr, LyCORIS LoKr",
        "equal",
    ),
    Method(
        "sl.lokr(rank=1, decompose_both=True)",
        "LoKr, both factors of low rank",
        r"$s A_1 A_2^{\mathsf T} \otimes A_3 A_4^{\mathsf T}$",
        "L*(o1 + i1 + o2 + i2)",
        "PEFT LoKr, LyCORIS LoKr",
        "equal",
    ),
    Method(
        "sl.lokr(rank=r, factor=2)",
        "LoKr, first factor of bounded size",
        r"$s X_1 \otimes A_1 A_2^{\mathsf T}$",
        "L*(o1*i1 + r*(o2 + i2))",
        "PEFT LoKr, LyCORIS LoKr",
        "equal; where the bound exceeds the root of a width, PEFT's first factor is the "
        "larger one, LyCORIS' and ours the smaller one",
    ),
    Method(
        "sl.krona()",
        "KronA, Edalati et al. 2022",
        r"$s X_1 \otimes X_2$",
        "L*(o1*i1 + o2*i2)",
        "LyCORIS LoKr, full matrix",
        "equal",
    ),
    Method(
        "sl.loha(rank=r, alpha=a)",
        "LoHa, Hyeon-Woo et al. 2022",
        r"$s A_1 A_2^{\mathsf T} \circ A_3 A_4^{\mathsf T}$",
        "2*L*r*(do + di)",
        "PEFT LoHa, LyCORIS LoHa",
        "equal",
    ),
    Method(
        "sl.lonkr(rank=1, splits=K)",
        "LoNKr, SuperLoRA",
        r"$s \bigotimes_k A_{k1} A_{k2}^{\mathsf T}$",
        "L*(o1 + i1 + o2 + i2 + o3 + i3)",
        "none: chain of `numpy.kron`",
        "equal",
    ),
    Method(
        "sl.lotr(rank=r)",
        "LoTR, Bershatsky et al. 2024",
        r"$s A_2 C_l A_3^{\mathsf T}$",
        "L*r**2 + r*(do + di)",
        "published formula",
        "equal",
    ),
    Method(
        "sl.fact_tt(rank=r)",
        "FacT-TT, Jie and Deng 2023",
        r"$s A_2 C_l A_3^{\mathsf T}$",
        "L*r**2 + r*(do + di)",
        "published formula",
        "equal for weights of one shape; the MLP's blocks of columns are not contiguous here",
    ),
    Method(
        "sl.fact_tk(rank=r)",
        "FacT-TK, Jie and Deng 2023",
        r"Tucker of $(L, d_o, d_i)$",
        "r**3 + r*(L + do + di)",
        "published formula",
        r"equal for attention; the code's MLP is another model for $r$ = 3, 4, 8",
    ),
    Method(
        "sl.lorta(rank=r)",
        "LoRTA, SuperLoRA",
        "Tucker of a balanced fold",
        "r**3 + r*(D1 + D2 + D3)",
        "none: TensorLy's `tucker_to_tensor`",
        "equal",
    ),
    Method(
        "sl.lorta_cp(rank=r, fold=(2, L // 2, H, do // H, di))",
        "LoRTA, Hounie et al. 2024",
        r"CP of (layers, matrices, heads, head, $d_i$)",
        "r*(D1 + D2 + D3 + D4 + D5)",
        "published formula",
        "equal for this order of axes",
    ),
    Method(
        "sl.tenslora(rank=(2, 2, r, r), fold=(2, L // 2, do, di))",
        "TensLoRA, Marmoret et al. 2025",
        r"Tucker of (layers, matrices, $d_o$, $d_i$)",
        "4*r**2 + 2*(D1 + D2) + r*(D3 + D4)",
        "published formula",
        "equal for this order of axes",
    ),
    Method(
        "sl.metatt(rank=r)",
        "after MetaTT, Lopez-Piqueres et al. 2025",
        r"$s \sum_a (G_0)_{la} (G_1)_a G_2$, a train of $(L, d_o, d_i)$",
        "r*L + r**2*do + r*di",
        "NumPy",
        "another family than the paper's, whose train has the layers between inputs and outputs; "
        "`lotr` has them there",
    ),
    Method(
        "sl.metatt(rank=(2, r, r), fold=(2, L // 2, do, di))",
        "the same by layers and matrices",
        r"a train of (layers, matrices, $d_o$, $d_i$)",
        "2*D1 + 2*r*D2 + r**2*D3 + r*D4",
        "NumPy",
        "another family, likewise",
    ),
    Method(
        "sl.tt_lora(rank=r)",
        "TT-LoRA, Anjum et al. 2024",
        "a train of the digits of outputs and inputs",
        "L*(r*D1 + r**2*(D2 + D3) + r*D4)",
        "TensorLy's `tt_to_tensor`",
        "equal",
    ),
    Method(
        "sl.share_lora(rank=r)",
        'ShareLoRA, Song et al. 2024; `which="B"`, `which="AB"`',
        r"$s A_1 A_2^{\mathsf T}$, one $A_2$ for all $l$",
        "r*(L*do + di)",
        "published formula",
        "equal",
    ),
    Method(
        "sl.tied_lora(rank=r)",
        "Tied-LoRA, Renduchintala et al. 2024",
        r"$s \operatorname{diag}(v) B \operatorname{diag}(u) A$, one $B$ and one $A$ for all $l$",
        "r*(do + di) + L*(do + r)",
        "published formula",
        "equal; here $v$ starts at zero",
    ),
    Method(
        "sl.gralora(rank=2*r, blocks=k, alpha=a)",
        "GraLoRA, Jung et al. 2025",
        r"$k \times k$ blocks, each $s B_{jn} A_{jn}$ of rank $2r/k$",
        "2*L*r*(do + di)",
        "PEFT GraLoRA",
        "equal, without the LoRA that `hybrid_r` adds; up to rank 16 $k$",
    ),
    Method(
        "sl.monarch(blocks=k)",
        "Monarch, Dao et al. 2022; `terms=c`: MoRe, Tan et al. 2024",
        r"$s P_1 L P_2 R$, $L$ and $R$ of $k$ blocks",
        "L*k*(do + di)",
        "published formula",
        "equal where the blocks' inner width is a multiple of $k$",
    ),
    Method(
        "sl.miss(rank=r)",
        "MiSS, Kang and Yin 2024; `mini=m`: its mini form",
        r"$1^{\mathsf T} \otimes D$",
        "L*r*do",
        "PEFT MiSS",
        "equal where $r$ divides the inputs; the form `bat` multiplies $W_0$",
    ),
    Method(
        "sl.cdka(rows=2, columns=k, terms=3)",
        "CDKA, 2026",
        r"$s \sum_t B_t \otimes A_t$",
        "3*L*(do*k//2 + 2*di//k)",
        "published formula",
        "equal",
    ),
    Method(
        "sl.vera(rank=r)",
        "VeRA, Kopiczko et al. 2024",
        r"$s \operatorname{diag}(b) B \operatorname{diag}(d) A$, $B$ and $A$ frozen",
        "L*(do + r)",
        "PEFT VeRA",
        "equal with PEFT's $B$ and $A$; our own draws differ",
    ),
    Method(
        "sl.lora_xs(rank=r)",
        "LoRA-XS, Bałazy et al. 2024",
        r"$s U_r \Sigma_r C V_r^{\mathsf T}$, $C$ trained",
        "L*r**2",
        "none: NumPy's singular values",
        "equal",
    ),
    Method(
        "sl.tinylora(rank=r, projections=u)",
        "TinyLoRA, 2026",
        r"$s U_r \Sigma_r^{1/2} \sum_i v_i P_i\, \Sigma_r^{1/2} V_r^{\mathsf T}$, $v$ trained",
        "L*u",
        "PEFT TinyLoRA",
        "equal with PEFT's $P$; our own draws differ",
    ),
    Method(
        "sl.fourierft(size=n)",
        "FourierFT, Gao et al. 2024",
        r"$s \operatorname{Re} \operatorname{ifft2}(S)$, $n$ entries of $S$ trained",
        "L*n",
        "PEFT FourierFT",
        "equal with PEFT's frequencies, in single precision, which PEFT transforms in; our own "
        "draws differ",
    ),
    Method(
        "sl.waveft(size=n)",
        "WaveFT, Bilican et al. 2025",
        r"$s \operatorname{idwt2}(S)$, $n$ entries of $S$ trained",
        "L*n",
        "PEFT WaveFT",
        "equal with PEFT's positions and its default wavelet, odd widths too; our own draws differ",
    ),
    Method(
        "sl.c3a(block=b)",
        "C3A, Chen et al. 2024",
        r"$s / d_i$ times circulant blocks",
        "L*do*di//b",
        "PEFT C3A",
        "equal, in single precision, which PEFT transforms in; PEFT starts at random, ours at zero",
    ),
    Method(
        "sl.did(size=n)",
        "DID, Li et al. 2018, Aghajanyan et al. 2021",
        r"$s F_l \theta$, one $\theta$ for all $l$",
        "n",
        "published formula",
        "equal with explicit matrices $F_l$, which are isometric in the mean; the released code "
        "divides by the norm of each diagonal $G$ that it drew",
    ),
    Method(
        "sl.said(size=n)",
        "SAID, Aghajanyan et al. 2021",
        r"$s \lambda_l F_l \theta$, one $\theta$ for all $l$",
        "n + L",
        "published formula",
        r"equal, with the $F_l$ of DID; here $\lambda$ starts at zero and $\theta$ at random",
    ),
    Method(
        "sl.unilora(size=n, rank=r)",
        "Uni-LoRA, Li et al. 2025",
        r"$s A_1 A_2^{\mathsf T}$, all $A$ one-hot maps of one $\theta$",
        "n",
        "PEFT Uni-LoRA",
        "equal with PEFT's indices and $s$ = 1; our own draws differ",
    ),
    Method(
        "sl.nola(size=n, rank=r)",
        "NOLA, Koohpayegani et al. 2024",
        r"$s A_1 A_2^{\mathsf T}$, each $A$ a sum of $n$ random matrices",
        "2*L*n",
        "published formula",
        "equal with explicit matrices, which are our own draws; with one vector a factor",
    ),
)

# Those that change weights and biases in other ways than by adding to a weight.
MERGED = (
    Method(
        "sl.glora(rank=r)",
        "GLoRA, Chavan et al. 2023",
        r"$W_0 + W_0 \circ A + B$, $b_0 + b_0 \circ D + E + W_0 C$",
        "L*(2*r*(do + di) + r*(di + 1) + 2*do)",
        "PEFT GLoRA",
        "equal for every option that PEFT has, on layers with a bias; in PEFT $A$ and $B$ share "
        "an option, and so do $D$ and $E$",
    ),
    Method(
        'sl.glora(rank=r, product="matrix", weight_to_bias="none", scale_bias="none", '
        'add_bias="none")',
        "GLoRA of LyCORIS",
        r"$W_0 + W_0 A + B$",
        "L*r*(do + 3*di)",
        "LyCORIS GLoRA",
        "equal",
    ),
    Method(
        "sl.bitfit()",
        "BitFit, Ben Zaken et al. 2022",
        r"$b_0 + e$",
        "L*do",
        "published formula",
        "equal for the biases of the adapted layers",
    ),
    Method(
        "sl.ssf()",
        "SSF, Lian et al. 2022",
        r"$W_0 \circ \gamma 1^{\mathsf T}$, $b_0 \circ \gamma + \beta$",
        "2*L*do",
        "published formula",
        "equal after a linear layer",
    ),
    Method(
        "sl.ia3()",
        "IA³, Liu et al. 2022",
        r"$W_0 \circ \ell 1^{\mathsf T}$, $b_0 \circ \ell$",
        "L*do",
        "PEFT IA³",
        "equal",
    ),
    Method(
        'sl.ia3(inputs=["1.weight"])',
        "IA³, with layers whose inputs are scaled",
        r"$W_0 \circ 1 \ell^{\mathsf T}$ there",
        "(L - 1)*do + di",
        "PEFT IA³",
        "equal",
    ),
    Method(
        "sl.repadapter(rank=r)",
        "RepAdapter, Luo et al. 2023",
        r"$W_0 + W_0 U V$, $b_0 + W_0 p$",
        "L*(2*r*di + di)",
        "published formula",
        "equal without groups, with $p$ in the place of $Uc + d$",
    ),
    Method(
        "sl.prompt_add()",
        "a prompt added to every token",
        r"$b_0 + W_0 p$",
        "L*di",
        "published formula",
        "equal; prompts that are appended, as in VPT, are something else",
    ),
)
METHODS = (*ADDED, *MERGED)
# What gives the cells of a row.
Cells = Callable[[Method], tuple[str, ...]]


def preset_text(method: Method) -> str:
    """Return the preset's call, as a link to its page."""
    return f"{{py:func}}`{method.code.removeprefix('sl.')} <superlora.{method.preset}>`"


def in_tex(count: str) -> str:
    """Return a count as mathematics: `2*L*r*(do + di)` is 2 L r (d_o + d_i)."""
    text = re.sub(r"\b([A-Za-z])(\w)\b", r"\1_\2", count)
    text = re.sub(r"\*\*(\d)", r"^\1", text)
    return f"${text.replace('//', ' / ').replace('*', ' ')}$"


def table(methods: Sequence[Method], titles: Sequence[str], cells: Cells) -> str:
    """Return a table with a row for each method, whose cells stand below each other on phones."""
    lines = ["{.stacked}", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(cells(method))} |" for method in methods]
    return "\n".join(lines)


def update_cells(method: Method) -> tuple[str, ...]:
    """Return a preset with its source, what it computes, and how many parameters it trains."""
    return f"{preset_text(method)}<br>{method.source}", method.update, in_tex(method.count)


def comparison_cells(method: Method) -> tuple[str, ...]:
    """Return what a method is compared with, and the result."""
    return preset_text(method), method.peer, method.verdict


def settings_cells(method: Method) -> tuple[str, ...]:
    """Return the fields that a preset sets in the example, and its parameters there."""
    settings = method.settings()
    shown = f"`{settings}`" if "=" in settings else settings
    return preset_text(method), shown, f"{method.plan().num_parameters:,}"


def tables() -> dict[str, str]:
    """Return the tables of the page by the names of their markers."""
    return {
        "methods": table(ADDED, ("preset", "ΔW of a weight", "parameters"), update_cells),
        "operations": table(MERGED, ("preset", "weight, bias", "parameters"), update_cells),
        "comparisons": table(METHODS, ("preset", "compared with", "result"), comparison_cells),
        "settings": table(METHODS, ("preset", "fields", "parameters"), settings_cells),
    }


def main() -> None:
    """Rewrite the page's tables."""
    text = PAGE.read_text("utf-8")
    for name, found in tables().items():
        text = replaced(text, name, found)
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
