"""transformers: load, run and save our checkpoints through its own quantizer interface.

After ``import lutra``, ``AutoModelForCausalLM.from_pretrained(folder)`` replaces the quantized
linears by :class:`lutra.nn.QuantizedLinear` and loads the packed tensors into them. Nothing is
patched. Without lutra, transformers ignores the unknown method with a warning and then fails on the
three-dimensional weights, which is why they have three dimensions.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lutra.architectures import is_linear
from lutra.errors import CheckpointError
from lutra.formats.checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    read_quantization_config,
    stored_tensor_shapes,
)
from lutra.formats.shard import read_header
from lutra.nn import QuantizedLinear
from lutra.nn_flat import FlatLinear
from lutra.packed import PackedLinear, packed_layers
from lutra.runtime.flat_inputs import defer
from lutra.runtime.generation import enable
from lutra.runtime.loading import is_preparing_later, prepare_layers
from lutra.scheme import Format, Scheme
from lutra.siblings import join_siblings


class LutraConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of our checkpoints; unknown keys are kept as they are.

    Raises:
        CheckpointError: the checkpoint was written by a newer format version, or is damaged.
    """

    def __init__(self, **values: Any) -> None:
        values.setdefault("format_version", FORMAT_VERSION)
        values.setdefault("scheme", [])
        values["quant_method"] = QUANT_METHOD
        self.layers: Scheme = read_quantization_config(values)
        self.values = values
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def __repr__(self) -> str:
        return f"LutraConfig({self.values})"


class LutraQuantizer(HfQuantizer):
    """Puts packed layers into a model that transformers builds. See the module's docstring."""

    requires_calibration = True  # a dense checkpoint is quantized by `lutra quantize`, not on load
    quantization_config: LutraConfig
    serialized_names = {"weight": ["weight", "weight_scale", "weight_offset"]}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        stored = _stored_names(checkpoint_files)
        for name, module in list(model.named_modules()):
            format = self._format_of(model, name)
            if format is None or not is_linear(module):
                continue
            layer = packed_placeholder(module, format)
            if stored:
                _check_present(name, layer, stored)
            model.set_submodule(name, layer)

    def _format_of(self, model: Any, name: str) -> Format | None:
        scheme = self.quantization_config.layers
        prefix = getattr(model, "base_model_prefix", "")
        # The bare base model (AutoModel) has no prefix on its names.
        return scheme.format_of(name) or scheme.format_of(f"{prefix}.{name}")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if isinstance(head, nn.Linear) and head.weight.dtype != model.dtype:
            head.to(model.dtype)  # transformers 5.17 leaves a head with an old name as it was saved
        if not is_preparing_later():
            _own_memory(model)
        join_siblings(model)
        defer(model)
        if not is_preparing_later():
            prepare_layers(model)
        if hasattr(model, "generate"):
            enable(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # A model that was saved passes the dtype's name, as its config then holds it.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, dense_linear(module, wanted))
        return model


def _own_memory(model: nn.Module) -> None:
    """Copy parameters that lie in the mapped file of packed weights.

    Loaded tensors are pieces of mapped files. Packed weights leave them for the layout of their
    kernel, and a file is unmapped with its last tensor: a norm that stayed would keep all of it.
    """
    mapped = _mapped_files()
    packed = list(packed_layers(model))
    left = {_mapping_of(p, mapped) for m in packed for p in m.parameters(recurse=False)} - {None}
    inside = {id(p) for m in packed for n, p in m.named_parameters() if n.startswith("weight")}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside and _mapping_of(tensor, mapped) in left:
            tensor.data = tensor.data.clone()


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which files of weights are mapped, sorted; none where Linux does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    ranges = [line.split()[0].split("-") for line in lines if ".safetensors" in line]
    return sorted((int(begin, 16), int(end, 16)) for begin, end in ranges)


def _mapping_of(tensor: torch.Tensor, mapped: list[tuple[int, int]]) -> int | None:
    """Where the mapped file begins that a tensor lies in, or None."""
    if tensor.device.type != "cpu" or hasattr(tensor, "to_local") or not mapped:
        return None
    address = tensor.data_ptr()
    place = bisect_right(mapped, (address, sys.maxsize)) - 1
    return mapped[place][0] if place >= 0 and address < mapped[place][1] else None


def packed_placeholder(module: nn.Module, format: Format) -> PackedLinear:
    """An empty packed layer of the shape of a dense one (nn.Linear or GPT-2's Conv1D), on meta."""
    weight = module.get_parameter("weight")
    out_features, in_features = weight.shape
    if not isinstance(module, nn.Linear):
        out_features, in_features = in_features, out_features
    kind = FlatLinear if format.kind == "flat" else QuantizedLinear
    with torch.device("meta"):
        return kind(
            in_features,
            out_features,
            format,
            bias=module.bias is not None,
            dtype=weight.dtype,
        )


def dense_linear(layer: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """The dense layer that a packed one stands for; its inputs are no longer quantized."""
    packed = layer.stored() if isinstance(layer, FlatLinear) else layer.bitplanes()
    weight = packed.unpack(torch.float32).to(dtype)
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear


def _stored_names(checkpoint_files: Any) -> set[str]:
    """Names of all tensors in the files that are about to be loaded."""
    names: set[str] = set()
    for file in checkpoint_files or ():
        if Path(file).suffix == ".safetensors":
            names.update(read_header(Path(file)).tensors)
    return names


def _check_present(name: str, layer: PackedLinear, stored: set[str]) -> None:
    """transformers only warns about a missing tensor and makes one up; for us that is an error."""
    suffixes = stored_tensor_shapes(layer.format, layer.out_features, layer.in_features)
    for suffix in suffixes:
        wanted = f"{name}.{suffix}"
        if wanted in stored or any(wanted.endswith(f".{s}") for s in stored):
            continue
        if any(s.endswith(f".{wanted}") for s in stored):
            continue
        raise CheckpointError(
            f"the checkpoint has no tensor {wanted!r}, which format {layer.format} needs. "
            "Is a shard missing, or was it quantized with another scheme?"
        )


def register() -> None:
    """Enter our classes in the tables of transformers; calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, LutraConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, LutraQuantizer)
