"""Types of the compiled extension (module.cpp). Addresses are those of contiguous tensors."""

from torch import Tensor

def levels() -> list[str]: ...
def level() -> str: ...
def set_level(name: str) -> None: ...
def prepare(
    planes: int, scale: int, offset: int, scale_dtype: int, offset_dtype: int,
    out: int, in_: int, bits: int, group_size: int, uniform: bool,
    from_planes: int, from_scale: int, from_offset: int, threads: int, /,
) -> None: ...
def restore(
    planes: int, scale: int, offset: int, scale_dtype: int, offset_dtype: int,
    out: int, in_: int, bits: int, group_size: int, uniform: bool,
    to_planes: int, to_scale: int, to_offset: int, threads: int, /,
) -> None: ...
def linear(
    planes: int, scale: int, offset: int, scale_dtype: int, offset_dtype: int,
    out: int, in_: int, bits: int, group_size: int, uniform: bool,
    fast: bool, x: int, x_dtype: int, x_stride: int, rows: int, bias: int, y: int,
    threads: int, /,
) -> None: ...
def has_matrix_unit() -> bool: ...
def linear_by_tiles(
    planes: int, scale: int, offset: int, scale_dtype: int, offset_dtype: int,
    out: int, in_: int, bits: int, group_size: int, uniform: bool,
    split: bool, x: int, x_dtype: int, x_stride: int, rows: int, bias: int, y: int,
    threads: int, /,
) -> None: ...
def decode(
    planes: int, scale: int, offset: int, scale_dtype: int, offset_dtype: int,
    out: int, in_: int, bits: int, group_size: int, uniform: bool,
    first_row: int, rows: int, dtype: int, dst: int, threads: int, /,
) -> None: ...
def read_stream(data: int, bytes: int, threads: int, /) -> int: ...
def allocate(bytes: int, /) -> Tensor: ...
