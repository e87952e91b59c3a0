"""The module that stands in a model for a linear layer in flattened integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lutra.formats.flat import FlatWeight, rotate_inputs
from lutra.formats.layers import flat_format, stored_tensor_shapes
from lutra.kernels.dispatch import Choice
from lutra.kernels.flat import FlatSpec, choose
from lutra.scheme import Format


class FlatLinear(nn.Module):
    """A layer whose weights and activations are multiplied as integers (:mod:`lutra.formats.flat`).

    The parameters carry the names and shapes of the checkpoint. :meth:`prepare` hands the digits to
    the kernel of the device, in the kernel's own layout, and frees them; ``state_dict`` gives the
    stored form back.

    Args:
        in_features, out_features: shape of the layer.
        format: storage format, for example ``Format.parse("flat4x12")``.
        bias: whether the layer has a bias.
        dtype: dtype of the bias.
    """

    # transformers >= 5.21 hands tensor-parallel modules DTensors unless they ask for local ones.
    _hf_quantized_needs_local_tp = True

    weight: Tensor | None
    weight_scale: Tensor
    input_limit: Tensor
    input_source: Tensor
    input_step: Tensor | None
    input_smooth: Tensor | None
    input_rotated: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        shapes = stored_tensor_shapes(format, out_features, in_features)
        self._stored_names = list(shapes)
        for name in ("input_step", "input_smooth", "input_rotated"):
            self.register_parameter(name, None)
        for name, (stored, shape) in shapes.items():
            empty = torch.empty(shape, dtype=stored)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
            if bias
            else None
        )
        self._choice: Choice | None = None
        self._spec: FlatSpec | None = None
        self._prepared: list[Tensor] = []

    @classmethod
    def from_weight(cls, weight: FlatWeight, bias: Tensor | None = None) -> FlatLinear:
        """A layer around a weight already packed."""
        format = flat_format(weight)
        with torch.device("meta"):
            layer = cls(weight.in_features, weight.out_features, format)
        for name, tensor in weight.tensors().items():
            layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    def stored(self) -> FlatWeight:
        """The weight in its stored form, whichever kernel holds it now."""
        digits = self._digits()
        step, smooth, rotated = self.input_step, self.input_smooth, self.input_rotated
        return FlatWeight(
            digits, self.weight_scale.data, self.input_limit.data, self.input_source.data,
            self.format.bits, self.in_features, None if step is None else step.data,
            None if smooth is None else smooth.data, None if rotated is None else rotated.data,
        )  # fmt: skip

    @property
    def choice(self) -> Choice | None:
        """The kernel in use and the reason for it; None before :meth:`prepare`."""
        return self._choice

    def prepare(self, dtype: torch.dtype) -> Choice:
        """Choose the kernel for activations of ``dtype`` and give it the weight in its layout."""
        self._release()
        weight = self.stored()
        self._spec = spec_of(
            self.format, self.out_features, self.in_features, weight.digits.device, dtype
        )
        self._choice = choose(self._spec)
        self._prepared = self._choice.kernel.prepare(weight, self._spec)
        if all(t.data_ptr() != weight.digits.data_ptr() for t in self._prepared):
            self._parameters["weight"] = None
        return self._choice

    def prepare_if_local(self, dtype: torch.dtype) -> None:
        """:meth:`prepare`, unless tensor parallelism has sharded the weight."""
        weight = self._parameters["weight"]
        if weight is not None and not weight.is_meta and not hasattr(weight, "to_local"):
            self.prepare(dtype)

    def _digits(self) -> Tensor:
        if self._parameters["weight"] is not None:
            return self._parameters["weight"].data
        assert self._choice is not None and self._spec is not None
        digits: Tensor = self._choice.kernel.restore(self._prepared, self._spec)
        return digits

    def _release(self) -> None:
        """Back to stored parameters, before the device or dtype changes."""
        if self._choice is None:
            return
        self._parameters["weight"] = nn.Parameter(self._digits(), requires_grad=False)
        self._choice, self._spec, self._prepared = None, None, []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlatLinear:
        self._release()
        kept = {n: self._parameters[n] for n in self._stored_names}
        before = {n: None if p is None else p.data for n, p in kept.items()}
        super()._apply(fn, recurse)
        for name, tensor in before.items():  # .half() and .to(dtype) must not round the scales
            after = self._parameters[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                moved = tensor.to(after.device)
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._digits()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if self._choice is None or (self._spec is not None and self._spec.dtype != x.dtype):
            self.prepare(x.dtype)
        assert self._choice is not None and self._spec is not None
        if self.input_rotated is not None:
            x = rotate_inputs(x, self.input_rotated)
        y: Tensor = self._choice.kernel.linear(x, self._prepared, self.bias, self._spec)
        return y

    def extra_repr(self) -> str:
        kernel = self._choice.kernel.name if self._choice else "not prepared"
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {self.format}, {bias=}, kernel={kernel}"


def spec_of(
    format: Format, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> FlatSpec:
    """What a kernel needs to know of a layer of this format."""
    return FlatSpec(
        out_features, in_features, in_features + format.extra, format.bits, format.static,
        format.smooth, device, dtype,
    )  # fmt: skip
