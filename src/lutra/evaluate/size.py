"""Size of a checkpoint, counted from the headers of its files.

Bits per weight of a quantized layer are all bits stored for it (``X.weight`` and its companions
``X.weight_*``: scales, offsets, zero points, tables of every served precision) over the number of
weights that the layer has in the model, ``out_features * in_features``. Nothing is assumed from the
format's name; padding counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lutra.errors import CheckpointError
from lutra.formats.bitplanes import WORD_BITS
from lutra.formats.checkpoint import QUANT_METHOD, SourceCheckpoint, read_quantization_config

#: What ``lutra quantize`` leaves beside the weights for reports; reading it is optional.
FACTS_FILE = "lutra_report.json"


@dataclass(frozen=True)
class LayerSize:
    """One quantized layer as it lies on disk.

    Attributes:
        name: the layer's name, without ``.weight``.
        format: the format's name, if the checkpoint says which.
        out_features, in_features: shape of the weight.
        stored_bytes: bytes of ``X.weight`` and of all its companions.
    """

    name: str
    format: str | None
    out_features: int
    in_features: int
    stored_bytes: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.weights


@dataclass(frozen=True)
class ModelSize:
    """What a checkpoint takes on disk.

    Attributes:
        layers: the quantized layers; empty for a dense checkpoint.
        bits_per_weight: over the quantized layers; of a dense checkpoint, over its matrices.
        bits_per_parameter: over the whole checkpoint, embeddings and norms included.
        parameters: parameters of the model, a quantized layer counting ``out * in``.
        size_bytes: bytes of all tensors.
    """

    layers: tuple[LayerSize, ...]
    bits_per_weight: float
    bits_per_parameter: float
    parameters: int
    size_bytes: int


def measure_size(folder: str | Path) -> ModelSize:
    """Measure a checkpoint, dense or quantized by lutra; no weights are read.

    Raises:
        CheckpointError: the folder is no sound checkpoint, or the number of inputs of a quantized
            layer is not to be found out.
    """
    checkpoint = SourceCheckpoint.open(folder, quantized=True)
    packed = [
        name.removesuffix(".weight")
        for name in checkpoint.names()
        if name.endswith(".weight")
        and len(checkpoint.shape(name)) == 3
        and checkpoint.dtype(name) == torch.int32
    ]
    bytes_of = {name: checkpoint.nbytes(name) for name in checkpoint.names()}
    total = sum(bytes_of.values())
    layers = _layer_sizes(checkpoint, packed, bytes_of)
    companions = {n for layer in packed for n in bytes_of if _is_of(n, layer)}
    others = [name for name in bytes_of if name not in companions]
    parameters = sum(_numel(checkpoint.shape(name)) for name in others)
    parameters += sum(layer.weights for layer in layers)
    if layers:
        stored = sum(layer.stored_bytes for layer in layers)
        weights = sum(layer.weights for layer in layers)
    else:
        matrices = [n for n in others if len(checkpoint.shape(n)) >= 2] or others
        stored = sum(bytes_of[n] for n in matrices)
        weights = sum(_numel(checkpoint.shape(n)) for n in matrices)
    return ModelSize(
        layers, 8 * stored / max(weights, 1), 8 * total / max(parameters, 1), parameters, total
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``lutra quantize`` wrote for reports, or an empty dict where it wrote nothing.

    Raises:
        CheckpointError: the file is there and is not a JSON object.
    """
    path = Path(folder) / FACTS_FILE
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read as JSON: {error}. Delete it.") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} is not a JSON object. Delete it.")
    return facts


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether a checkpoint with this ``config.json`` is one of ours."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _layer_sizes(
    checkpoint: SourceCheckpoint, packed: list[str], bytes_of: dict[str, int]
) -> tuple[LayerSize, ...]:
    if not packed:
        return ()
    scheme = read_quantization_config(checkpoint.config)
    recorded = read_facts(checkpoint.path).get("layers")
    inputs = _recorded_inputs(checkpoint, recorded if isinstance(recorded, dict) else {})
    flat = {name for name in packed if f"{name}.input_limit" in bytes_of}
    inputs |= {name: checkpoint.shape(f"{name}.input_limit")[0] for name in flat}
    if not all(layer in inputs for layer in packed):
        inputs |= _skeleton_inputs(checkpoint)
    sizes = []
    for layer in packed:
        words, out_features = checkpoint.shape(f"{layer}.weight")[2:0:-1]
        # The last word of a row may be partly used: its padding is stored but is no weight.
        in_features = inputs.get(layer)
        fits = in_features is not None and -(-in_features // WORD_BITS) == words
        if in_features is None or not (fits or layer in flat):
            raise CheckpointError(
                f"tensor '{layer}.weight' of {checkpoint.path} has {words} words a row, which does "
                f"not fit the {in_features or 'unknown number of'} inputs that this layer has in "
                "the model. config.json and the weights do not belong together."
            )
        stored = sum(n for name, n in bytes_of.items() if _is_of(name, layer))
        format = scheme.format_of(layer)
        name = None if format is None else str(format)
        sizes.append(LayerSize(layer, name, out_features, in_features, stored))
    return tuple(sizes)


def _is_of(name: str, layer: str) -> bool:
    """Whether a tensor is the packed weight of a layer or one of its companions."""
    return name.startswith((f"{layer}.weight", f"{layer}.input_"))


def _recorded_inputs(checkpoint: SourceCheckpoint, layers: dict[str, Any]) -> dict[str, int]:
    inputs = {}
    for module, fact in layers.items():
        name = checkpoint.resolve(f"{module}.weight")
        if name is not None and isinstance(fact, dict) and isinstance(fact.get("in_features"), int):
            inputs[name.removesuffix(".weight")] = fact["in_features"]
    return inputs


def _skeleton_inputs(checkpoint: SourceCheckpoint) -> dict[str, int]:
    """Inputs of every linear layer, from the model built without storage (meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: transformers can not build this model from config.json ({error})"
        ) from error
    inputs = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        name = checkpoint.resolve(f"{module_name}.weight")
        if name is not None:
            linear = isinstance(module, torch.nn.Linear)
            in_features = module.weight.shape[1 if linear else 0]
            inputs[name.removesuffix(".weight")] = int(in_features)
    return inputs
