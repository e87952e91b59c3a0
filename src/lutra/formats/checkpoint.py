"""A Hugging Face checkpoint folder: opened with every check that needs no weights, read by name.

Nothing in the folder is trusted. Headers are checked before a tensor is read, an index can only
name files of the folder itself, a link that leaves the folder is refused (a side file is copied
into the output, which people publish), and pickles are read by torch's weights-only loader alone.

Writing is in :mod:`lutra.formats.output`; the layout of our own files in ``docs/FORMAT.md``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CheckpointError
from lutra.formats.folder import (
    Weights,
    find_weights,
    folder_of,
    inside,
    is_side_file,
    read_config,
)
from lutra.formats.layers import (
    FORMAT_VERSION,
    QUANT_METHOD,
    load_layer,
    quantization_config,
    read_quantization_config,
    stored_tensor_shapes,
)
from lutra.formats.output import OutputFolder
from lutra.formats.shard import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    Deferred,
    Header,
    TensorInfo,
    read_header,
    read_into,
    read_tensor,
)

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "OutputFolder",
    "SourceCheckpoint",
    "check_finite",
    "load_layer",
    "quantization_config",
    "read_quantization_config",
    "stored_tensor_shapes",
]

WEIGHT_DTYPES = {"F64", "F32", "F16", "BF16"}
# Masks and positions that old versions of transformers saved beside the weights.
_BUFFER_SUFFIXES = (
    "attn.bias", "attention.bias", "masked_bias", "position_ids", "token_type_ids",
)  # fmt: skip
# Prefixes that a checkpoint carries or lacks, according to the class that saved it.
_BASE_PREFIXES = ("model.", "transformer.", "gpt_neox.")
# GPT-NeoX files call the head embed_out; transformers 5 renames it when it loads.
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = (
    "model.embed_tokens.weight", "model.decoder.embed_tokens.weight",
    "transformer.wte.weight", "gpt_neox.embed_in.weight",
)  # fmt: skip


class SourceCheckpoint:
    """A checkpoint on disk whose tensors are read one at a time.

    Open with :meth:`open`. Names are those of the file; :meth:`resolve` finds the name in the file
    for a name in the module tree.

    Attributes:
        path: the folder.
        config: ``config.json`` as it is.
    """

    def __init__(self, path: Path, config: dict[str, Any], shards: _Shards) -> None:
        self.path = path
        self.config = config
        self._shards = shards
        self._embedding_names: tuple[str, ...] = _EMBEDDINGS
        self._in_file: dict[str, str] = {}  # names in the file, of tensors that we call otherwise

    @classmethod
    def open(cls, src: str | Path, *, quantized: bool = False) -> SourceCheckpoint:
        """Open a folder, or a hub id such as ``org/name``, which is fetched into the hub's cache.

        Everything that can be checked without reading weights is checked here.

        Args:
            src: a folder, or a hub id if no such path exists.
            quantized: whether a quantized checkpoint is expected, as ``inspect`` and ``convert``
                do. Otherwise one is refused, because quantizing again loses twice.

        Raises:
            CheckpointError: the folder, its config, index or a shard is missing, damaged, unsafe,
                of an unsupported dtype or already quantized.
        """
        folder = folder_of(src)
        config = read_config(folder)
        if not quantized:
            _refuse_quantized(folder, config)
        weights = find_weights(folder)
        shards: _Shards
        if weights.pickled:
            warnings.warn(
                f"{folder} holds pickled weights ({weights.files[0].name}). They are read with "
                "torch's weights-only loader; prefer a safetensors version of the checkpoint.",
                stacklevel=2,
            )
            shards = _PickledShards.open(weights)
        else:
            shards = _SafetensorsShards.open(weights)
        if not shards.tensors:
            raise CheckpointError(f"{folder} holds no tensors. Is the download complete?")
        if not quantized:
            _refuse_dtypes(folder, shards.tensors)
        return cls(folder, config, shards)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        called = {stored: name for name, stored in self._in_file.items()}
        return sorted(called.get(name, name) for name in self._shards.tensors)

    def __contains__(self, name: object) -> bool:
        if name in self._in_file.values():
            return False
        return name in self._in_file or name in self._shards.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype.

        Raises:
            CheckpointError: no such tensor, or a dtype that torch does not have.
        """
        info = self._info(name)
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"tensor {name!r} of {self.path} has dtype {info.dtype}")
        return TORCH_DTYPES[info.dtype]

    def nbytes(self, name: str) -> int:
        return self._info(name).nbytes

    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._shards.tensors.values())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own; nothing read before is held.

        Raises:
            CheckpointError: no such tensor, or the file can not be read.
        """
        self._info(name)
        return self._shards.tensor(self._in_file.get(name, name))

    def deferred(self, name: str) -> Deferred:
        """The tensor for :meth:`OutputFolder.write_shard`: read, and checked, when it is written.

        Reading it raises CheckpointError for NaN and infinite values.
        """

        def read() -> Tensor:
            tensor = self.tensor(name)
            check_finite(name, tensor)
            return tensor

        return Deferred(self.dtype(name), self.shape(name), read)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end`` of a tensor: a part of an embedding, without the rest.

        Raises:
            CheckpointError: no such tensor, or the file can not be read.
        """
        shape = self._info(name).shape
        if not shape or not 0 <= begin <= end <= shape[0]:
            raise ValueError(f"rows {begin} to {end} are not in {name!r} of shape {list(shape)}")
        return self._shards.rows(self._in_file.get(name, name), begin, end)

    def resolve(self, name: str) -> str | None:
        """The name in the file of a parameter named as in the module tree, or None.

        A checkpoint saved from the base model lacks the prefix (``h.0...`` for
        ``transformer.h.0...``) and one saved from a wrapper carries one more. A head that is not in
        the file is the embedding, if the config ties them.
        """
        for candidate in _spellings(name):
            if candidate in self:
                return candidate
        if name in _HEADS and self.config.get("tie_word_embeddings", True):
            return self._embedding()
        return None

    @property
    def tied_head(self) -> bool:
        """Whether the file has no head of its own, so that the embedding serves as head.

        A file that holds both is not tied, whatever ``config.json`` says. Where the config says
        nothing, families differ; then a checkpoint without a head can only be tied.
        """
        if any(c in self for head in _HEADS for c in _spellings(head)):
            return False
        return bool(self.config.get("tie_word_embeddings", True)) and self._embedding() is not None

    def name_embedding(self, name: str) -> None:
        """Say what the module tree calls the embedding, for families that name it otherwise.

        Some checkpoints of tied models store the one table as the head. It is the embedding then,
        under the embedding's name, as in all others.
        """
        self._embedding_names = (name, *_EMBEDDINGS)
        if self._embedding() is None and self.config.get("tie_word_embeddings", True):
            heads = [c for head in _HEADS for c in _spellings(head) if c in self]
            if heads:
                self._in_file[name] = heads[0]

    def _embedding(self) -> str | None:
        found = (c for name in self._embedding_names for c in _spellings(name) if c in self)
        return next(found, None)

    def side_files(self) -> list[Path]:
        """Files that travel with the weights: tokenizers, templates, configs, licences; sorted.

        Not among them: weights, their index, ``config.json`` (which changes) and the model card
        (which describes the original).
        """
        folders = [self.path, self.path / "additional_chat_templates"]
        files = [f for folder in folders if folder.is_dir() for f in sorted(folder.iterdir())]
        return [inside(self.path, f) for f in files if f.is_file() and is_side_file(f.name)]

    def check_weights(self) -> None:
        """Read every tensor once, one at a time, and refuse NaN and infinite values.

        Worth its seconds before a run of hours, which would meet the bad tensor in the middle.

        Raises:
            CheckpointError: names the first tensor that is not finite or can not be read.
        """
        for name in sorted(self._shards.tensors, key=self._shards.position):
            check_finite(name, self.tensor(name))

    def fingerprint(self) -> str:
        """SHA-256 that tells whether this is still the same checkpoint, in well under a second.

        It covers ``config.json``, every shard's name and size, every byte of every header, and of
        each tensor three samples of 4 KiB (its beginning, middle and end); times of change and the
        folder's name are left out, so a copy has the same fingerprint. Any training changes nearly
        every weight, so a sample is enough to tell another model; a file that was altered on
        purpose between the samples is not noticed.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for part in self._shards.identity():
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._shards.tensors[self._in_file.get(name, name)]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}") from None


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        CheckpointError: names the tensor, how many values are bad and where the first one is.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # The extremes carry NaN and infinity and need no copy; the rest is for the message.
    if torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        return
    bad = ~torch.isfinite(tensor)
    count, nans = int(bad.sum()), int(torch.isnan(tensor).sum())
    first = [int(i) for i in bad.nonzero()[0]]
    raise CheckpointError(
        f"tensor {name!r} has {count:,} values that are not finite ({nans:,} NaN, "
        f"{count - nans:,} infinite; the first at {first}). "
        "The checkpoint is broken or overflowed in training; use an intact copy."
    )


# ---- what can not be quantized


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
    if method == QUANT_METHOD:
        raise CheckpointError(
            f"{folder} is already quantized by lutra. Quantize the original checkpoint instead; "
            "`lutra inspect` and `lutra eval` read this one as it is."
        )
    raise CheckpointError(
        f"{folder} is already quantized (quant_method {method!r} in config.json). "
        "Give the original 16- or 32-bit checkpoint: quantizing twice loses twice."
    )


def _refuse_dtypes(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse weights that are not ordinary floats; integer and boolean buffers may stay."""
    for name, info in tensors.items():
        if info.dtype in WEIGHT_DTYPES:
            continue
        is_integer = info.dtype in ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
        is_weight = len(info.shape) >= 2 or name.endswith((".weight", ".qweight", ".qzeros"))
        if is_integer and (not is_weight or name.endswith(_BUFFER_SUFFIXES)):
            continue
        packed = " (it looks like the packed weight of a quantized model)" if is_integer else ""
        raise CheckpointError(
            f"tensor {name!r} of {folder} has dtype {info.dtype}{packed}. Only bfloat16, float16, "
            "float32 and float64 weights can be quantized: give the original checkpoint, or "
            "convert this one to bfloat16 first."
        )


def _spellings(name: str) -> Iterator[str]:
    if name in _HEADS:
        yield from (name, *_HEADS)
    yield name
    for prefix in _BASE_PREFIXES:
        if name.startswith(prefix):
            yield name[len(prefix) :]
    for prefix in _BASE_PREFIXES:
        yield prefix + name


# ---- reading the files


class _Shards(ABC):
    """Tensors of all files together: what the two kinds of file have in common."""

    tensors: dict[str, TensorInfo]
    place: dict[str, Path]

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    @abstractmethod
    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a tensor, in memory of their own."""

    @abstractmethod
    def identity(self) -> Iterator[bytes]:
        """What tells these files from others, for the fingerprint."""

    def position(self, name: str) -> tuple[str, int]:
        """Sorts tensors as they lie in the files, so that reading all of them is sequential."""
        return self.place[name].name, self.tensors[name].begin


def _merge(
    weights: Weights, contents: Iterable[tuple[Path, Mapping[str, TensorInfo]]]
) -> tuple[dict[str, TensorInfo], dict[str, Path]]:
    """All tensors and the file of each; every promise of the index is checked."""
    tensors: dict[str, TensorInfo] = {}
    place: dict[str, Path] = {}
    for path, found in contents:
        for name, info in found.items():
            if name in place:
                raise CheckpointError(
                    f"tensor {name!r} is both in {place[name].name} and in {path.name} of "
                    f"{weights.folder}. Which one counts is not defined; get an intact copy."
                )
            tensors[name], place[name] = info, path
    for name, file in weights.promised.items():
        if name not in place or place[name] != weights.folder / PurePosixPath(file):
            where = f"; it is in {place[name].name}" if name in place else ""
            assert weights.index is not None
            raise CheckpointError(
                f"{weights.index.name} says that {file} holds tensor {name!r}, and it does not"
                f"{where} ({weights.folder}). The index and the shards belong to different "
                "versions; fetch both again."
            )
    return tensors, place


class _SafetensorsShards(_Shards):
    def __init__(
        self, headers: list[Header], tensors: dict[str, TensorInfo], place: dict[str, Path]
    ) -> None:
        self.headers, self.tensors, self.place = headers, tensors, place

    @classmethod
    def open(cls, weights: Weights) -> _SafetensorsShards:
        headers = [read_header(path) for path in weights.files]
        return cls(headers, *_merge(weights, ((h.path, h.tensors) for h in headers)))

    def tensor(self, name: str) -> Tensor:
        return read_tensor(self.place[name], name, self.tensors[name])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        info = self.tensors[name]
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        start = info.begin + begin * row
        part = TensorInfo(
            info.dtype, (end - begin, *info.shape[1:]), start, start + (end - begin) * row
        )
        return read_tensor(self.place[name], name, part)

    def identity(self) -> Iterator[bytes]:
        sample = 4096
        for header in self.headers:
            yield header.path.name.encode()
            yield header.file_bytes.to_bytes(8, "little")
            yield header.raw
            for name, info in sorted(header.tensors.items()):
                count = min(sample, info.nbytes)
                last = info.end - count
                for begin in sorted({info.begin, (info.begin + last) // 2, last}):
                    buffer = torch.empty(count, dtype=torch.uint8)
                    read_into(header.path, name, buffer, begin)
                    yield buffer.numpy().tobytes()


class _PickledShards(_Shards):
    """``.bin`` files, mapped by torch's weights-only loader; one file is held at a time."""

    def __init__(
        self, files: list[Path], tensors: dict[str, TensorInfo], place: dict[str, Path]
    ) -> None:
        self.files, self.tensors, self.place = files, tensors, place
        self._held: tuple[Path, dict[str, Tensor]] | None = None

    @classmethod
    def open(cls, weights: Weights) -> _PickledShards:
        def info(tensor: Tensor) -> TensorInfo:
            nbytes = tensor.numel() * tensor.element_size()
            dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            return TensorInfo(dtype.upper(), tuple(tensor.shape), 0, nbytes)

        contents = (
            (path, {name: info(t) for name, t in _load_pickled(path).items()})
            for path in weights.files
        )
        return cls(weights.files, *_merge(weights, contents))

    def _stored(self, name: str) -> Tensor:
        path = self.place[name]
        if self._held is None or self._held[0] != path:
            self._held = None  # unmap the other file before this one is mapped
            self._held = (path, _load_pickled(path))
        return self._held[1][name]

    def tensor(self, name: str) -> Tensor:
        return self._stored(name).detach().clone(memory_format=torch.contiguous_format)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        return self._stored(name)[begin:end].clone(memory_format=torch.contiguous_format)

    def identity(self) -> Iterator[bytes]:
        sample = 1 << 20
        for path in self.files:
            yield path.name.encode()
            size = path.stat().st_size
            yield size.to_bytes(8, "little")
            count = min(sample, size)
            for begin in range(0, max(size - count, 0) + 1, max(1, (size - count) // 15)):
                buffer = torch.empty(count, dtype=torch.uint8)
                read_into(path, "(sample)", buffer, begin)
                yield buffer.numpy().tobytes()


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """Map a ``.bin`` file with the weights-only loader.

    Raises:
        CheckpointError: the file needs more than that loader gives, or is damaged.
    """
    import pickle

    advice = (
        "Convert it to safetensors where you trust it, or use a safetensors version of the model."
    )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which could run code when loaded; refused. {advice}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} can not be read ({line}). {advice}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided
        for k, v in content.items()
    ):
        raise CheckpointError(f"{path} is not a table of dense tensors. {advice}")
    return content
