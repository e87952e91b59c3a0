"""AWQ: protect the weights that meet large activations, by rescaling channels before rounding.

Lin et al.: "AWQ: Activation-aware Weight Quantization" (MLSys 2024, arXiv 2306.00978), section 3.2.
At every fold site the inputs of the targets are multiplied by ``s = E|x|^a`` in the weights and
divided in the module before them; ``a`` is the one of 20 values in [0, 1) with the least output
error, then ranges are clipped by search. Where we differ: the output error is computed from the
Hessian, ``tr(E H E^T)``, which is the same mean over the calibration tokens without running the
layer 20 times; and v -> o is folded under grouped-query attention too, with one scale per source
channel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lutra.architectures import FoldSite, expand_scale, fold, reduce_scale
from lutra.formats.bitplanes import BitPlanes
from lutra.formats.grouped import Grouped
from lutra.methods import Block, Result, check_range, method
from lutra.methods.pack import pack
from lutra.scheme import Format
from lutra.solvers import ranges
from lutra.solvers.gptq_loop import Solution, output_error, round_to_nearest
from lutra.solvers.levels import UniformLevels
from lutra.solvers.parallel import map_layers


@dataclass(frozen=True)
class Options:
    """Options of ``awq``.

    Attributes:
        grid: values of the exponent that are tried; 0 scales nothing.
        clip: whether ranges are clipped by search afterwards.
    """

    grid: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        check_range("awq", "grid", self.grid, 0)


@method(
    "awq",
    paper="AWQ, MLSys 2024, arXiv 2306.00978",
    options=Options,
    scope="block",
    needs=lambda options: frozenset({"hessian"}),
)
def quantize(block: Block, options: Options) -> Result:
    shape = replace(block.architecture, transposed=False)  # weights are [out, in] here
    tensors = {f"{path}.weight": w for path, w in block.weights.items()} | block.parameters
    input_scale = {path: torch.ones_like(w[0]) for path, w in block.weights.items()}
    folded: set[str] = set()
    exponents = {}
    for site in shape.folds:
        if not all(t in block.weights for t in site.targets) or not _is_there(site, tensors):
            continue
        first = site.targets[0]
        absmean_C = reduce_scale(site, shape, block.inputs[first].absmean_I)
        best_loss, best_scale, best_exponent = torch.inf, torch.ones_like(absmean_C), 0.0
        for step in range(options.grid):
            exponent = step / options.grid
            scale_C = absmean_C.clamp_min(1e-4).pow(exponent)
            scale_C = scale_C / (scale_C.max() * scale_C.min()).sqrt()
            scale_I = expand_scale(site, shape, scale_C)
            loss = sum(
                _scaled_error(tensors[f"{t}.weight"], scale_I, block, t) for t in site.targets
            )
            if loss < best_loss:
                best_loss, best_scale, best_exponent = loss, scale_C, exponent
        changed = fold(site, shape, tensors, best_scale)
        folded.update(name for name in changed if name in block.parameters)
        tensors.update(changed)
        for target in site.targets:
            input_scale[target] = input_scale[target] * expand_scale(site, shape, best_scale)
        exponents["+".join(site.targets)] = best_exponent

    def solve(path: str, _: Tensor) -> tuple[BitPlanes | Grouped, float]:
        weight_OI, scale_I = tensors[f"{path}.weight"], input_scale[path]
        hessian_II = block.inputs[path].hessian_II
        importance_I = hessian_II.diagonal() / scale_I.square() if options.clip else None
        solution = _round(weight_OI, block.formats[path], importance_I)
        # Seen from the input before it was rescaled.
        error = output_error(weight_OI / scale_I, solution.decode() / scale_I, hessian_II)
        return pack(solution, block.formats[path]), error

    solved = map_layers(solve, block.weights)
    parameters = {name: tensors[name] for name in folded}
    return Result(
        {path: packed for path, (packed, _) in solved.items()},
        parameters,
        {path: error for path, (_, error) in solved.items()},
        {"exponents": exponents},
    )


def _is_there(site: FoldSite, tensors: dict[str, Tensor]) -> bool:
    return f"{site.source}.weight" in tensors


def _scaled_error(weight_OI: Tensor, scale_I: Tensor, block: Block, path: str) -> float:
    scaled_OI = weight_OI * scale_I
    rounded_OI = _round(scaled_OI, block.formats[path], None).decode()
    error_OI = (scaled_OI - rounded_OI) / scale_I
    return float(((error_OI @ block.inputs[path].hessian_II) * error_OI).sum())


def _round(weight_OI: Tensor, format: Format, importance_I: Tensor | None) -> Solution:
    group_size = format.group_size_for(weight_OI.shape[1])
    parts = iter(() if importance_I is None else importance_I.split(group_size))

    def find(weight_OS: Tensor, _: Tensor) -> UniformLevels:
        if importance_I is None:
            found = ranges.min_max(weight_OS, format.bits)
        else:
            importance_OS = next(parts).expand_as(weight_OS)
            found = ranges.search_clip(weight_OS, format.bits, importance_OS)
        return ranges.with_integer_zero(found) if format.kind == "int" else found

    return round_to_nearest(weight_OI, group_size, find)
