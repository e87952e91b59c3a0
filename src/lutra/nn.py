"""The module that stands in a model for a quantized linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lutra.kernels.ops  # noqa: F401  (registers the ops)
from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row
from lutra.formats.grouped import Grouped
from lutra.kernels.dispatch import Choice, LinearSpec, choose
from lutra.scheme import Format
from lutra.siblings import Siblings


class QuantizedLinear(nn.Module):
    """``y = x @ unpack(weight).T + bias``, multiplied from the packed weight by a kernel.

    The parameters carry the names and shapes of the checkpoint (``weight`` int32 ``[bits, out,
    ceil(in / 32)]`` and companions ``weight_*``). :meth:`prepare` hands them to the kernel of the
    device, in the kernel's own layout, and frees them; ``state_dict`` gives the stored form back.
    Layers that read one input may share a product, see :mod:`lutra.siblings`.

    Args:
        in_features, out_features: shape of the layer.
        format: storage format, for example ``Format.parse("bcq3g128")``.
        bias: whether the layer has a bias.
        dtype: dtype of the bias.
    """

    # transformers >= 5.21 hands tensor-parallel modules DTensors unless they ask for local ones.
    _hf_quantized_needs_local_tp = True

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
        self.group_size = format.group_size_for(in_features)
        self.served_bits = format.bits
        groups = groups_per_row(in_features, self.group_size)

        def parameter(shape: tuple[int, ...], dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        scale_dtype = format.scale_dtype
        words = words_per_row(in_features)
        self.weight = parameter((format.bits, out_features, words), torch.int32)
        scales = format.bits if format.kind == "bcq" else 1
        self.weight_scale = parameter((scales, out_features, groups), scale_dtype)
        if format.kind == "int":
            self.weight_zero_point = parameter((out_features, groups), torch.uint8)
        else:
            self.weight_offset = parameter((out_features, groups), scale_dtype)
        for bits in format.serve_bits:
            served = bits if format.kind == "bcq" else 1
            scale = parameter((served, out_features, groups), scale_dtype)
            self.register_parameter(f"weight_scale_{bits}bit", scale)
            offset = parameter((out_features, groups), scale_dtype)
            self.register_parameter(f"weight_offset_{bits}bit", offset)
        self.bias = parameter((out_features,), dtype) if bias else None
        self._stored_names = [n for n in self._parameters if n.startswith("weight")]
        self._choice: Choice | None = None
        self._spec: LinearSpec | None = None
        self._prepared: list[Tensor] = []
        self.siblings: Siblings | None = None
        self._place = 0
        self._is_joined = False

    @classmethod
    def from_weight(
        cls, weight: BitPlanes | Grouped, format: Format, bias: Tensor | None = None
    ) -> QuantizedLinear:
        """A layer around a weight already packed."""
        layer = cls(weight.in_features, weight.out_features, format, bias=False)
        for name, tensor in weight.tensors().items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    def stored(self) -> BitPlanes | Grouped:
        """The weight in its stored form, whichever kernel holds it now."""
        p = self._stored_parameters()
        common = {"in_features": self.in_features, "group_size": self.group_size}
        if self.format.kind == "int":
            return Grouped(p["weight"], p["weight_scale"], p["weight_zero_point"], **common)
        served = {
            b: (p[f"weight_scale_{b}bit"], p[f"weight_offset_{b}bit"])
            for b in self.format.serve_bits
        }
        scale, offset = p["weight_scale"], p["weight_offset"]
        return BitPlanes(p["weight"], scale, offset, served=served or None, **common)

    def bitplanes(self) -> BitPlanes:
        """The weight that is multiplied: stored planes, cut to the bits that are served."""
        stored = self.stored()
        planes = stored.to_bitplanes() if isinstance(stored, Grouped) else stored
        return planes.prefix(self.served_bits)

    @property
    def widths(self) -> list[int]:
        """Bits per weight that :meth:`serve` takes."""
        return sorted({*self.format.serve_bits, self.format.bits})

    def read_bits_per_weight(self) -> float:
        """Bits that a product reads for each weight, scales and offsets among them."""
        return self.bitplanes().bits_per_weight()

    def serve(self, bits: int) -> None:
        """Multiply with the first ``bits`` planes only, with the scales stored for them."""
        if bits not in self.widths:
            raise ValueError(f"this layer serves {self.widths} bits, not {bits}")
        self.release()
        self.served_bits = bits

    @property
    def choice(self) -> Choice | None:
        """The kernel in use and the reason for it; None before :meth:`prepare`."""
        return self._choice

    @property
    def weight_device(self) -> torch.device:
        """Where the weight lies, in whichever form."""
        if self._spec is not None:
            return self._spec.device
        return self.weight.device

    def prepare(self, dtype: torch.dtype) -> Choice:
        """Choose the kernel for activations of ``dtype`` and give it the weight in its layout."""
        if self.siblings is not None and self.siblings.prepare(dtype):
            assert self._choice is not None
            return self._choice
        self.release()
        weight = self.bitplanes()
        self._spec = LinearSpec.of(weight, dtype)
        self._choice = choose(self._spec)
        self._prepared = self._choice.kernel.prepare(weight, self._spec)
        held = {t.data_ptr() for t in self._prepared}
        if self.weight.data_ptr() not in held:
            self._drop_stored()
        return self._choice

    def prepare_if_local(self, dtype: torch.dtype) -> None:
        """:meth:`prepare`, unless that is done or tensor parallelism has sharded the weight."""
        weight = self._parameters["weight"]
        if self._choice is not None or weight is None:
            return
        if not weight.is_meta and not hasattr(weight, "to_local"):
            self.prepare(dtype)

    def _drop_stored(self) -> None:
        # Only a kernel that holds exactly the stored weight replaces it; otherwise both stay.
        if self.format.kind != "int" and not self.format.serve_bits:
            for name in self._stored_names:
                self._parameters[name] = None

    def _stored_parameters(self) -> dict[str, Tensor]:
        if self._parameters["weight"] is not None:
            return {n: getattr(self, n).data for n in self._stored_names}
        if self._is_joined:
            assert self.siblings is not None
            return self.siblings.stored(self._place).tensors()
        assert self._choice is not None and self._spec is not None
        return self._choice.kernel.restore(self._prepared, self._spec).tensors()

    def prepared_tensors(self) -> list[Tensor]:
        """What the kernel reads: the layer's own tensors, or those of its group."""
        if self._is_joined:
            assert self.siblings is not None
            return self.siblings.prepared
        return self._prepared

    def release(self) -> None:
        """Back to stored parameters, before the device, dtype or served bits change."""
        if self._is_joined:
            assert self.siblings is not None
            self.siblings.release()
        if self._choice is None:
            return
        self._keep_stored(self._stored_parameters())
        self._choice, self._spec, self._prepared = None, None, []

    def _keep_stored(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    # ---- called by Siblings

    def enter_siblings(self, siblings: Siblings, place: int) -> None:
        """Become a member of a group, whose rows from some place on are this layer's."""
        self.siblings, self._place = siblings, place
        siblings.enter(self, place)

    def joined(self, choice: Choice, spec: LinearSpec) -> None:
        """The group holds the weight now, and multiplies it with ``choice``."""
        self._choice, self._spec, self._is_joined = choice, spec, True
        self._drop_stored()

    @property
    def gave_up_weight(self) -> bool:
        """Whether only the prepared form of the weight is held."""
        return self._parameters["weight"] is None

    def parted(self, weight: BitPlanes | None) -> None:
        """The group ends and gives the weight back; None if this layer has kept its own."""
        if weight is not None:
            self._keep_stored(weight.tensors())
        self._choice, self._spec, self._is_joined = None, None, False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.siblings is not None:  # a copy of the group, which a copied layer enters itself
            self.siblings.enter(self, self._place)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        if not self._is_kept_by(fn):
            self.release()
        # The tensors, not the parameters: those get their new values in place.
        parameters = {n: self._parameters[n] for n in self._stored_names if n != "weight"}
        scales = {n: None if p is None else p.data for n, p in parameters.items()}
        super()._apply(fn, recurse)
        for name, before in scales.items():  # .half() and .to(dtype) must not round the scales
            after = self._parameters[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                kept = before.to(after.device)
                self._parameters[name] = nn.Parameter(kept, requires_grad=False)
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
        for name, tensor in self._stored_parameters().items():
            destination[prefix + name] = tensor
        if self._is_joined and self.bias is not None and not keep_vars:
            # It is a part of a larger tensor, and what is saved must not share memory.
            destination[prefix + "bias"] = self.bias.detach().clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if self._choice is None or (self._spec is not None and self._spec.dtype != x.dtype):
            self.prepare(x.dtype)
        if self._is_joined:
            assert self.siblings is not None
            if self.siblings.usable():
                return self.siblings.multiply(x, self._place)
            self.prepare(x.dtype)
        assert self._choice is not None and self._spec is not None
        return self._choice.kernel.linear(x, self._prepared, self.bias, self._spec)

    def extra_repr(self) -> str:
        kernel = self._choice.kernel.name if self._choice else "not prepared"
        bias = self.bias is not None
        shown = f"{self.in_features}, {self.out_features}, {self.format}, {bias=}, kernel={kernel}"
        if self.siblings is None:
            return shown
        return shown + self.siblings.describe(self._place, self._is_joined)
