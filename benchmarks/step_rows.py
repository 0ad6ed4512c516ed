"""The rows of `bench_step`: every method, of ours and of the peers, and its target."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models import Setting
from torch import Tensor, nn

LIMIT = "limit: frozen trunk"  # the row that the others are divided by
GROUP = "one group's vector"


@dataclass(frozen=True)
class Adapted:
    """A model that is ready for a step, and what is trained in it."""

    model: nn.Module
    parameters: list[Tensor]
    keep: Any = None  # what must stay alive beside the model


Adapt = Callable[[nn.Module, Setting], Adapted]


@dataclass(frozen=True)
class Row:
    """A method of one library; `targets` are what it may cost, by setting."""

    method: str
    library: str
    adapt: Adapt
    targets: Mapping[str, float] = field(default_factory=dict)  # step time over the limit's
    memory: tuple[str, float] | None = None  # its peak over another row's, or over the group

    @property
    def key(self) -> str:
        """The row's name, which `--rows` chooses by."""
        return f"{self.library}: {self.method}"


def _limit(model: nn.Module, setting: Setting) -> Adapted:
    return Adapted(model, [])


def _dense(model: nn.Module, setting: Setting) -> Adapted:
    """Train the targets' own weights; each is a parameter of its own on the shared storage."""
    found = []
    for name, module in model.named_modules():
        if setting.matches(name) and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach())
            found.append(module.weight)
    return Adapted(model, found)


def stacked(spec: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Return a spec with a stack for every shape among the weights.

    Weights of equal fields make up groups among themselves; a seed that draws nothing tells
    the fields of the shapes apart.
    """
    names: dict[tuple[int, ...], set[str]] = {}
    for name, shape in shapes.items():
        names.setdefault(shape, set()).add(name.rpartition(".")[2])
    overrides = {
        f"({'|'.join(sorted(suffixes))})": {"seed": index}
        for index, suffixes in enumerate(names.values())
        if index
    }
    return spec.replace(overrides=overrides)


def _ours(make: Callable[[Any], Any], *, stacks: bool = False) -> Adapt:
    def adapt(model: nn.Module, setting: Setting) -> Adapted:
        import superlora as sl
        import superlora.torch as slt

        spec, shapes = make(sl), setting.weights(model)
        if stacks:
            spec = stacked(spec, shapes)
        elif callable(spec):
            spec = spec(sum(map(math.prod, shapes.values())))
        adapter = slt.attach(model, spec, targets=setting.targets)
        return Adapted(model, list(adapter.parameters()), adapter)

    return adapt


def _peft(config: str, **fields: Any) -> Adapt:
    def adapt(model: nn.Module, setting: Setting) -> Adapted:
        import peft

        made = getattr(peft, config)(target_modules=setting.targets, **fields)
        found = peft.get_peft_model(model, made)
        return Adapted(found, [p for p in found.parameters() if p.requires_grad], found)

    return adapt


def _lycoris(algorithm: str, *, bypass: bool, **fields: Any) -> Adapt:
    def adapt(model: nn.Module, setting: Setting) -> Adapted:
        from lycoris.wrapper import LycorisNetwork

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)

        # The preset is an attribute of the class: all networks here have the same one.
        LycorisNetwork.apply_preset(
            {
                "enable_conv": False,
                "target_module": [],
                "target_name": [f".*\\.{target}" for target in setting.targets],
            }
        )
        network = LycorisNetwork(
            model,
            lora_dim=8,
            alpha=8,
            network_module=algorithm,
            bypass_mode=bypass,
            **fields,
        )
        network.apply_to()
        network.to(next(model.parameters()).device)
        adapted = len(network.loras)
        if adapted != len(setting.weights(model)):
            raise RuntimeError(f"LyCORIS adapted {adapted} layers of {len(setting.weights(model))}")
        return Adapted(model, list(network.parameters()), network)

    return adapt


AS_PEFT = ("PEFT: LoRA r8", 1.3)


def _row(
    method: str,
    make: Callable[[Any], Any],
    vit: float,
    llama: float,
    *,
    stacks: bool = False,
    memory: tuple[str, float] = AS_PEFT,
) -> Row:
    return Row(
        method, "ours", _ours(make, stacks=stacks), {"vit": vit, "llama": llama}, memory=memory
    )


def _joint(sl: Any, fold: str, **fields: Any) -> Any:
    return sl.Spec(rank=8, groups=1, fold=fold, **fields)


def _mapped(sl: Any, fixed: Any, fold: str = "balanced") -> Any:
    return _joint(sl, fold, ratio=0.1, map=fixed)


def _wide(sl: Any) -> Any:
    """Return a design of four modes whose last is the widest that divides all input widths.

    The least sum of the modes, which ``fold="aligned"`` has, takes a narrower one, and with it
    more blocks of inputs.
    """
    return lambda entries: sl.lorta(rank=8, order=4, fold=(*_cube(entries // 256), 256))


def _cube(entries: int) -> tuple[int, int, int]:
    side = round(entries ** (1 / 3))
    return side, side, -(-entries // side**2)


OURS = (
    Row("dense", "ours", _ours(lambda sl: sl.dense())),
    _row("LoRA r8", lambda sl: sl.lora(rank=8), 1.03, 1.15),
    _row("LoKr r8", lambda sl: sl.lokr(rank=8), 1.05, 1.4),
    _row("LoNKr K=3 r8", lambda sl: sl.lonkr(rank=8), 1.05, 1.6),
    _row("LoHa r8", lambda sl: sl.loha(rank=8), 1.1, 2.2),
    _row("LoTR r8", lambda sl: sl.lotr(rank=8), 1.05, 1.3, stacks=True),
    _row("FacT-TT r16", lambda sl: sl.fact_tt(rank=16), 1.05, 1.3, stacks=True),
    _row("VeRA r8", lambda sl: sl.vera(rank=8), 1.05, 1.2),
    _row("Uni-LoRA r4", lambda sl: sl.unilora(size=256, rank=4), 1.05, 1.2),
    _row("FourierFT n1000", lambda sl: sl.fourierft(size=1000), 1.1, 2.0),
    _row("2-D aligned r8", lambda sl: _joint(sl, "aligned"), 1.03, 1.2),
    _row("LoRTA 3-D aligned r8", lambda sl: sl.lorta(rank=8, fold="aligned"), 1.03, 1.2),
    _row("LoRTA 4-D aligned r8", lambda sl: sl.lorta(rank=8, order=4, fold="aligned"), 1.03, 1.2),
    _row("LoRTA 4-D aligned r8, last mode 256", _wide, 1.03, 1.2),
    _row("2-D balanced r8", lambda sl: _joint(sl, "balanced"), 1.1, 3.0),
    _row("LoRTA 3-D balanced r8", lambda sl: sl.lorta(rank=8), 1.1, 3.0),
    _row("LoRTA 4-D balanced r8", lambda sl: sl.lorta(rank=8, order=4), 1.1, 3.0),
    _row("2-D + separable", lambda sl: _mapped(sl, sl.maps.Separable(), "aligned"), 1.05, 1.4),
    _row("2-D + one-hot", lambda sl: _mapped(sl, sl.maps.OneHot()), 1.08, 6.0),
    _row(
        "2-D + one-hot, window 4096", lambda sl: _mapped(sl, sl.maps.OneHot(window=4096)), 1.08, 6.0
    ),
    _row(
        "2-D + fastfood, stacked",
        lambda sl: _mapped(sl, sl.maps.Fastfood(blocks="stacked")),
        1.5,
        7.0,
        memory=(GROUP, 2.0),
    ),
    Row("GLoRA r8", "ours", _ours(lambda sl: sl.glora(rank=8)), {"llama": 2.5}, memory=AS_PEFT),
)

PEFT = (
    Row("LoRA r8", "PEFT", _peft("LoraConfig", r=8, lora_alpha=8)),
    Row("LoKr r8", "PEFT", _peft("LoKrConfig", r=8, alpha=8)),
    Row("LoHa r8", "PEFT", _peft("LoHaConfig", r=8, alpha=8)),
    Row("FourierFT n1000", "PEFT", _peft("FourierFTConfig", n_frequency=1000)),
    Row("VeRA r8", "PEFT", _peft("VeraConfig", r=8)),
    Row("Uni-LoRA r4", "PEFT", _peft("UniLoraConfig", r=4, theta_d_length=256)),
    Row("GLoRA r8", "PEFT", _peft("GloraConfig", r=8)),
)

LYCORIS = tuple(
    Row(method, "LyCORIS bypass" if bypass else "LyCORIS", _lycoris(algorithm, bypass=bypass))
    for method, algorithm in (("LoRA r8", "locon"), ("LoKr r8", "lokr"), ("LoHa r8", "loha"))
    for bypass in (False, True)
)

ROWS = {
    row.key: row
    for row in (
        Row("frozen trunk", "limit", _limit),
        Row("dense", "torch", _dense),
        *OURS,
        *PEFT,
        *LYCORIS,
    )
}
