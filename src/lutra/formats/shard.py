"""One safetensors file: a header that is checked before it is believed, and tensors one by one.

The layout (github.com/huggingface/safetensors): 8 bytes, little endian, say how long the header is;
the header is JSON, ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, with offsets that
count from the end of the header; the tensors' bytes follow without holes.

Reading goes through ``readinto`` on an ordinary file, not through a memory map: what was read
before does not stay in this process's memory, and a limit on address space (``ulimit -v``) does not
have to be as large as the checkpoint. Writing streams each tensor to the file without a second
copy, in an order that the tensors alone decide, so the same tensors give the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CheckpointError

# The safetensors library sets the same limit; a real header has some 100 bytes per tensor.
MAX_HEADER_BYTES = 100_000_000

# Every dtype name of the safetensors specification, in bits. Those that torch holds are below.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its dtype as the file names it, and byte offsets in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The checked header of one file.

    Attributes:
        path: the file.
        tensors: tensors by name.
        metadata: the free text that ``__metadata__`` holds.
        raw: the header's bytes as they are in the file.
        file_bytes: size of the file.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is damaged: an absurd
            length, not JSON, an unknown dtype, offsets that leave the file, overlap or leave holes.
    """

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: {what}. Fetch or copy the file again.")

    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start + file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights. "
                    "Run `git lfs pull` in its folder, or download the file itself."
                )
            if len(start) < 8:
                raise damaged(
                    f"it has {file_bytes} bytes, and a safetensors file has at least 8"
                )
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER_BYTES:
                raise damaged(
                    f"it announces a header of {length:,} bytes; no header passes "
                    f"{MAX_HEADER_BYTES:,}. Perhaps it is not a safetensors file at all"
                )
            if length > file_bytes - 8:
                raise damaged(
                    f"it announces a header of {length:,} bytes, which needs a file of at least "
                    f"{length + 8:,} bytes, and has {file_bytes:,}"
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can not be read: {error.strerror or error}.") from error

    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged("`__metadata__` in its header is not a JSON object")

    data_begin = 8 + length
    tensors = {}
    for name, entry in header.items():
        info, fault = _tensor_info(entry, data_begin)
        if info is None:
            raise damaged(f"tensor {name!r}: {fault}")
        tensors[name] = info

    end = data_begin
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            fault = "overlaps the tensor before it" if info.begin < end else "leaves a hole"
            raise damaged(
                f"tensor {name!r} begins at byte {info.begin:,} of the file and {fault}; "
                f"byte {end:,} was due"
            )
        end = info.end
    if end > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header describes {end:,} bytes, and the file has "
            f"{file_bytes:,}. Fetch or copy the file again."
        )
    if end < file_bytes:
        raise damaged(f"it has {file_bytes:,} bytes, and its header describes only {end:,}")
    text = {str(k): str(v) for k, v in metadata.items()}
    return Header(Path(path), tensors, text, raw, file_bytes)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r} stands there twice")
            seen.add(name)
    return table


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor_info(entry: Any, data_begin: int) -> tuple[TensorInfo | None, str]:
    """The entry of one tensor, or None and what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return None, "its entry lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return None, f"unknown dtype {dtype!r}"
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_size, shape)):
        return None, f"its shape is {shape!r}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return None, f"its data_offsets are {offsets!r}"
    begin, end = offsets
    needed_bits = prod(shape) * DTYPE_BITS[dtype]
    if end < begin or (end - begin) * 8 != needed_bits:
        return None, (
            f"{dtype} of shape {shape} needs {-(-needed_bits // 8):,} bytes, "
            f"and its data_offsets {offsets} give it {end - begin:,}"
        )
    return TensorInfo(dtype, tuple(shape), data_begin + begin, data_begin + end), ""


def read_tensor(path: Path, name: str, info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own. ``info`` comes from a header that was checked.

    Raises:
        CheckpointError: torch has no such dtype, or the file is shorter than it was.
    """
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"tensor {name!r} in {path} has dtype {info.dtype}, unsupported here")
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    read_into(path, name, buffer, info.begin)
    return buffer.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def read_into(path: Path, name: str, buffer_N: Tensor, begin: int) -> None:
    """Fill a uint8 tensor with the bytes of the file from ``begin`` on.

    Raises:
        CheckpointError: the file ends too early or can not be read.
    """
    view = _memory_of(buffer_N)
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{path} is truncated: tensor {name!r} ends at byte "
                        f"{begin + len(view):,}, and the file at {begin + done:,}. "
                        "Did another program change it meanwhile?"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(
            f"{path} can not be read at tensor {name!r}: {error.strerror or error}."
        ) from error


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, little endian, as uint8 ``[nbytes]``; a view where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _memory_of(bytes_N: Tensor) -> memoryview:
    array: Any = bytes_N.numpy()  # numpy's stubs do not call an array a buffer before Python 3.12
    return memoryview(array)


@dataclass(frozen=True)
class Deferred:
    """A tensor that is read only while it is written, so that a shard need not fit in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> Tensor:
        tensor = self.read()
        assert tensor.dtype == self.dtype and tuple(tensor.shape) == self.shape
        return tensor


def write_shard_file(
    path: Path,
    tensors: Mapping[str, Tensor | Deferred],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file so that it is whole or not there at all; returns its size.

    The bytes depend on the tensors and metadata alone: tensors lie by falling element size (each
    stays aligned), then by name, as the safetensors library orders them.

    Raises:
        OSError: the disk is full or refuses; the caller knows what to advise.
    """
    assert sys.byteorder == "little", "the format is little endian, and so must be the machine"
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        dtype = DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which is not written")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of 8
    with atomic_file(path) as file:
        _write_all(file, memoryview(len(raw).to_bytes(8, "little") + raw))
        for name in order:
            tensor = tensors[name]
            data = tensor() if isinstance(tensor, Deferred) else tensor
            _write_all(file, _memory_of(tensor_bytes(data)))
    return 8 + len(raw) + end


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or keeps its old content."""
    with atomic_file(path) as file:
        _write_all(file, memoryview(content))


@contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """A file descriptor to write to; on success the file takes its name and is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_all(file: int, content: memoryview) -> None:
    chunk = 1 << 26  # Linux writes at most 2 GiB in one call
    done = 0
    while done < len(content):
        done += os.write(file, content[done : done + chunk])


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some network and FUSE file systems can not sync a folder; the files themselves are.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(file)
