"""The layers of a checkpoint that we wrote: its config, its tensors, and reading one of them.

The layout is described in ``docs/FORMAT.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lutra.errors import CheckpointError, SchemeError
from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row
from lutra.formats.flat import FlatWeight, rotated_blocks, words_of
from lutra.formats.grouped import Grouped
from lutra.scheme import Format, Scheme

if TYPE_CHECKING:
    from lutra.formats.checkpoint import SourceCheckpoint

#: Version of the layout that this package writes. Readers accept it and every earlier one.
FORMAT_VERSION = 1
QUANT_METHOD = "lutra"


def quantization_config(scheme: Scheme, **facts: Any) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint that we write; ``facts`` are further keys."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "scheme": scheme.to_json(),
        **facts,
    }


def read_quantization_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a checkpoint that we wrote.

    Args:
        config: the content of ``config.json``, or of its ``quantization_config``.

    Raises:
        CheckpointError: not our checkpoint, written by a newer version, or damaged.
    """
    ours = config.get("quantization_config", config)
    if not isinstance(ours, Mapping) or "quant_method" not in ours:
        raise CheckpointError("the checkpoint is not quantized: its config.json does not say how")
    if ours["quant_method"] != QUANT_METHOD:
        raise CheckpointError(
            f"the checkpoint was quantized by {ours['quant_method']!r}, not by lutra"
        )
    version = ours.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"quantization_config has format_version {version!r}, not a number")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}, and this lutra reads up to "
            f"{FORMAT_VERSION}. Upgrade: pip install --upgrade lutra"
        )
    try:
        return Scheme.from_json(ours.get("scheme"))
    except SchemeError as error:
        raise CheckpointError(f"quantization_config in config.json is damaged: {error}") from error


def flat_format(weight: FlatWeight) -> Format:
    """The name of what a packed weight of flattened integers is stored as."""
    return Format(
        "flat", weight.bits, extra=weight.source.numel(), static=weight.step is not None,
        smooth=weight.smooth is not None,
        rotated=0 if weight.rotated is None else weight.rotated.shape[1],
    )  # fmt: skip


def stored_tensor_shapes(
    format: Format, out_features: int, in_features: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a quantized layer, by suffix; no weights needed."""
    if format.kind == "flat":
        columns = in_features + format.extra
        flat: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int32, (1, out_features, words_of(columns, format.bits))),
            "weight_scale": (torch.float32, (out_features,)),
            "input_limit": (torch.int32, (in_features,)),
            "input_source": (torch.int32, (format.extra,)),
        }
        if format.static:
            flat["input_step"] = (torch.float32, (1,))
        if format.smooth:
            flat["input_smooth"] = (torch.float32, (in_features,))
        if format.rotated:
            blocks = rotated_blocks(in_features, format.rotated)
            flat["input_rotated"] = (torch.int32, (blocks, format.rotated))
        return flat
    groups = groups_per_row(in_features, format.group_size_for(in_features))
    scale = format.scale_dtype
    scales = format.bits if format.kind == "bcq" else 1
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.int32, (format.bits, out_features, words_per_row(in_features))),
        "weight_scale": (scale, (scales, out_features, groups)),
    }
    if format.kind == "int":
        shapes["weight_zero_point"] = (torch.uint8, (out_features, groups))
        return shapes
    shapes["weight_offset"] = (scale, (out_features, groups))
    for bits in format.serve_bits:
        served = bits if format.kind == "bcq" else 1
        shapes[f"weight_scale_{bits}bit"] = (scale, (served, out_features, groups))
        shapes[f"weight_offset_{bits}bit"] = (scale, (out_features, groups))
    return shapes


def load_layer(
    checkpoint: SourceCheckpoint, layer: str, format: Format, in_features: int
) -> BitPlanes | Grouped | FlatWeight:
    """Read one quantized layer by the full name that it has in the module tree.

    Raises:
        CheckpointError: a tensor is missing, or its dtype or shape is not that of the format.
    """
    first = checkpoint.resolve(f"{layer}.weight")
    if first is None:
        raise CheckpointError(f"{checkpoint.path} has no tensor '{layer}.weight'")
    stem = first.removesuffix(".weight")
    shape = checkpoint.shape(first)
    if len(shape) != 3:
        raise CheckpointError(
            f"tensor {first!r} has shape {list(shape)}; a layer quantized as {format} has three "
            "dimensions [bits, out, words]. The file does not fit its quantization_config."
        )
    tensors = {}
    for suffix, (dtype, wanted) in stored_tensor_shapes(format, shape[1], in_features).items():
        name = f"{stem}.{suffix}"
        if name not in checkpoint:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor {name!r}, which {format} needs. "
                "The checkpoint is incomplete."
            )
        if checkpoint.shape(name) != wanted or checkpoint.dtype(name) != dtype:
            raise CheckpointError(
                f"tensor {name!r} is {checkpoint.dtype(name)} {list(checkpoint.shape(name))}; "
                f"{format} with {in_features} inputs needs {dtype} {list(wanted)}."
            )
        tensors[suffix] = checkpoint.tensor(name)
    if format.kind == "flat":
        return FlatWeight(
            tensors["weight"], tensors["weight_scale"], tensors["input_limit"],
            tensors["input_source"], format.bits, in_features, tensors.get("input_step"),
            tensors.get("input_smooth"), tensors.get("input_rotated"),
        )  # fmt: skip
    group_size = format.group_size_for(in_features)
    if format.kind == "int":
        return Grouped(
            tensors["weight"], tensors["weight_scale"], tensors["weight_zero_point"],
            in_features, group_size,
        )  # fmt: skip
    served = {
        b: (tensors[f"weight_scale_{b}bit"], tensors[f"weight_offset_{b}bit"])
        for b in format.serve_bits
    }
    return BitPlanes(
        tensors["weight"], tensors["weight_scale"], tensors["weight_offset"],
        in_features, group_size, served or None,
    )  # fmt: skip
