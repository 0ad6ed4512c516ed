"""PEFT's tuners of few numbers, with the places that it draws as fixed maps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import peft
from hypothesis import strategies as st
from torch import Tensor

import superlora as sl
from superlora import maps
from superlora._backend import Array, from_numpy
from tests.reductions.cases import Leaves, Options, Row, Take, options, transposed
from tests.reductions.peft_rows import CONV1D, LINEAR, NAME, UNEQUAL, peft_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftUniLora(maps.Map):
    """The projection that PEFT drew: every output is one input over the root of its count."""

    positions: tuple[int, ...]

    def _matrix(self, before: int, like: Array) -> Array:
        matrix = numpy.zeros((len(self.positions), before))
        matrix[numpy.arange(len(self.positions)), self.positions] = 1
        return from_numpy(matrix / numpy.sqrt(numpy.maximum(matrix.sum(axis=0), 1)), like)

    def apply(self, x: Array, size: int) -> Array:
        return self._matrix(x.shape[0], x) @ x

    def adjoint(self, y: Array, size: int) -> Array:
        return self._matrix(size, y).T @ y


def layers_of(model: Any, drawn: Options) -> dict[str, Any]:
    return {key: model.base_model.model.get_submodule(key) for key in drawn.widths}


def fourier_config(drawn: Options, **fields: Any) -> peft.FourierFTConfig:
    return peft.FourierFTConfig(
        n_frequency=drawn.extra,
        scaling=drawn.alpha * 10,
        random_loc_seed=drawn.seed,
        fan_in_fan_out=drawn.layer == "conv1d",
        **fields,
    )


def wavelet_config(drawn: Options, **fields: Any) -> peft.WaveFTConfig:
    return peft.WaveFTConfig(
        n_frequency=drawn.extra,
        scaling=drawn.alpha,
        random_loc_seed=drawn.seed,
        fan_in_fan_out=drawn.layer == "conv1d",
        **fields,
    )


def with_places(spec: sl.Spec, model: Any, drawn: Options) -> sl.Spec:
    """Give every weight the places that PEFT drew for its shape."""
    kind = type(spec.map)
    changes: dict[str, Any] = {}
    for name, layer in layers_of(model, drawn).items():
        indices = layer.waveft_indices if kind is maps.Wavelet else layer.indices
        rows, columns = indices[NAME].tolist()
        width = drawn.widths[name][1]
        places = tuple(u * width + v for u, v in zip(rows, columns, strict=True))
        changes[name.removeprefix("layers.")] = {
            "map": kind(**{kind.given: places}),
            "size": len(places),
        }
    return spec.replace(overrides=changes)


def fourier_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {"0.core": Take(layer.fourierft_spectrum[NAME])}


def wavelet_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {"0.core": Take(layer.waveft_spectrum[NAME])}


def circulant_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {"0.core": Take(layer.c3a_kernel[NAME], lambda kernels: kernels.reshape(-1))}


def not_transposed(layer: Any, drawn: Options) -> Tensor:
    # What PEFT forms is (output, input) of a Conv1D too: it transposes where it merges.
    return layer.get_delta_weight(NAME)


def unilora_config(drawn: Options) -> peft.UniLoraConfig:
    return peft.UniLoraConfig(
        r=drawn.rank,
        theta_d_length=drawn.extra,
        proj_seed=drawn.seed,
        fan_in_fan_out=drawn.layer == "conv1d",
    )


def with_positions(spec: sl.Spec, model: Any, drawn: Options) -> sl.Spec:
    """Take over which entry PEFT drew for each of LoRA's, B then Aᵀ of a layer."""
    positions: list[int] = []
    for layer in layers_of(model, drawn).values():
        positions += layer.unilora_indices_B[NAME].ravel().tolist()
        positions += transposed(layer.unilora_indices_A[NAME]).ravel().tolist()
    return spec.replace(factor_map=PeftUniLora(positions=tuple(positions)))


def unilora_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {"0.theta": Take(layer.unilora_theta_d[NAME])}


def fourier_row(name: str, layers: tuple[str, ...], **fields: Any) -> Row:
    return peft_row(
        name,
        lambda drawn: fourier_config(drawn, **fields),
        lambda drawn: sl.fourierft(drawn.extra, drawn.alpha * 10),
        fourier_leaves,
        options(sizes=st.integers(2, 9), layers=layers, extra=st.integers(1, 4)),
        Options(UNEQUAL, seed=3, layer=layers[0], extra=7),
        refine=with_places,
        formed=not_transposed,
        tolerance=2e-5,  # PEFT transforms in single precision, and the gradients' sums cancel
    )


def wavelet_row(name: str, layers: tuple[str, ...], **fields: Any) -> Row:
    return peft_row(
        name,
        lambda drawn: wavelet_config(drawn, **fields),
        lambda drawn: sl.waveft(drawn.extra, drawn.alpha),
        wavelet_leaves,
        options(sizes=st.integers(2, 9), layers=layers, extra=st.integers(1, 4)),
        Options(UNEQUAL, seed=3, layer=layers[0], extra=7),
        refine=with_places,
        formed=not_transposed,
    )


def circulant_row(name: str, block: int | None = None) -> Row:
    """A row of C3A; `block` is that of the second weight, if it has one of its own."""
    pattern = {} if block is None else {"b": block}
    own = {key: {"map": maps.Circulant(block=value)} for key, value in pattern.items()}
    return peft_row(
        name,
        lambda drawn: peft.C3AConfig(block_size=drawn.extra, block_size_pattern=pattern),
        lambda drawn: sl.c3a(drawn.extra, overrides=own),
        circulant_leaves,
        options(
            sizes=st.sampled_from([4, 8, 12]),
            count=st.just(3),
            extra=st.sampled_from([1, 2, 4]),
        ),
        Options(((8, 4), (4, 12), (12, 8)), extra=4),
        tolerance=2e-5,  # PEFT transforms in single precision
    )


ROWS = [
    circulant_row("c3a-peft"),
    circulant_row("c3a-peft-patterns", block=2),
    wavelet_row("waveft-peft", LINEAR),
    wavelet_row("waveft-peft-conv1d", CONV1D),
    wavelet_row("waveft-peft-patterns", LINEAR, n_frequency_pattern={"b": 2}),
    fourier_row("fourierft-peft", LINEAR),
    fourier_row("fourierft-peft-conv1d", CONV1D),
    fourier_row("fourierft-peft-patterns", LINEAR, n_frequency_pattern={"b": 2}),
]
ROWS += [
    peft_row(
        f"unilora-peft{'-conv1d' * (layers == CONV1D)}",
        unilora_config,
        lambda drawn: sl.unilora(drawn.extra, drawn.rank),
        unilora_leaves,
        # Also beyond the widths, where LoRA alone would be dense.
        options(layers=layers, rank=st.integers(1, 12), extra=st.integers(1, 12)),
        Options(UNEQUAL, 3, seed=3, layer=layers[0], extra=20),
        refine=with_positions,
        tolerance=1e-6,  # PEFT keeps the roots of the counts as float32 numbers
    )
    for layers in (LINEAR, CONV1D)
]
