"""Plans of `place_batch.cu` and its arguments: no GPU needed."""

from __future__ import annotations

import ctypes
import re

import pytest

from lutra.kernels.cuda import nvrtc, products
from lutra.kernels.cuda.launch import TYPICAL_CARDS
from lutra.kernels.cuda.layout import layout_of
from lutra.kernels.cuda.place_batch_plans import (
    MOST_GROUPS,
    PLACE_BATCH_TOKENS,
    PlaceBatchPlan,
    place_batch_fits,
    place_batch_plans,
    place_batch_shared_bytes,
    place_batch_sums,
    place_batch_work,
)

H200 = TYPICAL_CARDS["sm_90a"]


@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize(
    "shape", [(49152, 12288), (4096, 4096), (33, 96), (1, 300), (200000, 8192), (896, 4864)]
)
def test_plans(shape: tuple[int, int], bits: int) -> None:
    for group_size in (32, 128, 384, 1 << 20):
        layout = layout_of(*shape, bits, group_size, False)
        for tokens in (1, 4, 5, 16, 17, 64, 65):
            plans = place_batch_plans(layout, False, 2, tokens, H200)
            takes = 2 <= bits <= 4 and layout.group >= 128 and 5 <= tokens <= 64
            assert bool(plans) == takes
            for plan in plans:
                assert place_batch_fits(plan, layout, False, 2, tokens, H200)
                assert plan.tokens in PLACE_BATCH_TOKENS and plan.tokens >= tokens
                assert plan.groups <= MOST_GROUPS[plan.tall, plan.tokens][bits > 2]
                assert place_batch_shared_bytes(plan, layout) < H200.shared_bytes
                work = place_batch_work(plan, layout)
                units = -(-shape[0] // plan.rows) * layout.items * 2
                assert work.blocks * work.share + work.extra == units
                assert 0 < work.share and work.extra < work.blocks <= H200.processors
                sums, flags = place_batch_sums(plan, work)
                assert sums == work.blocks * plan.rows * plan.tokens
                assert flags == work.blocks * plan.groups * 4
    layout = layout_of(*shape, bits, 128, False)
    assert not place_batch_plans(layout, True, 2, 16, H200)
    assert not place_batch_plans(layout, False, 4, 16, H200)
    assert not place_batch_plans(layout, False, 2, 16, TYPICAL_CARDS["sm_89"])


def test_plans_of_other_versions_are_refused() -> None:
    layout = layout_of(4096, 4096, 3, 128, False)
    good = PlaceBatchPlan("place_batch", 32, 3, 1, 7, 132)
    assert place_batch_fits(good, layout, False, 2, 20, H200)
    for plan, tokens in (
        (good, 33),
        (PlaceBatchPlan("place_batch", 24, 3, 1, 8, 132), 20),
        (PlaceBatchPlan("place_batch", 32, 9, 1, 8, 132), 20),
        (PlaceBatchPlan("place_batch", 32, 3, 3, 8, 132), 20),
        (PlaceBatchPlan("place_batch", 32, 3, 1, 40, 132), 20),
        (PlaceBatchPlan("place_batch", 32, 3, 1, 8, 133), 20),
    ):
        assert not place_batch_fits(plan, layout, False, 2, tokens, H200)


@pytest.mark.parametrize(
    ("kernel", "struct"),
    [
        ("place_batch", products._PlaceBatchArguments),
        ("place_arrange", products._PrefillArrangeArguments),
    ],
)
def test_arguments_mirror_the_source(kernel: str, struct: type[ctypes.Structure]) -> None:
    source = nvrtc.source(kernel)
    types: dict[str, object] = {
        "int": ctypes.c_int,
        "long long": ctypes.c_longlong,
        "TensorMap": ctypes.c_ulonglong * 16,
        "Results": products._Results,
        "Shares": products._Shares,
    }

    def fields(name: str) -> list[tuple[str, object]]:
        body = re.search(rf"struct {name} \{{(.*?)\n\}};", source, re.DOTALL)
        assert body is not None
        text = re.sub(r"//[^\n]*|DEVICE[^\n]*", "", body[1])
        found: list[tuple[str, object]] = []
        for declaration in filter(str.strip, text.split(";")):
            words = re.fullmatch(r"\s*(.*?)\s*(\w+(?:\s*,\s*\w+)*)\s*", declaration, re.DOTALL)
            assert words is not None, declaration
            kind = ctypes.c_void_p if "*" in words[1] else types[words[1]]
            found += [(each.strip(), kind) for each in words[2].split(",")]
        return found

    assert fields("Arguments") == [f for f in struct._fields_ if f[0] != "padding"]
    if kernel == "place_batch":
        assert fields("Results") == list(products._Results._fields_)
        assert fields("Shares") == list(products._Shares._fields_)
        assert ctypes.sizeof(struct) % 64 == 0  # as the compiler pads it
