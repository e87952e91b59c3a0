"""What of the CUDA kernels can be checked without a GPU: the layout, the plans, the fake op."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.kernels.cuda import CudaKernel, kernels, tuning
from lutra.kernels.cuda.code_batch_plans import (
    code_batch_blocks,
    code_batch_plans,
    code_batch_row_blocks,
    code_batch_shared_bytes,
)
from lutra.kernels.cuda.launch import TYPICAL_CARDS, Card
from lutra.kernels.cuda.layout import (
    from_kernel_order,
    layout_for,
    layout_of,
    to_kernel_order,
)
from lutra.kernels.cuda.plans import (
    CodePlan,
    DensePlan,
    FewPlan,
    FieldPlan,
    code_plans,
    code_shared_bytes,
    dense_plans,
    few_plans,
    field_plans,
)
from lutra.kernels.cuda.prefill_plans import (
    PrefillPlan,
    PrefillWork,
    prefill_fits,
    prefill_plans,
    prefill_shared_bytes,
    prefill_tiles,
    prefill_work,
    shared_sums,
)
from lutra.kernels.cuda.sparse_plans import sparse_plans, sparse_sizes
from lutra.kernels.cuda.stream_plans import StreamPlan
from lutra.kernels.cuda.tuning import choose
from lutra.kernels.dispatch import LinearSpec

H200 = Card(0, "a Hopper card", (9, 0), 132, 232448, 233472)
L4 = Card(0, "an Ada card", (8, 9), 58, 101376, 102400)


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool,
    dtype: torch.dtype,
) -> BitPlanes:
    groups = groups_per_row(in_features, group_size)
    signs = torch.randint(0, 2, (bits, out_features, in_features)) * 2 - 1
    scale = torch.rand(1 if uniform else bits, out_features, groups).to(dtype)
    return BitPlanes.from_signs(
        signs, scale, torch.randn(out_features, groups).to(dtype), group_size
    )


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, 384, 512, 1 << 20])
@pytest.mark.parametrize("shape", [(16, 256), (1, 32), (33, 300), (50, 1000), (20, 1536)])
def test_layout_and_back(shape: tuple[int, int], group_size: int) -> None:
    torch.manual_seed(group_size)
    group_size = min(group_size, -(-shape[1] // 32) * 32)
    for bits, uniform, dtype in ((1, False, torch.float16), (3, False, torch.float32),
                                 (4, True, torch.float16)):
        weight = random_weight(*shape, bits, group_size, uniform, dtype)
        layout = layout_of(*shape, bits, group_size, weight.uniform)
        back = from_kernel_order(to_kernel_order(weight, layout), layout, group_size)
        for name, tensor in weight.tensors().items():
            assert torch.equal(back.tensors()[name], tensor), name


def test_layout_is_the_drawn_one() -> None:
    weight = random_weight(48, 512, 2, 128, False, torch.float16)
    layout = layout_of(48, 512, 2, 128, False)
    planes, scales = to_kernel_order(weight, layout)
    planes, scales = planes.view(3, 4, 2, 32, 2), scales.view(3, 4, 8, 3, 2)
    tile, slice_, q, g, t, half = 1, 3, 1, 5, 2, 1
    row = tile * 16 + half * 8 + g
    assert planes[tile, slice_, q, 4 * g + t, half] == weight.planes[q, row, slice_ * 4 + t]
    assert scales[tile, slice_, g, q, half] == weight.scale[q, row, slice_]
    assert scales[tile, slice_, g, 2, half] == weight.offset[row, slice_]


@pytest.mark.parametrize("card", [H200, L4], ids=lambda card: card.name)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_plans_fit_the_card(card: Card, bits: int) -> None:
    shapes = [(49152, 12288), (12288, 49152), (4096, 4096), (33, 96), (200000, 8192), (896, 4864)]
    for shape in shapes:
        for group_size in (32, 128, 1 << 20):
            layout = layout_of(*shape, bits, group_size, False)
            assert few_plans(layout, 2, 1, card)
            for tokens in (1, 2, 3, 8, 16):
                for plan in few_plans(layout, 4, tokens, card):
                    assert plan.shared_bytes * plan.blocks <= card.processor_shared_bytes
                    assert plan.shared_bytes <= card.shared_bytes
                    assert plan.tokens >= tokens and plan.warps % plan.k_warps == 0
                    assert plan.panel_items >= min(plan.k_warps, layout.items)
            for tokens in (5, 16, 33, 100, 300):
                fields = field_plans(layout, False, tokens, card)
                assert bool(fields) == (card is H200 and layout.group >= 128)
                for field in fields:
                    assert field.shared_bytes <= card.shared_bytes
                    assert (field.shared_bytes + 1024) * field.blocks <= card.processor_shared_bytes
                    assert field.row_blocks * field.warpgroups * 64 >= shape[0]
                takes = card is H200 and layout.group >= 128 and bits <= 4 and tokens <= 64
                sparse = sparse_plans(layout, False, 2, tokens, card)
                assert bool(sparse) == (takes and 2 <= bits <= 4 and tokens <= 8)
                for plan in sparse:
                    need = sparse_sizes(plan, layout)
                    rows = plan.clusters * plan.warps // plan.k_warps * plan.tiles * 16
                    assert rows * need.passes >= shape[0]
                    assert need.shared_bytes < card.shared_bytes
                uniform = layout_of(*shape, bits, group_size, True)
                blocks = code_batch_plans(uniform, True, 2, tokens, card)
                assert bool(blocks) == (takes and shape[1] <= 65536)
                for block in blocks:
                    assert code_batch_shared_bytes(block, uniform) < card.shared_bytes
                    assert code_batch_row_blocks(block, uniform) * block.rows >= shape[0]
                    assert code_batch_blocks(block, uniform, card) <= (
                        code_batch_row_blocks(block, uniform) * block.cluster
                    )
                for prefill in prefill_plans(layout, False, 2, tokens, card):
                    assert prefill_shared_bytes(prefill, layout, False) < card.shared_bytes
                    assert prefill_fits(prefill, layout, False, 2, tokens, card)
                codes = code_plans(layout, False, 2, tokens, card)
                assert bool(codes) == (card is H200 and layout.group >= 128 and bits <= 4)
                for code in codes:
                    shared = code_shared_bytes(
                        layout, False, code.tokens, code.warpgroups, code.stages
                    )
                    assert shared <= card.shared_bytes
                    assert (shared + 1024) * code.blocks <= card.processor_shared_bytes
                    assert code.cluster <= layout.items * 2 and code.near_tiles > 0
            for dense in dense_plans(layout):
                assert dense.rows % 16 == 0 and dense.rows > 0


def test_choice_comes_with_a_reason() -> None:
    layout = layout_of(4096, 4096, 3, 128, True)
    kinds = [type(choose(layout, True, 2, tokens, H200)[0]) for tokens in (1, 16, 4096)]
    assert kinds == [FewPlan, StreamPlan, PrefillPlan]
    wide = layout_of(4096, 4096, 6, 128, False)
    kinds = [type(choose(wide, False, 2, tokens, H200)[0]) for tokens in (1, 16, 64, 4096)]
    assert kinds == [FewPlan, FewPlan, FieldPlan, DensePlan]
    assert type(choose(layout, True, 2, 40, L4)[0]) is DensePlan
    assert all(choose(layout, True, 2, tokens, L4)[1] for tokens in (1, 40))


def test_measured_table_is_read_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LUTRA_CACHE", str(tmp_path))
    layout = layout_of(4096, 4096, 3, 128, True)
    plan = few_plans(layout, 2, 16, H200)[0]
    row = {"shape": "4096x4096", "format": "ubcq3g128", "tokens": 16, "us": 9.5,
           "plan": asdict(plan)}
    path = tuning.user_table(tuning.table_name(H200))
    tuning.save([row], H200, path)
    assert choose(layout, True, 2, 12, H200)[0] == plan
    assert "9.5 us" in choose(layout, True, 2, 12, H200)[1]
    assert isinstance(choose(layout, True, 2, 17, H200)[0], CodePlan)
    row["plan"] = asdict(plan) | {"shared_bytes": 1 << 20}  # a table of another version
    tuning.save([row], H200, path)
    assert isinstance(choose(layout, True, 2, 12, H200)[0], StreamPlan)
    path.write_text("{")
    tuning._table.cache_clear()
    choose.cache_clear()
    assert isinstance(choose(layout, True, 2, 12, H200)[0], StreamPlan)
    assert "is not used" in caplog.text
    tuning._table.cache_clear()
    choose.cache_clear()


def test_refusals_are_sentences() -> None:
    spec = LinearSpec(64, 256, 3, 128, False, torch.device("cpu"), torch.float16)
    assert "cpu" in (CudaKernel().supports(spec) or "")
    spec = LinearSpec(64, 256, 3, 128, False, torch.device("cuda", 0), torch.float32)
    assert "float32" in (CudaKernel().supports(spec) or "")
    spec = LinearSpec(64, 256, 3, 40, False, torch.device("cuda", 0), torch.float16)
    assert "40" in (CudaKernel().supports(spec) or "")
    if not torch.cuda.is_available():
        assert kernels() == []


def test_fake_op_gives_shape_and_dtype() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 256, dtype=torch.bfloat16)
        planes = torch.empty(16, dtype=torch.int32)
        y = torch.ops.lutra.cuda_linear(x, planes, planes, None, 40, 256, 3, 128, False)
        assert y.shape == (2, 5, 40) and y.dtype == torch.bfloat16


def test_argument_structs_mirror_the_sources() -> None:
    from lutra.kernels.cuda import nvrtc, products

    c_types = {
        "int": ctypes.c_int, "long long": ctypes.c_longlong, "TensorMap": ctypes.c_ulonglong * 16,
    }
    structs = {
        "binary_linear": products._FewArguments, "byte_linear": products._FewArguments,
        "exact_linear": products._FewArguments,
        "arrange": products._ArrangeArguments, "field_linear": products._FieldArguments,
        "code_linear": products._CodeArguments, "code_prefill": products._PrefillArguments,
        "prefill_arrange": products._PrefillArrangeArguments, "steps": products._StepsArguments,
        "dequantize": products._DequantizeArguments,
        "stream_linear": products._StreamArguments,
        "code_batch": products._CodeBatchArguments,
    }
    mapped_structs = (
        products._CodeArguments, products._CodeBatchArguments, products._PrefillArguments,
        products._StreamArguments,
    )
    for mapped in mapped_structs:
        assert ctypes.sizeof(mapped) % 64 == 0  # as the compiler pads it
    for name, struct in structs.items():
        body = re.search(r"struct Arguments \{(.*?)\};", nvrtc.source(name), re.DOTALL)
        assert body is not None
        fields = []
        for declaration in re.sub(r"//[^\n]*", "", body[1]).split(";"):
            words = re.fullmatch(r"\s*(.*?)\s*(\w+(?:\s*,\s*\w+)*)\s*", declaration, re.DOTALL)
            if not declaration.strip():
                continue
            assert words is not None, declaration
            kind = ctypes.c_void_p if "*" in words[1] else c_types[words[1]]
            fields += [(field.strip(), kind) for field in words[2].split(",")]
        assert fields == [field for field in struct._fields_ if field[0] != "padding"], name


def test_tiles_left_over_are_shared() -> None:
    """Clusters of `code_prefill.cu` take equal rounds of tiles and share all that are left."""
    card = TYPICAL_CARDS["sm_90a"]
    splits, shares = set(), set()
    for shape, tokens, half in itertools.product(
        [(28672, 8192), (4096, 14336), (1000, 300)], (128, 700, 4096), (True, False)
    ):
        layout = layout_of(*shape, 3, 128, True)
        units = layout.items * 2 + -(-layout.items * 2 // (16 if half else 32))
        for plan in prefill_plans(layout, True, 2, tokens, card):
            work = prefill_work(plan, layout, True, tokens, half, card)
            tiles = prefill_tiles(plan, layout, tokens)
            assert tiles == -(-layout.rows // (64 * plan.groups * plan.cluster)) * -(
                -tokens // plan.tokens
            )
            if plan.shares > 1:  # of every tile
                assert work == PrefillWork(tiles * plan.shares, 0, 0, 0) and not plan.split
                assert work.clusters * plan.cluster <= card.processors
                shares.add(plan.shares)
                continue
            assert work.clusters * work.share + work.extra == (tiles - work.whole) * units
            assert work.whole == tiles or work.whole % work.clusters == 0
            assert work.clusters * plan.cluster <= card.processors
            assert bool(plan.split) == (work.whole < tiles)
            floats, flags = shared_sums(plan, work)
            assert bool(floats) == bool(flags) == (work.whole < tiles)
            splits.add(plan.split)
    assert splits == {0, 1, 2} and shares == {2, 4}


def test_host_side_of_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments and grids, with the launches recorded instead of made."""
    from lutra.kernels.cuda import products

    launches: list[tuple[str, object, tuple[int, ...], int, int]] = []

    def function(name: str, defines: dict[str, int], device: Card, shared: int = 0) -> object:
        assert shared <= device.shared_bytes

        def launch(
            arguments: object, grid: tuple[int, ...], threads: int, cluster: int = 1
        ) -> None:
            assert all(1 <= n < 65536 for n in grid[1:]) and threads <= 1024
            assert grid[0] % cluster == 0
            launches.append((name, arguments, grid, threads, cluster))

        return launch

    monkeypatch.setattr(products, "function", function)
    monkeypatch.setattr(products, "card", lambda index: H200)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(
        products, "dense_workspace", lambda device, dtype: torch.empty(64 * 300, dtype=dtype)
    )
    boxes = []

    def word_boxes(
        pointer: int, rows: int, columns: int, box_rows: int, box_columns: int
    ) -> object:
        assert pointer % 16 == 0 and columns % 4 == 0 and columns % box_columns == 0
        assert box_rows <= 256 and box_columns <= 256
        boxes.append(rows)
        return (ctypes.c_ulonglong * 16)()

    monkeypatch.setattr(products, "word_boxes", word_boxes)
    names = set()
    for bits in (3, 5):
        weight = random_weight(200, 300, bits, 128, True, torch.float16)
        layout = layout_of(200, 300, bits, 128, True)
        planes, scales = to_kernel_order(weight, layout)
        for tokens in (1, 2, 3, 9, 16, 33, 70, 500):
            launches.clear()
            x = torch.randn(tokens, 600, dtype=torch.float16)[:, :300]
            y = products.multiply(x, planes, scales, torch.zeros(200).half(), layout, True)
            assert y.shape == (tokens, 200) and launches
            names |= {launch[0] for launch in launches}
            if launches[0][0] != "dequantize":
                first: Any = launches[0][1]
                assert first.x == x.data_ptr() and first.x_stride == 600
    assert set(boxes) == {layout.tiles}
    assert names == {
        "binary_linear", "byte_linear", "stream_linear", "arrange", "field_linear", "code_linear",
        "dequantize",
    }


def test_every_measured_plan_of_the_package_is_taken() -> None:
    """A row that does not fit its kernel any more would be passed over without a word."""
    tables = list((Path(tuning.__file__).parent / "tuned").glob("*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text(encoding="utf-8"))
        card = Card(0, table["card"], (9, 0), 132, 232448, 233472)
        for row in table["rows"]:
            rows, inputs = map(int, row["shape"].split("x"))
            u, bits, group = re.fullmatch(r"(u?)bcq(\d)g(\d+)", row["format"]).groups()
            spec = LinearSpec(
                rows, inputs, int(bits), inputs if group == "256" else int(group), bool(u),
                torch.device("cuda", 0), torch.float16,
            )  # fmt: skip
            _, reason = choose(layout_for(spec), bool(u), 2, row["tokens"], card)
            assert "fastest of those measured" in reason, row
