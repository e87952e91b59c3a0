"""Tiny models of every family, quantized; and the dense models that they stand for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_FAMILIES, save_tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lutra.formats.checkpoint import SourceCheckpoint, load_layer
from lutra.runner.walk import Recipe, quantize_checkpoint
from lutra.scheme import Format

_LIKE_LLAMA = TINY_FAMILIES["llama"]
FAMILIES: dict[str, dict[str, Any]] = TINY_FAMILIES | {
    "phi3": _LIKE_LLAMA | {"tie_word_embeddings": False},
}
# Without an entry in lutra's table. Gemma caps its logits and scales its embeddings, StableLM turns
# a part of its heads, Falcon has parallel branches and blocks that return tuples.
UNKNOWN: dict[str, dict[str, Any]] = {
    "gemma2": _LIKE_LLAMA | {"head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 3.0},
    "stablelm": _LIKE_LLAMA | {"tie_word_embeddings": False},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
EVERY = FAMILIES | UNKNOWN


def recipe(method: str = "lut-gemm", bits: int = 3, text: Path | None = None, **changes: Any):
    """A recipe for tiny models; calibrated where a text is given."""
    if method == "lut-gemm" and "options" not in changes:
        changes["options"] = {"rounds": 1} if text else {"calibrated": False}
    values = {"group_size": 32, "samples": 8, "seq_len": 32, "calibration": text, **changes}
    return Recipe(method, bits, **values)


def make_source(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A random model of a family in ``folder``."""
    return save_tiny_model(folder, family, **(EVERY[family] | options))


def quantize_tiny(src: Path, dst: Path, *args: Any, **changes: Any) -> dict[str, Any]:
    return quantize_checkpoint(src, dst, recipe(*args, **changes))


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in however many shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dense_twin(src: Path, dst: Path, report: dict[str, Any], bits: int | None = None) -> nn.Module:
    """The source model in float32 with every stored weight unpacked into it.

    Built from the original and the files of ``dst`` alone, without lutra's own loading: parameters
    outside the packed layers (which AWQ changes) are those of ``dst``.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).eval()
    if "lm_head" in report["layers"]:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    stored = tensors_of(dst)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored and stored[name].shape == parameter.shape:
                parameter.copy_(stored[name])
        checkpoint = SourceCheckpoint.open(dst, quantized=True)
        for layer, facts in report["layers"].items():
            format = Format.parse(facts["format"])
            packed = load_layer(checkpoint, layer, format, facts["in_features"])
            if bits is not None:
                packed = packed.prefix(bits)  # type: ignore[union-attr]
            weight = packed.unpack()
            target = modules[layer].weight
            target.copy_(weight if isinstance(modules[layer], nn.Linear) else weight.T)
    return model


def ids() -> Tensor:
    """Two sentences of token ids."""
    return torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(ids()).logits.float()
