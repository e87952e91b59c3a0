"""The module that stands in a model for a linear layer in flattened integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lutra.formats.flat import FlatWeight
from lutra.formats.layers import flat_format, stored_tensor_shapes
from lutra.kernels.dispatch import Choice
from lutra.kernels.flat import FlatKernel, FlatSpec, choose
from lutra.kernels.flat.before import Before
from lutra.kernels.flat.deferred import Deferred
from lutra.scheme import Format
from lutra.siblings import Siblings


class FlatLinear(nn.Module):
    """A layer whose weights and activations are multiplied as integers (:mod:`lutra.formats.flat`).

    The parameters carry the names and shapes of the checkpoint. :meth:`prepare` hands the digits to
    the kernel of the device, in the kernel's own layout, and frees them; ``state_dict`` gives the
    stored form back. Layers that read one input may share a product, see
    :mod:`lutra.siblings_flat`; an input may bring along the norm or activation that is still to be
    computed of it, see :mod:`lutra.kernels.flat.deferred`.

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
        self.siblings: Siblings | None = None
        self._place = 0
        self._is_joined = False

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

    @property
    def weight_device(self) -> torch.device:
        """Where the weight lies, in whichever form."""
        return self.weight_scale.device

    def input_tensors(self) -> list[Tensor]:
        """The stored tensors that say how inputs become integers."""
        named = (self.input_limit, self.input_step, self.input_smooth, self.input_rotated)
        return [tensor.data for tensor in named if tensor is not None]

    @property
    def widths(self) -> list[int]:
        """Bits per weight that :meth:`serve` takes: those of the format alone."""
        return [self.format.bits]

    def serve(self, bits: int) -> None:
        """Nothing for the layer's own width; integers of fewer bits can not be cut from it."""
        if bits not in self.widths:
            raise ValueError(f"this layer serves {self.widths} bits, not {bits}")

    def read_bits_per_weight(self) -> float:
        """Bits that a product reads for each weight, scales and further columns among them."""
        read = sum(tensor.nbytes for tensor in self.stored().tensors().values())
        return 8 * read / (self.in_features * self.out_features)

    def prepare(self, dtype: torch.dtype) -> Choice:
        """Choose the kernel for activations of ``dtype`` and give it the weight in its layout."""
        if self.siblings is not None and self.siblings.prepare(dtype):
            assert self._choice is not None
            return self._choice
        self.release()
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
        """:meth:`prepare`, unless that is done or tensor parallelism has sharded the weight."""
        weight = self._parameters["weight"]
        if self._choice is not None or weight is None:
            return
        if not weight.is_meta and not hasattr(weight, "to_local"):
            self.prepare(dtype)

    def prepared_tensors(self) -> list[Tensor]:
        """What the kernel reads: the layer's own tensors, or those of its group."""
        if self._is_joined:
            assert self.siblings is not None
            return self.siblings.prepared
        return self._prepared

    def _digits(self) -> Tensor:
        if self._parameters["weight"] is not None:
            return self._parameters["weight"].data
        if self._is_joined:
            assert self.siblings is not None
            joint: Tensor = self.siblings.stored(self._place)
            return joint
        assert self._choice is not None and self._spec is not None
        digits: Tensor = self._choice.kernel.restore(self._prepared, self._spec)
        return digits

    def release(self) -> None:
        """Back to stored parameters, before the device or dtype changes."""
        if self._is_joined:
            assert self.siblings is not None
            self.siblings.release()
        if self._choice is None:
            return
        self._parameters["weight"] = nn.Parameter(self._digits(), requires_grad=False)
        self._choice, self._spec, self._prepared = None, None, []

    # ---- called by the group

    def enter_siblings(self, siblings: Siblings, place: int) -> None:
        """Become a member of a group, whose rows from some place on are this layer's."""
        self.siblings, self._place = siblings, place
        siblings.enter(self, place)

    def joined(self, choice: Choice, spec: FlatSpec) -> None:
        """The group holds the weight now, and multiplies it with ``choice``."""
        self._choice, self._spec, self._is_joined = choice, spec, True
        self._parameters["weight"] = None

    @property
    def gave_up_weight(self) -> bool:
        """Whether only the prepared form of the weight is held."""
        return self._parameters["weight"] is None

    def parted(self, digits: Tensor | None) -> None:
        """The group ends and gives the digits back; None if this layer has kept its own."""
        if digits is not None:
            self._parameters["weight"] = nn.Parameter(digits, requires_grad=False)
        self._choice, self._spec, self._is_joined = None, None, False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.siblings is not None:  # a copy of the group, which a copied layer enters itself
            self.siblings.enter(self, self._place)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlatLinear:
        if not self._is_kept_by(fn):
            self.release()
        names = [n for n in self._stored_names if n != "weight"]
        before = {n: None if p is None else p.data for n in names for p in [self._parameters[n]]}
        super()._apply(fn, recurse)
        for name, tensor in before.items():  # .half() and .to(dtype) must not round the scales
            after = self._parameters[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                moved = tensor.to(after.device)
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def _is_kept_by(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether ``fn`` leaves the weight and the bias as they are, as ``.to("cpu")`` mostly does.

        Preparing a weight takes as long as reading it, so it is not done again without need.
        """
        dtypes = [torch.int32] if self.bias is None else [torch.int32, self.bias.dtype]
        probes = [torch.empty(0, dtype=dtype, device=self.weight_device) for dtype in dtypes]
        return all(fn(probe) is probe for probe in probes)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._digits()
        if self._is_joined and self.bias is not None and not keep_vars:
            # It is a part of a larger tensor, and what is saved must not share memory.
            destination[prefix + "bias"] = self.bias.detach().clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def reads(self, before: Before, dtype: torch.dtype) -> bool:
        """Whether the layer's kernel computes ``before`` on the way to integers of its input."""
        if self._choice is None or self._spec is None or self._spec.dtype != dtype:
            return False
        reads: bool = not self.format.rotated and self._choice.kernel.reads(before, self._spec)
        return reads

    def forward(self, x: Tensor) -> Tensor:
        if self._choice is None or (self._spec is not None and self._spec.dtype != x.dtype):
            self.prepare(x.dtype)
        if self._is_joined:
            assert self.siblings is not None
            if self.siblings.usable():
                return self.siblings.multiply(x, self._place)
            self.prepare(x.dtype)
        assert self._choice is not None and self._spec is not None
        return product(
            x, self._choice.kernel, self._prepared, self.bias, self._spec, self.input_rotated
        )

    def extra_repr(self) -> str:
        kernel = self._choice.kernel.name if self._choice else "not prepared"
        bias = self.bias is not None
        shown = f"{self.in_features}, {self.out_features}, {self.format}, {bias=}, kernel={kernel}"
        if self.siblings is None:
            return shown
        return shown + self.siblings.describe(self._place, self._is_joined)


def product(
    x: Tensor, kernel: FlatKernel, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec,
    rotated: Tensor | None = None,
) -> Tensor:
    """A layer, or several as one, of an input that may bring along what comes before the layer."""
    if rotated is not None:
        x = kernel.rotate(x.value() if isinstance(x, Deferred) else x, rotated, spec)
    if isinstance(x, Deferred):
        if not x.is_computed and kernel.reads(x.before, spec):
            return kernel.linear_of(x.source, x.before, prepared, bias, spec)
        x = x.value()
    return kernel.linear(x, prepared, bias, spec)


def spec_of(
    format: Format, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> FlatSpec:
    """What a kernel needs to know of a layer of this format."""
    return FlatSpec(
        out_features, in_features, in_features + format.extra, format.bits, format.static,
        format.smooth, device, dtype,
    )  # fmt: skip
