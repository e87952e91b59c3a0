"""Round to nearest: every weight to the closest point of its group's min-max grid, no data.

The baseline that everything else is measured against. ``clip=search`` shrinks each group's range to
the one with the least squared error of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lutra.methods import Block, Result, check_choice, method
from lutra.methods.pack import pack
from lutra.solvers import ranges
from lutra.solvers.gptq_loop import round_to_nearest
from lutra.solvers.levels import Levels


@dataclass(frozen=True)
class Options:
    """Options of ``rtn``.

    Attributes:
        clip: ``none`` (min-max) or ``search``.
    """

    clip: str = "none"


@method("rtn", paper="round to nearest (baseline)", options=Options)
def quantize(block: Block, options: Options) -> Result:
    check_choice("rtn", "clip", options.clip, ("none", "search"))
    packed = {}
    for path, weight_OI in block.weights.items():
        format = block.formats[path]

        def find(weight_OS: Tensor, _: Tensor, format=format) -> Levels:  # type: ignore[no-untyped-def]
            search = options.clip == "search"
            found = (ranges.search_clip if search else ranges.min_max)(weight_OS, format.bits)
            return ranges.with_integer_zero(found) if format.kind == "int" else found

        solution = round_to_nearest(weight_OI, format.group_size_for(weight_OI.shape[1]), find)
        packed[path] = pack(solution, format)
    return Result(packed)
