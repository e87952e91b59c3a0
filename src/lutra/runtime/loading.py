"""Bring a loaded model to its device, without a second copy in the host's memory.

transformers leaves the tensors of a checkpoint where they are, in the mapped files. From there they
go piece by piece through a few pinned buffers: threads ask the system for the pages of a piece and
copy it to a buffer, while the device fetches the buffers that are full, and each layer is laid out
anew for its kernel as it arrives. Other threads (:mod:`lutra.runtime.read_ahead`) have begun to
read the files before the modules were there.

With ``LUTRA_PINNED_LOAD=0`` torch copies the mapped tensors one by one, and layers are laid out
when all are there. Measured on an H200, that takes 1.0 to 1.8 times as long from a disk and 1.2
times from the page cache (`docs/performance-model.md`); it needs 256 MiB less of pinned memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lutra.architectures import longest_list
from lutra.errors import ResourceError
from lutra.runtime.read_ahead import ReadAhead

BUFFER_BYTES = 32 << 20
BUFFERS = 8
MOST_LEAD = 16 << 30  # bytes of files that may wait in the page cache

_preparing_later: ContextVar[bool] = ContextVar("preparing_later", default=False)


@contextmanager
def prepare_later() -> Iterator[None]:
    """Layers that are loaded within are not handed to the kernels of the device they are on."""
    token = _preparing_later.set(True)
    try:
        yield
    finally:
        _preparing_later.reset(token)


def is_preparing_later() -> bool:
    return _preparing_later.get()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    distinct = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return values.get("MemAvailable", 0) + values.get("SwapFree", 0)


def check_fits(model: nn.Module, device: torch.device, name: object, layers: str = "") -> None:
    """Refuse a model that is larger than what is free, before anything is moved.

    Args:
        model: loaded, mapped or on the meta device.
        name: what to call it.
        layers: what to suggest besides fewer bits.

    Raises:
        ResourceError: says how much is missing, and which widths would fit.
    """
    free = free_bytes(device)
    needed = model_bytes(model)
    if free is None or needed <= free:
        return
    raise ResourceError(
        f"{name} needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB left: "
        f"{(needed - free) / 1e9:.2f} GB are missing. {widths_that_fit(model, free)}{layers}"
    )


def widths_that_fit(model: nn.Module, free: int) -> str:
    """A sentence on the bits per weight with which a model would fit into ``free`` bytes."""
    from lutra.packed import PackedLinear

    blocks = longest_list(model)
    if blocks is None:
        return "Use another device or a smaller model."
    weights, held = 0, 0
    for module in blocks.modules():
        if isinstance(module, PackedLinear | nn.Linear) or type(module).__name__ == "Conv1D":
            own = [p for n, p in module.named_parameters(recurse=False) if n.startswith("weight")]
            held += sum(p.numel() * p.element_size() for p in own)
            if isinstance(module, PackedLinear):
                weights += module.in_features * module.out_features
            else:
                weights += sum(p.numel() for p in own)
    rest = model_bytes(model) - held
    needed = {bits: rest + weights * (bits + 2 * 16 / 128) / 8 for bits in range(8, 0, -1)}
    fitting = [bits for bits, total in needed.items() if total <= free]
    if not fitting:
        return (
            f"No width fits: with 1 bit per weight it needs {needed[1] / 1e9:.2f} GB, of which "
            f"{rest / 1e9:.2f} GB are not quantized. Use a device with more memory."
        )
    most = fitting[0]
    return (
        f"It would fit with {most} bit{'s' if most > 1 else ''} per weight or fewer "
        "(`lutra quantize --bits`, groups of 128)."
    )


def reading_ahead(folder: Path) -> ReadAhead:
    """Read the weights of a folder ahead of what is loaded, within the memory that is free."""
    free = free_bytes(torch.device("cpu"))
    lead = MOST_LEAD if free is None else min(MOST_LEAD, free // 2)
    return ReadAhead(sorted(folder.glob("*.safetensors")), lead)


def move(model: Any, device: torch.device, ahead: ReadAhead | None = None) -> Any:
    """Move a loaded model to a GPU and prepare its layers there; the model.

    Args:
        ahead: reads the mapped files, and is told how much of them has been moved.

    Raises:
        ResourceError: it does not fit.
        torch.OutOfMemoryError: something else took the memory meanwhile.
    """
    check_fits(model, device, type(model).__name__)
    if device.type == "cuda" and os.environ.get("LUTRA_PINNED_LOAD") != "0":
        with _Mover(device, ahead) as mover:
            move_and_prepare(model, mover)
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": device}
    model.to(device)  # all of it, or what is left: tensors that modules hold by themselves
    prepare_layers(model)
    return model


def prepare_layers(model: Any) -> None:
    """Hand every packed layer to the kernel of the device it is on."""
    from lutra.packed import packed_layers

    for layer in packed_layers(model):
        layer.prepare_if_local(model.dtype)


def move_and_prepare(model: Any, mover: Any) -> None:
    """Move all tensors of a model, and prepare each layer once the last piece of it was sent."""
    from lutra.packed import PackedLinear

    moved: dict[int, tuple[Tensor, Tensor]] = {}
    waiting: deque[tuple[Any, int]] = deque()  # layers, and the piece with which they are whole
    arrived: set[Any] = set()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            _move_tensors(tensors, mover, moved)
        if isinstance(module, PackedLinear):
            waiting.append((module, mover.submitted))
        while waiting and mover.sent >= waiting[0][1]:
            _prepare_when_whole(waiting.popleft()[0], model.dtype, mover, arrived)
    mover.finish()
    for layer, _ in waiting:
        _prepare_when_whole(layer, model.dtype, mover, arrived)


def _move_tensors(
    tensors: dict[str, Any], mover: _Mover, moved: dict[int, tuple[Tensor, Tensor]]
) -> None:
    """Put moved tensors in the place of a module's own; tied ones stay tied.

    Args:
        moved: old and new tensors by the identity of the old, which are held, so that no other
            tensor can have it, but emptied, so that a file can be unmapped.
    """
    for name, tensor in tensors.items():
        if tensor is None or tensor.device == mover.device:
            continue
        if id(tensor) not in moved:
            there = mover.move(tensor.data)
            if isinstance(tensor, nn.Parameter):
                there = nn.Parameter(there, requires_grad=tensor.requires_grad)
            tensor.data = tensor.data.new_empty(0)
            moved[id(tensor)] = (tensor, there)
        tensors[name] = moved[id(tensor)][1]


def _prepare_when_whole(layer: Any, dtype: torch.dtype, mover: Any, arrived: set[Any]) -> None:
    """Prepare a layer that has arrived, or its group once all members have.

    A family may hold its layers in another order than a group (OPT: k, v, q).
    """
    arrived.add(layer)
    members = [layer] if layer.siblings is None else layer.siblings.members()
    present = [member for member in members if member is not None]
    if arrived.issuperset(present):
        mover.wait()
        for member in present:
            member.prepare_if_local(dtype)


class _Mover:
    """Pinned buffers, threads that fill them, and a stream that empties them."""

    def __init__(self, device: torch.device, ahead: ReadAhead | None = None) -> None:
        self.device, self.ahead = device, ahead
        self.stream = torch.cuda.Stream(device)
        self.threads = ThreadPoolExecutor(BUFFERS, "lutra-load")
        # Buffers that are empty once their event has come; None: one that is still to be made.
        self.free: deque[tuple[Tensor | None, Any]] = deque([(None, None)] * BUFFERS)
        self.filling: deque[tuple[Future[Tensor], int, Tensor]] = deque()
        self.submitted = self.sent = 0  # pieces
        self.sent_bytes = 0

    def __enter__(self) -> _Mover:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.finish()
        finally:
            self.threads.shutdown()
            self.wait()

    def wait(self) -> None:
        """What is queued on the device from now on finds the pieces that were sent."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def move(self, source: Tensor) -> Tensor:
        """A tensor that will have the same content on the device, once all its pieces are sent."""
        target = torch.empty_like(source, device=self.device, memory_format=torch.contiguous_format)
        # Work that is queued may still use what the allocator hands out.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        target.record_stream(self.stream)
        for begin, piece in _pieces(source.contiguous()):
            buffer = self._buffer()
            there = target.view(-1).view(torch.uint8)[begin : begin + piece.numel()]
            self.filling.append((self.threads.submit(_fill, buffer, piece), piece.numel(), there))
            self.submitted += 1
        return target

    def finish(self) -> None:
        """Send all that is being filled."""
        while self.filling:
            self._send()

    def _buffer(self) -> Tensor | None:
        if not self.free:
            self._send()
        buffer, event = self.free.popleft()
        if event is not None:
            event.synchronize()
        return buffer

    def _send(self) -> None:
        filled, size, there = self.filling.popleft()
        buffer = filled.result()
        with torch.cuda.stream(self.stream):
            there.copy_(buffer[:size], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.free.append((buffer, event))
        self.sent += 1
        self.sent_bytes += size
        if self.ahead is not None:
            self.ahead.reached(self.sent_bytes)


def _fill(buffer: Tensor | None, piece: Tensor) -> Tensor:
    """Copy a piece to a pinned buffer, which is made if there is none; the buffer.

    Pinning takes tens of milliseconds a buffer, so it is done here, beside other threads.
    """
    _read_ahead(piece)
    if buffer is None:
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
    buffer[: piece.numel()].copy_(piece)
    return buffer


def _read_ahead(piece: Tensor) -> None:
    """Ask for all of a mapped piece at once; page by page, a disk is not kept busy.

    It is advice: a system that does not take it reads page by page.
    """
    advise = _madvise()
    if advise is None or piece.numel() == 0:
        return
    begin = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    advise(begin, piece.data_ptr() + piece.numel() - begin, mmap.MADV_WILLNEED)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return cast("Callable[[int, int, int], int]", found)


def _pieces(source: Tensor) -> Iterable[tuple[int, Tensor]]:
    """Bytes of a tensor, by buffers."""
    if source.numel() == 0:
        return
    flat = source.view(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), BUFFER_BYTES):
        yield begin, flat[begin : begin + BUFFER_BYTES]
