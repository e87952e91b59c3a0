"""Round to nearest: every weight to the closest point of its group's min-max grid, no data.

The baseline that everything else is measured against. ``clip=search`` shrinks each group's range to
the one with the least squared error of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lutra.formats.bitplanes import BitPlanes
from lutra.formats.grouped import Grouped
from lutra.methods import Block, Result, check_choice, method
from lutra.methods.pack import pack
from lutra.solvers import ranges
from lutra.solvers.gptq_loop import round_to_nearest
from lutra.solvers.levels import UniformLevels
from lutra.solvers.parallel import map_layers


@dataclass(frozen=True)
class Options:
    """Options of ``rtn``.

    Attributes:
        clip: ``none`` (min-max) or ``search``.
    """

    clip: str = "none"

    def __post_init__(self) -> None:
        check_choice("rtn", "clip", self.clip, ("none", "search"))


@method("rtn", paper="round to nearest (baseline)", options=Options)
def quantize(block: Block, options: Options) -> Result:
    def solve(path: str, weight_OI: Tensor) -> BitPlanes | Grouped:
        format = block.formats[path]

        def find(weight_OS: Tensor, _: Tensor) -> UniformLevels:
            search = options.clip == "search"
            found = (ranges.search_clip if search else ranges.min_max)(weight_OS, format.bits)
            return ranges.with_integer_zero(found) if format.kind == "int" else found

        solution = round_to_nearest(weight_OI, format.group_size_for(weight_OI.shape[1]), find)
        return pack(solution, format)

    return Result(map_layers(solve, block.weights))
