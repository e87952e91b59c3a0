"""Plans and launches of the flat kernels: quantize the activations, then multiply integers.

`flat_quantize.cu` turns activations into columns of integers, one block a token. Then

- `flat_few.cu`, few tokens, Hopper: a cluster of blocks splits the inputs of some rows;
- `flat_linear.cu`, many tokens, Hopper: blocks go from tile to tile until all is done;
- `flat_mma.cu`, any number of tokens, other cards from compute capability 8.0.

All give the same integers, so the choice is of speed alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from lutra.errors import KernelError
from lutra.kernels.cuda.flat_layout import COLUMN_TILE, Prepared
from lutra.kernels.cuda.launch import Card, Function, card, function
from lutra.kernels.flat.before import ACTIVATIONS, Before, Norm, apply

BLOCK_RESERVE = 1024 + 512  # alignment of the tiles, and barriers
PROCESSOR_RESERVE = 1024  # of shared memory, for each block of a processor
STEP_PADDING = 256  # tokens; kernels read steps of whole tiles
MAX_FEW_TOKENS = 64
SMALL_WEIGHT = 24 << 20
_X_TYPES = {torch.float16: 0, torch.bfloat16: 1}
_BIAS_KINDS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
BIAS_DTYPES = tuple(_BIAS_KINDS)


# ---- quantizing activations


class _QuantizeArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p), ("second", ctypes.c_void_p), ("third", ctypes.c_void_p),
        ("q", ctypes.c_void_p), ("step", ctypes.c_void_p),
        ("static_step", ctypes.c_void_p), ("smooth", ctypes.c_void_p),
        ("keep", ctypes.c_void_p), ("wide", ctypes.c_void_p), ("entries", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong), ("q_stride", ctypes.c_longlong),
        ("second_stride", ctypes.c_longlong),
        ("tokens", ctypes.c_int), ("inputs", ctypes.c_int), ("first", ctypes.c_int),
        ("wide_count", ctypes.c_int), ("entry_count", ctypes.c_int),
        ("limit", ctypes.c_int), ("clamp", ctypes.c_int), ("epsilon", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class QuantizePlan:
    """A block of `flat_quantize.cu`.

    Attributes:
        threads: of the block.
        vectors: of 8 channels, for each thread; 0 where a token does not fit the registers.
        ahead: whether a block fetches its next token while it computes one.
        blocks: of a processor; bounds the registers of a thread.
    """

    threads: int
    vectors: int
    ahead: bool
    blocks: int


MOST_VECTORS = 12  # of a thread: what its registers hold beside what it computes with
MOST_VECTORS_COMPUTED = 8  # where something is computed on the way


def quantize_plan(inputs: int, tokens: int, kind: int = 0) -> QuantizePlan:
    """Many tokens: blocks that go from token to token. Few: short ways in each.

    Args:
        kind: what is computed on the way, ``INPUT`` of `flat_quantize.cu`.
    """
    vectors = max(1, -(-inputs // 8))
    if tokens <= MAX_FEW_TOKENS:
        each = -(-vectors // 1024)
        if each <= 4:
            threads = -(-vectors // each // 32) * 32
            return QuantizePlan(threads, each, False, 1)
    each = max(4, -(-vectors // 512))
    if each > MOST_VECTORS:
        return QuantizePlan(512, 0, False, 2)
    # Measured on an H200; `registers` is what the compiler needs for it, but for a few bytes.
    ahead, registers = kind == 0, 96 if kind in (1, 2) else 72
    if kind == 3 and vectors >= 2048:
        each, ahead = max(each, 8), each <= 8
    elif kind == 4 and vectors <= 4096:
        each = 4
    if each > 4:
        registers = 128
    threads = -(-vectors // each // 32) * 32
    return QuantizePlan(threads, each, ahead, max(1, 65536 // (registers * threads)))


def kind_of(before: Before | None) -> tuple[int, int]:
    """``INPUT`` and ``ACT`` of `flat_quantize.cu`."""
    if before is None:
        return 0, 0
    if isinstance(before, Norm):
        return (1 if before.bias is None else 2), 0
    return (3 if before.times is None else 4), ACTIVATIONS.index(before.name)


def quantize_instance(
    plan: QuantizePlan, inputs: int, dtype: torch.dtype, digit_bits: int, smooth: bool,
    aligned: bool, kind: tuple[int, int] = (0, 0),
) -> tuple[str, dict[str, int]]:
    """Kernel file and compile-time parameters.

    Args:
        inputs: channels of a token.
        aligned: whether every row of the activations starts at a multiple of 16 bytes.
        kind: of :func:`kind_of`.
    """
    full = aligned and plan.threads * plan.vectors * 8 == inputs
    return "flat_quantize", {
        "X_TYPE": _X_TYPES[dtype], "VECTORS": max(1, plan.vectors), "THREADS": plan.threads,
        "BLOCKS": plan.blocks, "HOLD": int(plan.vectors > 0), "AHEAD": int(plan.ahead),
        "SMOOTH": int(smooth), "WIDTH": digit_bits, "ALIGNED": int(aligned), "FULL": int(full),
        "INPUT": kind[0], "ACT": kind[1],
    }  # fmt: skip


def can_come_before(inputs: int) -> bool:
    """Whether a norm or an activation can be computed on the way to the integers of a layer."""
    return 0 < quantize_plan(inputs, 1 << 20, 1).vectors <= MOST_VECTORS_COMPUTED


def quantize(
    x: Tensor, prepared: Prepared, before: Before | None = None
) -> tuple[Tensor, Tensor]:
    """Columns of integers ``[tokens, bytes]`` int8 and steps of ``x`` ``[tokens, in]``.

    There are as many steps as tokens, up to a multiple of 256; those beyond are not written, and
    neither are columns whose weights are 0.

    Args:
        before: what is computed of ``x`` first; see :func:`can_come_before`.
    """
    device = card(x.device.index)
    tokens, inputs = x.shape
    pitch = prepared.columns * prepared.digit_bits // 8
    q = torch.empty((tokens, pitch), dtype=torch.int8, device=x.device)
    steps = -(-tokens // STEP_PADDING) * STEP_PADDING
    step = torch.empty(steps, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return q, step
    x, stride = _rows_of(x)
    aligned = x.data_ptr() % 16 == 0 and stride % 8 == 0
    second, third, second_stride, epsilon = None, None, 0, 0.0
    if isinstance(before, Norm):
        second, epsilon = before.weight.contiguous(), before.epsilon
        third = None if before.bias is None else before.bias.contiguous()
    elif before is not None and before.times is not None:
        second, second_stride = _rows_of(before.times)
    for other in (second, third):
        if other is not None:
            aligned &= other.data_ptr() % 16 == 0 and second_stride % 8 == 0
    kind = kind_of(before)
    plan = quantize_plan(inputs, tokens, kind[0])
    arguments = _QuantizeArguments(
        x.data_ptr(), None if second is None else second.data_ptr(),
        None if third is None else third.data_ptr(), q.data_ptr(), step.data_ptr(),
        _pointer(prepared.step), _pointer(prepared.smooth), _pointer(prepared.keep),
        _pointer(prepared.wide), _pointer(prepared.entries), stride, pitch, second_stride, tokens,
        inputs, prepared.high, len(prepared.wide), len(prepared.entries), prepared.limit,
        prepared.clamp, epsilon,
    )
    smooth = prepared.smooth.numel() > 0
    name, defines = quantize_instance(
        plan, inputs, x.dtype, prepared.digit_bits, smooth, aligned, kind
    )
    function(name, defines, device)(arguments, (_blocks(plan, tokens, device), 1, 1), plan.threads)
    return q, step


def _blocks(plan: QuantizePlan, tokens: int, device: Card) -> int:
    """Blocks of a launch: one a token, or as many as run at once.

    Fewer blocks with as many tokens each would leave some processors with a block more than others:
    5 to 9 % slower on an H200 with 4096 tokens.
    """
    return min(tokens, device.processors * plan.blocks) if plan.ahead else tokens


def _rows_of(x: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows are contiguous, and from row to row in elements."""
    tokens, inputs = x.shape
    if x.stride(1) != 1 or (x.stride(0) < inputs and tokens > 1):
        x = x.contiguous()
    return x, x.stride(0) if tokens > 1 else inputs


def _pointer(tensor: Tensor) -> int | None:
    return tensor.data_ptr() if tensor.numel() else None


# ---- rotating activations


class _RotateArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("index", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong), ("tokens", ctypes.c_int), ("inputs", ctypes.c_int),
        ("blocks", ctypes.c_int), ("factor", ctypes.c_float),
    ]  # fmt: skip


def rotates(inputs: int, block: int, device: Card) -> bool:
    """Whether `flat_rotate.cu` serves rows of so many inputs with blocks of this size."""
    return 32 <= block <= 1024 and 2 * inputs <= device.shared_bytes - 1024


def rotate_instance(
    inputs: int, block: int, dtype: torch.dtype, device: Card
) -> tuple[str, dict[str, int], int]:
    """Kernel file, compile-time parameters and bytes of shared memory."""
    tokens = max(1, min(4, (device.shared_bytes - 1024) // (2 * inputs)))
    defines = {"X_TYPE": _X_TYPES[dtype], "BLOCK": block, "TOKENS": tokens, "THREADS": 512}
    return "flat_rotate", defines, tokens * inputs * 2


def rotate(x: Tensor, rotated: Tensor) -> Tensor:
    """:func:`lutra.formats.flat.rotate_inputs` of ``x`` ``[tokens, in]``, bit for bit."""
    device = card(x.device.index)
    tokens, inputs = x.shape
    blocks, block = rotated.shape
    y = torch.empty((tokens, inputs), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    x, stride = _rows_of(x)
    name, defines, shared = rotate_instance(inputs, block, x.dtype, device)
    arguments = _RotateArguments(
        x.data_ptr(), y.data_ptr(), rotated.data_ptr(), stride, tokens, inputs, blocks, block**-0.5
    )
    grid = -(-tokens // defines["TOKENS"])
    function(name, defines, device, shared)(arguments, (grid, 1, 1), defines["THREADS"])
    return y


# ---- multiplying


@dataclass(frozen=True)
class Job:
    """A product: sizes, and what is compiled in."""

    rows: int
    tokens: int
    columns: int
    registers: bool
    digit_bits: int
    high: int
    y_bf16: bool

    @property
    def k_tiles(self) -> int:
        return self.columns // COLUMN_TILE

    @property
    def high_products(self) -> int:
        """High columns, in products of 32 bytes."""
        return self.high * self.digit_bits // 256

    @property
    def base(self) -> int:
        return 15 if self.digit_bits == 4 else 255

    @property
    def defines(self) -> dict[str, int]:
        return {"HORNER": int(self.high > 0), "Y_BF16": int(self.y_bf16)}

    @property
    def weight_bits(self) -> int:
        return 4 if self.registers else 8

    def stage_bytes(self, tokens: int, rows: int) -> int:
        return tokens * COLUMN_TILE + rows * COLUMN_TILE * self.weight_bits // 8


_Map = ctypes.c_uint64 * 16


class _LinearArguments(ctypes.Structure):
    _fields_ = [
        ("w", _Map), ("x", _Map), ("y", _Map),
        ("packed", ctypes.c_void_p), ("step", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("features", ctypes.c_int), ("tokens", ctypes.c_int),
        ("k_tiles", ctypes.c_int), ("high", ctypes.c_int), ("base", ctypes.c_int),
        ("feature_tiles", ctypes.c_int), ("token_tiles", ctypes.c_int), ("group", ctypes.c_int),
        ("bias_kind", ctypes.c_int), ("padding", ctypes.c_byte * 60),
    ]  # fmt: skip


class _FewArguments(ctypes.Structure):
    _fields_ = [
        ("w", _Map), ("x", _Map), ("y", ctypes.c_void_p),
        ("packed", ctypes.c_void_p), ("step", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p), ("y_stride", ctypes.c_longlong),
        ("features", ctypes.c_int), ("tokens", ctypes.c_int),
        ("k_tiles", ctypes.c_int), ("high", ctypes.c_int), ("base", ctypes.c_int),
        ("bias_kind", ctypes.c_int), ("padding", ctypes.c_byte * 56),
    ]  # fmt: skip


class _MmaArguments(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_void_p), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p),
        ("step", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("pitch", ctypes.c_longlong), ("y_stride", ctypes.c_longlong),
        ("features", ctypes.c_int), ("tokens", ctypes.c_int),
        ("k_tiles", ctypes.c_int), ("high", ctypes.c_int), ("base", ctypes.c_int),
        ("bias_kind", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class LinearPlan:
    """`flat_linear.cu`: tokens of a tile, tiles in flight, tiles of tokens that go together."""

    tokens: int
    stages: int
    group: int
    kernel: str = "flat_linear"


@dataclass(frozen=True)
class FewPlan:
    """`flat_few.cu`: tokens of a block, tiles in flight, blocks of a processor and of a cluster."""

    tokens: int
    stages: int
    blocks: int
    split: int
    kernel: str = "flat_few"


@dataclass(frozen=True)
class MmaPlan:
    """`flat_mma.cu`: tokens of a block, tiles in flight."""

    tokens: int
    stages: int
    kernel: str = "flat_mma"


Plan = LinearPlan | FewPlan | MmaPlan
_WARPGROUPS = 2


def linear_plans(job: Job, device: Card) -> Iterator[LinearPlan]:
    """Ways to run many tokens, the one that rule takes first."""
    rows = _WARPGROUPS * 64

    def plan(tokens: int) -> LinearPlan:
        y_bytes = _WARPGROUPS * 128 * 128
        room = device.shared_bytes - BLOCK_RESERVE - y_bytes
        return LinearPlan(tokens, room // job.stage_bytes(tokens, rows), 8)

    def cost(tokens: int) -> float:
        tiles = -(-job.rows // rows) * -(-job.tokens // tokens)
        # Narrow tiles read each weight from shared memory more often: 8 % slower when all are busy.
        return -(-tiles // device.processors) * tokens * (1.0 if tokens == 256 else 1.08)

    yield from map(plan, sorted((256, 128), key=cost))


def few_plans(job: Job, device: Card) -> Iterator[FewPlan]:
    """Ways to run few tokens, the one that rule takes first."""
    rows = _WARPGROUPS * 64
    tokens = next((t for t in (8, 16, 32, 64) if t >= job.tokens), 128)
    blocks = 1 if tokens == 128 else 2
    room = min(
        device.processor_shared_bytes // blocks - PROCESSOR_RESERVE, device.shared_bytes
    ) - BLOCK_RESERVE
    stages = room // job.stage_bytes(tokens, rows)
    tiles = -(-job.rows // rows) * -(-job.tokens // tokens)

    def cost(split: int) -> float:
        # Measured on an H200: larger clusters do not find room for all their blocks at once, and
        # each block more costs as much as one and a half tiles of inputs.
        slots = device.processors * blocks * (0.85 if split > 2 else 1.0)
        return -(-tiles * split // int(slots)) * (-(-job.k_tiles // split) + 4 + 1.5 * split)

    for split in sorted(range(1, min(8, job.k_tiles) + 1), key=cost):
        yield FewPlan(tokens, stages, blocks, split)


def mma_plans(job: Job, device: Card) -> Iterator[MmaPlan]:
    tokens = next((t for t in (16, 32, 64) if t >= job.tokens), 128)
    stage = (tokens + 128) * 64
    yield MmaPlan(tokens, min(4, (device.shared_bytes - 1024) // stage))


@cache
def choose(job: Job, device: Card) -> tuple[Plan, str]:
    """The plan of a product, and why."""
    if device.capability[0] != 9:
        return next(mma_plans(job, device)), f"{device.arch} has no wgmma"
    limit = MAX_FEW_TOKENS
    if job.rows * job.columns <= SMALL_WEIGHT:
        limit *= 2  # so few tiles that most processors would have none
    if job.tokens <= limit:
        return next(few_plans(job, device)), f"by rule: up to {limit} tokens"
    return next(linear_plans(job, device)), f"by rule: more than {limit} tokens"


def instance(plan: Plan, job: Job) -> tuple[str, dict[str, int], int]:
    """Kernel file, compile-time parameters and bytes of shared memory of a plan."""
    defines = {"TOKENS": plan.tokens, "STAGES": plan.stages, **job.defines}
    if isinstance(plan, MmaPlan):
        defines |= {"DIGIT_BITS": job.digit_bits}
        return plan.kernel, defines, plan.stages * (plan.tokens + 128) * 64
    defines |= {"WARPGROUPS": _WARPGROUPS, "WEIGHT_BITS": job.weight_bits}
    shared = plan.stages * job.stage_bytes(plan.tokens, _WARPGROUPS * 64) + 1024
    if isinstance(plan, FewPlan):
        defines |= {"BLOCKS": plan.blocks}
    else:
        defines |= {"OVERLAP": int(_overlaps(plan, job))}
        shared += _WARPGROUPS * _round(plan) * 128
    return plan.kernel, defines, shared


def _overlaps(plan: LinearPlan, job: Job) -> bool:
    """Whether half of a tile's sums are stored while the other half is multiplied."""
    return plan.tokens == 256 and job.k_tiles >= 3 and job.high_products <= 1


def load(plan: Plan, job: Job, device: Card) -> Function:
    """The kernel of a plan, compiled and on the device."""
    name, defines, shared = instance(plan, job)
    return function(name, defines, device, shared)


def _round(plan: LinearPlan) -> int:
    """Tokens that a warpgroup stores at a time."""
    return 64 if plan.tokens % 128 else 128


def run(
    plan: Plan, job: Job, q: Tensor, step: Tensor, prepared: Prepared, bias: Tensor | None,
    y: Tensor,
) -> None:
    """``y`` ``[tokens, rows]`` from integers; rows of ``y`` may lie apart."""
    device = card(q.device.index)
    kernel = load(plan, job, device)
    weight = prepared.weight
    bias_pointer = None if bias is None else bias.data_ptr()
    bias_kind = 0 if bias is None else _BIAS_KINDS[bias.dtype]
    scale, steps = prepared.scale.data_ptr(), step.data_ptr()
    tiles = job.k_tiles, job.high_products, job.base
    rows = _WARPGROUPS * 64
    if isinstance(plan, MmaPlan):
        mma = _MmaArguments(
            weight.data_ptr(), q.data_ptr(), y.data_ptr(), steps, scale, bias_pointer,
            q.stride(0), y.stride(0), job.rows, job.tokens, *tiles, bias_kind,
        )
        kernel(mma, (-(-job.rows // 128), -(-job.tokens // plan.tokens), 1), 256)
        return
    w_map, packed = None, None
    if job.registers:
        packed = weight.data_ptr()
    else:
        padded_rows = weight.shape[0]
        w_map = _tensor_map(weight.data_ptr(), padded_rows, job.columns, job.columns, rows, 1)
    x_map = _tensor_map(q.data_ptr(), job.tokens, job.columns, q.stride(0), plan.tokens, 1)
    few: _FewArguments | _LinearArguments
    if isinstance(plan, FewPlan):
        few = _FewArguments(
            w_map or _Map(), x_map, y.data_ptr(), packed, steps, scale, bias_pointer, y.stride(0),
            job.rows, job.tokens, *tiles, bias_kind,
        )
        grid = (plan.split, -(-job.rows // rows), -(-job.tokens // plan.tokens))
        kernel(few, grid, _WARPGROUPS * 128 + 32, plan.split)
        return
    y_map = _tensor_map(y.data_ptr(), job.tokens, job.rows, y.stride(0), _round(plan), 2)
    row_tiles, token_tiles = -(-job.rows // rows), -(-job.tokens // plan.tokens)
    few = _LinearArguments(
        w_map or _Map(), x_map, y_map, packed, steps, scale, bias_pointer, job.rows, job.tokens,
        *tiles, row_tiles, token_tiles, plan.group, bias_kind,
    )
    blocks = min(device.processors, row_tiles * token_tiles)
    kernel(few, (blocks, 1, 1), (_WARPGROUPS + 1) * 128)


@lru_cache(maxsize=1 << 14)
def _tensor_map(
    pointer: int, rows: int, columns: int, pitch: int, box_rows: int, element: int
) -> ctypes.Array[ctypes.c_uint64]:
    """A matrix as the bulk copy engine knows it: boxes of 128 bytes by ``box_rows``, swizzled.

    Args:
        columns, pitch: in elements; ``pitch`` from row to row.
        element: bytes of an element, 1 or 2.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8
    if element == 2:
        kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    status, encoded = driver.cuTensorMapEncodeTiled(
        kind, 2, pointer, [wide(columns), wide(rows)], [wide(pitch * element)],
        [narrow(128 // element), narrow(box_rows)], [narrow(1), narrow(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(
            f"the CUDA driver refuses a matrix of {rows} x {columns} elements of {element} bytes, "
            f"rows {pitch} apart, at {pointer:#x} ({status})"
        )
    return _Map(*(int(word) for word in encoded.opaque))


def job_of(prepared: Prepared, rows: int, tokens: int, dtype: torch.dtype) -> Job:
    return Job(
        rows, tokens, prepared.columns, prepared.registers, prepared.digit_bits, prepared.high,
        dtype == torch.bfloat16,
    )


def multiply(
    q: Tensor, step: Tensor, prepared: Prepared, bias: Tensor | None, rows: int, tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """``[tokens, rows]`` of ``dtype`` from what :func:`quantize` gave."""
    pitch = -(-rows // 8) * 8  # the copy engine stores rows that are multiples of 16 bytes
    y = torch.empty((tokens, pitch), dtype=dtype, device=q.device)
    if tokens and rows:
        job = job_of(prepared, rows, tokens, dtype)
        plan, _ = choose(job, card(q.device.index))
        bias = None if bias is None else bias.contiguous()
        with torch.cuda.device(q.device):
            run(plan, job, q, step, prepared, bias, y[:, :rows])
    return y if pitch == rows else y[:, :rows].contiguous()


def linear(
    x: Tensor, prepared: Prepared, bias: Tensor | None, rows: int, before: Before | None = None
) -> Tensor:
    """The whole layer: ``x`` ``[tokens, in]`` to ``[tokens, rows]``."""
    if before is not None and not can_come_before(x.shape[1]):
        x, before = apply(x, before), None
    q, step = quantize(x, prepared, before)
    return multiply(q, step, prepared, bias, rows, len(x), x.dtype)


def instances(
    job: Job, inputs: int, smooth: bool, dtype: torch.dtype, device: Card,
    kinds: Sequence[tuple[int, int]] = ((0, 0),),
) -> list[tuple[str, dict[str, int], int]]:
    """Kernel files, compile-time parameters and shared memory of what a layer launches.

    Args:
        job: the product, with its number of tokens.
        inputs: channels of the activations.
        smooth: whether they are divided by a stored scale.
        dtype: of the activations.
        kinds: what is computed on the way, of :func:`kind_of`.
    """
    found = []
    for kind in kinds:
        plan_q = quantize_plan(inputs, job.tokens, kind[0])
        aligned = inputs % 8 == 0
        found.append((
            *quantize_instance(plan_q, inputs, dtype, job.digit_bits, smooth, aligned, kind), 0
        ))  # fmt: skip
    plans: list[Plan] = [choose(job, device)[0]]
    if isinstance(plans[0], LinearPlan):  # which of them is taken depends on the number of tokens
        plans = list(linear_plans(job, device))
    return [*found, *(instance(plan, job) for plan in plans)]


#: One number of tokens for every program that the rule can choose.
TOKENS_OF_ALL = (1, 16, 32, 64, 128, 512, 1 << 20)


def load_all(
    prepared: Prepared, rows: int, inputs: int, dtype: torch.dtype,
    tokens: Sequence[int] = TOKENS_OF_ALL,
) -> None:
    """Compile and load what products of these numbers of tokens need.

    The default covers every program that the rule can choose, so that a CUDA graph can be captured
    of any number of tokens.
    """
    device = card(prepared.weight.device.index)
    smooth = prepared.smooth.numel() > 0
    for count in tokens:
        job = job_of(prepared, rows, count, dtype)
        for name, defines, shared in instances(job, inputs, smooth, dtype, device):
            function(name, defines, device, shared)
