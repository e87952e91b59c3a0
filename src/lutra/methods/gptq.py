"""GPTQ: quantize column by column and let the rest of the row absorb each error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (ICLR 2023, arXiv 2210.17323), Algorithm 1. The grid of a group is the
min-max range of its weights when the loop reaches it, as in the paper; H is the mean of ``x^T x``
over the calibration tokens of the already quantized model, damped by 1 % of its mean diagonal. The
columns are taken in their own order (no "act-order"), so groups stay contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lutra.formats.bitplanes import BitPlanes
from lutra.formats.grouped import Grouped
from lutra.methods import Block, Result, check_choice, check_range, method
from lutra.methods.pack import pack
from lutra.solvers import ranges
from lutra.solvers.gptq_loop import quantize_with_feedback
from lutra.solvers.levels import UniformLevels
from lutra.solvers.parallel import map_layers


@dataclass(frozen=True)
class Options:
    """Options of ``gptq``.

    Attributes:
        damping: fraction of the mean diagonal added to H.
        clip: ``none`` (min-max, the paper) or ``search`` (least error weighted with 1 / U_jj^2).
    """

    damping: float = 0.01
    clip: str = "none"

    def __post_init__(self) -> None:
        check_range("gptq", "damping", self.damping, 0)
        check_choice("gptq", "clip", self.clip, ("none", "search"))


@method(
    "gptq",
    paper="GPTQ, ICLR 2023, arXiv 2210.17323",
    options=Options,
    needs=lambda options: frozenset({"hessian"}),
)
def quantize(block: Block, options: Options) -> Result:
    def solve(path: str, weight_OI: Tensor) -> BitPlanes | Grouped:
        format = block.formats[path]

        def find(weight_OS: Tensor, importance_S: Tensor) -> UniformLevels:
            if options.clip == "search":
                importance_OS = importance_S.expand_as(weight_OS)
                found = ranges.search_clip(weight_OS, format.bits, importance_OS)
            else:
                found = ranges.min_max(weight_OS, format.bits)
            return ranges.with_integer_zero(found) if format.kind == "int" else found

        solution = quantize_with_feedback(
            weight_OI,
            block.inputs[path].hessian_II,
            format.group_size_for(weight_OI.shape[1]),
            find,
            options.damping,
        )
        return pack(solution, format)

    return Result(map_layers(solve, block.weights))
