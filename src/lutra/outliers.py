"""Put outliers into a model that computes the same as before, to test what is made for them.

Large language models have a few channels whose activations are tens of times larger than the rest
(LLM.int8, arXiv 2208.07339; SmoothQuant, arXiv 2211.10438); small models do not. These functions
give a small model such channels without changing what it computes, up to rounding of the weights:

- ``norms``: some channels of each norm in front of linears are scaled up, and the inputs of those
  linears down. Smoothing can undo this in closed form.
- ``up``: some outputs of up_proj (fc1) are scaled up and the inputs of down_proj (fc2) down. So can
  this, but only where that place is smoothed at all.
- ``twins``: pairs of new neurons in each MLP. Both copy the rows of a neuron that is there, scaled
  up, and write a copy of its column, scaled up, with opposite signs, so that they cancel. The
  channel is large in activations, for some tokens only, and in weights, and no scale makes both
  small: their product is what it is.

Injected outliers favour methods that treat channels one by one, such as all that scale or split
them; a table that uses them should say so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.architectures import Architecture, FoldSite, architecture_of, fold, fold_channels
from lutra.errors import SchemeError
from lutra.formats.checkpoint import SourceCheckpoint
from lutra.formats.output import OutputFolder

KINDS = ("norms", "up", "twins")
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")


def inject_outliers(
    src: str | Path,
    dst: str | Path,
    kinds: Sequence[str] = ("norms",),
    *,
    share: float = 0.01,
    low: float = 20.0,
    high: float = 60.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a copy of a checkpoint that computes the same and has outliers.

    Args:
        src: folder or hub id of a dense checkpoint of a family that lutra knows.
        dst: folder to write; must not exist.
        kinds: any of ``norms``, ``up``, ``twins``, see the module's docstring.
        share: channels that become outliers, as a share of those there are; at least two.
        low, high: factors are drawn between these. Twins have half the square root of theirs in
            their column, so that their product is large on both sides.
        seed: which channels, and how large.

    Returns:
        What was done: channels by block and kind.

    Raises:
        SchemeError: an unknown kind, a range that makes no sense, or a family without such a place.
        ResourceError: ``dst`` exists.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds:
        raise SchemeError(
            f"outliers are {', '.join(KINDS)}, not {unknown[0] if unknown else 'none at all'}"
        )
    if not (0 < share <= 0.5 and 1 <= low <= high):
        raise SchemeError(
            "the share of channels must be above 0 and at most 0.5, and factors from 1 up with the "
            f"lower first; not {share}, {low} and {high}"
        )
    checkpoint = SourceCheckpoint.open(src)
    shape = architecture_of(checkpoint.config)
    if not shape.known:
        raise SchemeError(f"lutra does not know where a {shape.family} model could be rescaled")
    count = checkpoint.config.get("num_hidden_layers") or checkpoint.config.get("n_layer")
    generator = torch.Generator().manual_seed(seed)
    settings = {"kinds": list(kinds), "share": share, "low": low, "high": high, "seed": seed}
    config = dict(checkpoint.config)
    done: dict[str, Any] = {**settings, "blocks": []}
    with OutputFolder(
        dst, {"source": checkpoint.fingerprint(), "outliers": settings}, checkpoint.total_bytes()
    ) as output:
        consumed: set[str] = set()
        for index in range(int(count or 0)):
            names = _block_names(checkpoint, f"{shape.blocks}.{index}.")
            tensors = {inner: checkpoint.tensor(stored) for inner, stored in names.items()}
            facts = {}
            for kind in kinds:
                change = {"norms": _norms, "up": _up, "twins": _twins}[kind]
                facts[kind] = change(tensors, shape, share, low, high, generator)
            if "twins" in kinds and not index:
                for key in _WIDTHS:
                    if config.get(key):
                        config[key] += facts["twins"]
            consumed.update(names.values())
            stored = {names[inner]: t.contiguous() for inner, t in tensors.items()}
            done["blocks"].append(facts)
            if f"block {index}" not in output.done_keys():
                output.write_shard(f"block {index}", stored)
        if "rest" not in output.done_keys():
            rest = {n: checkpoint.deferred(n) for n in checkpoint.names() if n not in consumed}
            output.write_shard("rest", rest)
        record = json.dumps(done, indent=2) + "\n"
        output.finish(config, checkpoint.side_files(), {"lutra_outliers.json": record})
    return done


def _block_names(checkpoint: SourceCheckpoint, prefix: str) -> dict[str, str]:
    """Names in the file by name in the block."""
    names = {}
    for spelled in (prefix, prefix.partition(".")[2]):
        for stored in checkpoint.names():
            if stored.startswith(spelled):
                names[stored.removeprefix(spelled)] = stored
        if names:
            break
    return names


def _norms(
    tensors: dict[str, Tensor], shape: Architecture, share: float, low: float, high: float,
    generator: torch.Generator,
) -> list[int]:  # fmt: skip
    counts = []
    for site in shape.folds:
        if site.source not in shape.linears and f"{site.source}.weight" in tensors:
            counts.append(_scale_up(tensors, site, shape, share, low, high, generator))
    return counts


def _up(
    tensors: dict[str, Tensor], shape: Architecture, share: float, low: float, high: float,
    generator: torch.Generator,
) -> list[int]:  # fmt: skip
    return [_scale_up(tensors, _mlp_site(shape), shape, share, low, high, generator)]


def _twins(
    tensors: dict[str, Tensor], shape: Architecture, share: float, low: float, high: float,
    generator: torch.Generator,
) -> int:  # fmt: skip
    site = _mlp_site(shape)
    if site.rows != "all" or shape.transposed:
        raise SchemeError(f"twins are not made in {shape.family} models, whose MLP is fused")
    down = f"{site.targets[0]}.weight"
    width = tensors[down].shape[1]
    pairs = max(1, int(share * width) // 2)
    copied = torch.randperm(width, generator=generator)[:pairs]
    factor = low + (high - low) * torch.rand(pairs, generator=generator)
    (group,) = [g for g in shape.groups if site.source in g]
    for path in group:
        for suffix in ("weight", "bias"):
            tensor = tensors.get(f"{path}.{suffix}")
            if tensor is None:
                continue
            rows = tensor[copied].float()
            if path == site.source:
                rows = rows * (factor[:, None] if rows.dim() == 2 else factor)
            rows = rows.to(tensor.dtype)
            tensors[f"{path}.{suffix}"] = torch.cat([tensor, rows, rows])
    columns = (tensors[down][:, copied].float() * factor.sqrt() / 2).to(tensors[down].dtype)
    tensors[down] = torch.cat([tensors[down], columns, -columns], dim=1)
    return 2 * pairs


def _mlp_site(shape: Architecture) -> FoldSite:
    for site in shape.folds:
        if site.source in shape.linears and not site.per_head:
            return site
    raise SchemeError(
        f"the MLP of {shape.family} models has no place where a scale could be taken up"
    )


def _scale_up(
    tensors: dict[str, Tensor], site: FoldSite, shape: Architecture, share: float, low: float,
    high: float, generator: torch.Generator,
) -> int:  # fmt: skip
    outputs = tensors[f"{site.source}.weight"].shape[0 if not shape.transposed else -1]
    channels = len(fold_channels(site, shape, outputs))
    count = min(channels, max(2, round(share * channels)))
    scale_C = torch.ones(channels)
    chosen = torch.randperm(channels, generator=generator)[:count]
    factor = low + (high - low) * torch.rand(count, generator=generator)
    scale_C[chosen] = 1 / factor
    tensors.update(fold(site, replace(shape), tensors, scale_C))
    return count
