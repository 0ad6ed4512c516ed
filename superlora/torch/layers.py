"""Which weights can be adapted: a table of kinds, and how a module of each holds its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Buffer, UninitializedParameter

from superlora.design.axes import Axes
from superlora.errors import AdapterError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Of tensors that hold numbers which can be added to.
_PLAIN = (nn.Parameter, Tensor, Buffer, UninitializedParameter)
_SUMMABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


class Kind(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    fits : callable
        Whether a module is of this kind.
    linear : bool
        Whether outputs are inputs times the transposed weight, so that an update can be added to
        them.
    axes : callable
        From the module and its parameter to the axes of the weight, and to the order of the
        parameter's axes in which it has them.
    gains_bias : bool
        Whether a module without a bias can be given one.
    """

    fits: Callable[[nn.Module], bool]
    linear: bool
    axes: Callable[[nn.Module, Tensor], tuple[Axes, tuple[int, ...]]]
    gains_bias: bool = False


def _matrix(_: nn.Module, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
    return Axes(*weight.shape), (0, 1)


def _turned(_: nn.Module, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
    columns, rows = weight.shape
    return Axes(rows, columns), (1, 0)


def _window(_: nn.Module, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
    rows, columns, *window = weight.shape
    return Axes(rows, columns, window=window), tuple(range(weight.dim()))


def _turned_window(_: nn.Module, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
    columns, rows, *window = weight.shape
    return Axes(rows, columns, window=window), (1, 0, *range(2, weight.dim()))


def _of_features(module: nn.Module, _: Tensor) -> tuple[Axes, tuple[int, ...]]:
    sizes: Any = module.out_features, module.in_features
    return Axes(*sizes), (0, 1)


def _vector(_: nn.Module, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
    return Axes(weight.shape[0], 1), (0,)


def _stacked(module: nn.Module, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
    """Return the axes of a bare parameter: the last two are those of a matrix."""
    if weight.dim() == 1:
        return _vector(module, weight)
    *stack, rows, columns = weight.shape
    order = [*range(weight.dim())]
    if is_input_first(module):
        rows, columns = columns, rows
        order[-2:] = order[:-3:-1]
    return Axes(rows, columns, stack=stack), tuple(order)


def is_input_first(module: nn.Module) -> bool:
    """Return whether a module multiplies inputs by its stacked weights, not by their transposes."""
    # transformers says it of its experts; older releases have these classes alone.
    known = ("GptOssExperts", "Llama4TextExperts")
    return bool(getattr(module, "is_transposed", False)) or type(module).__name__ in known


def is_transposed(module: nn.Module) -> bool:
    """Return whether `module` is GPT-2's ``Conv1D``, whose weight is (input, output)."""
    # By name, so that transformers need not be installed.
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _is_quantised(module: nn.Module) -> bool:
    """Return whether a module computes a linear map of a weight that cannot be added to."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes):
        return False
    weight = getattr(module, "weight", None)
    if weight is None:  # packed under other names
        return not isinstance(module, nn.Linear) and _holds_codes(module)
    if not isinstance(weight, Tensor):
        return False
    return not _is_summable(weight)


def _holds_codes(module: Any) -> bool:
    """Return whether a module has integers for a matrix of its sizes, of one bit each or more."""
    held = [*module._parameters.values(), *module._buffers.values()]
    codes = [each for each in held if each is not None and not each.is_floating_point()]
    bits = max((8 * each.numel() * each.element_size() for each in codes), default=0)
    return bool(bits >= module.in_features * module.out_features)


def _is_plain(weight: Tensor) -> bool:
    # A fake tensor stands for a plain one, as does one that processes share; a subclass that
    # computes as its base is none of codes.
    kind = type(weight)
    plain = kind in _PLAIN or kind.__name__ in ("DTensor", "FakeTensor", "FunctionalTensor")
    return plain or (
        kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        and kind.__torch_function__ in (Tensor.__torch_function__, nn.Parameter.__torch_function__)
    )


def _is_summable(weight: Tensor) -> bool:
    return _is_plain(weight) and weight.dtype in (*_SUMMABLE, *_COMPLEX)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not module._modules


# The first that fits counts.
KINDS: dict[str, Kind] = {
    "quantised": Kind(_is_quantised, True, _of_features),
    "linear": Kind(lambda m: isinstance(m, nn.Linear), True, _matrix, True),
    "Conv1D": Kind(is_transposed, True, _turned, True),
    "convolution": Kind(lambda m: isinstance(m, CONVOLUTIONS), False, _window, True),
    "transposed convolution": Kind(
        lambda m: isinstance(m, TRANSPOSED_CONVOLUTIONS), False, _turned_window, True
    ),
    "embedding": Kind(lambda m: isinstance(m, _EMBEDDINGS), False, _matrix),
    "bilinear": Kind(lambda m: isinstance(m, nn.Bilinear), False, _window, True),
    "norm": Kind(_is_norm, False, _vector),
    # Any parameter of any module, by its own name.
    "parameter": Kind(lambda _: False, False, _stacked),
}
ADAPTABLE = (
    "Linear, Conv1D, Conv1d to Conv3d and their transposes, Embedding, EmbeddingBag, Bilinear, "
    "norms, quantised linear layers, and any parameter by its own name"
)


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of layer that a module is, if it is one."""
    if isinstance(module, torch.jit.ScriptModule):  # its forward is compiled
        return None
    return next((name for name, kind in KINDS.items() if kind.fits(module)), None)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, quantised or not."""
    kind = kind_of(module)
    return kind is not None and KINDS[kind].linear


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a model: the module that holds it, and under which name.

    Attributes
    ----------
    module : torch.nn.Module
        The module.
    kind : str
        A key of `KINDS`.
    key : str
        The parameter's name in the module.
    """

    module: nn.Module
    kind: str
    key: str = "weight"

    @classmethod
    def of(cls, module: nn.Module) -> Weight:
        """Return the weight of a layer."""
        kind = kind_of(module)
        assert kind is not None
        return cls(module, kind)

    @property
    def linear(self) -> bool:
        """Whether an update can be added to the layer's outputs."""
        return KINDS[self.kind].linear

    @property
    def summable(self) -> bool:
        """Whether an update can be added to the weight."""
        return self.kind != "quantised"

    @property
    def complex(self) -> bool:
        """Whether the weight is of complex numbers."""
        return self.summable and self.parameter.is_complex()

    @property
    def plain(self) -> bool:
        """Whether the weight is a tensor of numbers, none that stands for others."""
        return _is_plain(self.parameter)

    @property
    def addable(self) -> bool:
        """Whether the weight's numbers can be added to."""
        return _is_summable(self.parameter)

    @property
    def parameter(self) -> Tensor:
        """The weight as the module stores it."""
        if self.kind == "quantised":
            held = [*self.module._parameters.values(), *self.module._buffers.values()]
            return next(each for each in held if each is not None)
        weight = self.module._parameters[self.key]
        assert weight is not None
        return weight

    @property
    def dtype(self) -> torch.dtype:
        """That which a sum with the weight has; float32 where there is no such sum."""
        dtype = self.parameter.dtype.to_real()
        return dtype if self.summable and dtype in _SUMMABLE else torch.float32

    @property
    def axes(self) -> Axes:
        """The weight's axes; of complex numbers the parts are the last one."""
        return self._axes(self.parameter)[0]

    def _axes(self, weight: Tensor) -> tuple[Axes, tuple[int, ...]]:
        axes, order = KINDS[self.kind].axes(self.module, weight)
        if weight.is_complex():
            parts = Axes(axes.out, axes.in_, (*axes.window, 2), axes.stack)
            return parts, (*order, len(order))
        return axes, order

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored with the inputs before the outputs."""
        order = self._axes(self.parameter)[1]
        return order != tuple(range(len(order)))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape as a matrix."""
        return self.axes.matrix

    @property
    def bias(self) -> Tensor | None:
        """The module's bias, if it has one that belongs to this weight."""
        if self.key != "weight":
            return None
        bias = self.module._parameters.get("bias")
        return bias if bias is None or bias.dim() == 1 else None

    def form(self) -> Form:
        """Return how the weight is read as a matrix, and a matrix brought back."""
        axes, order = self._axes(self.parameter)
        inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
        plain = axes.plain and order == (0, 1)
        return Form(plain, self.complex, order, inverse, axes.matrix, axes.shape)


class Form(NamedTuple):
    """How a weight is read as a matrix: integers alone, for compilers see it too."""

    plain: bool
    complex: bool
    order: tuple[int, ...]
    inverse: tuple[int, ...]
    size: tuple[int, int]
    shape: tuple[int, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        """Read a tensor that is stored as the weight is as a matrix: a view where it can be."""
        if self.plain:
            return weight
        weight = torch.view_as_real(weight) if self.complex else weight
        return weight.permute(self.order).reshape(self.size)

    def stored(self, matrix: Tensor) -> Tensor:
        """Bring a matrix into the form in which the weight is stored."""
        if self.plain:
            return matrix
        if len(self.order) == 1:
            return matrix[:, 0]
        found = matrix.reshape(self.shape).permute(self.inverse)
        return torch.view_as_complex(found.contiguous()) if self.complex else found


def input_name(module: nn.Module) -> str:
    """Return what the layer's own forward calls its input."""
    return "x" if is_transposed(module) else "input"


def computes_plainly(module: nn.Module) -> bool:
    """Return whether the layer's own forward is ``x @ weightᵀ + bias`` and nothing else."""
    plain = type(module).forward is nn.Linear.forward or (
        is_transposed(module) and type(module).__name__ == "Conv1D"
    )
    return plain and kind_of(module) != "quantised"


def refuse_empty(rule: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise with a rule if tensors have no memory."""
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise AdapterError(f"{rule}: {len(empty)} lie on the meta device, first {empty[0]!r}")
