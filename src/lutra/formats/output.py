"""The folder that a run writes: made beside its destination, resumable, renamed when complete.

    .NAME.lutra-partial/        beside NAME, on the same file system
        lock                    held while a process writes
        progress.json           the journal: what is done, and for which run
        state-*.safetensors     what the run needs to go on (calibration activations)
        model/                  becomes NAME in one rename

Each shard is written under a temporary name, flushed to the disk, renamed, and only then entered
in the journal. So a process that is killed, a machine that loses power or a disk that is full
costs the shard being written and nothing before it, and NAME exists complete or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from lutra.errors import CheckpointError, ResourceError
from lutra.formats.shard import (
    Deferred,
    read_header,
    read_tensor,
    sync_folder,
    write_file,
    write_shard_file,
)

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What file systems without locks answer, some network mounts among them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
INDEX_NAME = "model.safetensors.index.json"


class OutputFolder:
    """Writes a checkpoint to ``dst``, or goes on where an interrupted run stopped.

    Use it as a context manager: leaving it gives the lock back, and keeps unfinished work.

    Args:
        dst: the folder to make. It must not exist.
        fingerprint: what the run is made of, for example ``{"source": ..., "options": ...,
            "calibration": ...}``; values that JSON can hold. Work that was left by another run is
            refused, and the message names the keys that differ. A string counts as one key.
        total_bytes: bytes that the finished folder will have, if known, to check the disk first.

    Raises:
        ResourceError: ``dst`` exists, another process writes it, unfinished work belongs to
            another run, the disk has too little space, or the folder can not be made.
    """

    def __init__(
        self,
        dst: str | Path,
        fingerprint: str | Mapping[str, Any],
        total_bytes: int | None = None,
    ) -> None:
        self.dst = Path(dst)
        self.partial = self.dst.parent / f".{self.dst.name}.lutra-partial"
        self._model = self.partial / "model"
        self._journal_path = self.partial / "progress.json"
        self._lock: int | None = None
        print_of_run = {"run": fingerprint} if isinstance(fingerprint, str) else dict(fingerprint)
        # Through JSON and back, so that it compares equal to what a journal holds.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(print_of_run, sort_keys=True))
        self._shards: list[dict[str, Any]] = []
        self._ours = False  # whether the unfinished work is known to be of this run

        with self._disk_errors():
            if self._journal_path.exists() and not self._model.exists():
                shutil.rmtree(self.partial)  # a run that ended between its last two steps
        self._refuse_existing()
        with self._disk_errors():
            self._model.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            self._refuse_existing()  # another process may have finished before we had the lock
            self._read_journal()
            self._ours = True
            self._check_space(total_bytes)
            self._write_journal()
        except BaseException:
            self.close()
            raise

    # ---- what is done

    @property
    def resumed(self) -> bool:
        """Whether shards of an earlier run are there."""
        return bool(self._shards)

    def done_keys(self) -> dict[str, dict[str, Any]]:
        """Keys of the shards that are complete, in the order written, with the meta of each."""
        return {shard["key"]: shard["meta"] for shard in self._shards}

    def write_shard(
        self,
        key: str,
        tensors: Mapping[str, Tensor | Deferred],
        meta: Mapping[str, Any] | None = None,
        *,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write one shard and enter it in the journal.

        Args:
            key: names the shard for :meth:`done_keys`, for example ``"block 3"``.
            tensors: tensors by their names in the checkpoint. One that is only copied can be
                :meth:`SourceCheckpoint.deferred`; then one at a time is in memory.
            meta: anything JSON can hold, given back by :meth:`done_keys`.
            state: what the run needs to go on after this shard. It is saved under ``key``, in one
                step with the shard: after a crash either both are there or neither counts. States
                saved earlier are dropped.

        Raises:
            ResourceError: the disk is full; what is done stays for resuming.
        """
        if key in self.done_keys():
            raise ValueError(f"shard {key!r} is already written")
        if not tensors:
            raise ValueError(f"shard {key!r} has no tensors")
        for shard in self._shards:
            twice = shard["tensors"].keys() & tensors.keys()
            if twice:
                raise ValueError(f"tensor {min(twice)!r} is already in shard {shard['key']!r}")
        entry = {
            "key": key,
            "file": f"part-{len(self._shards) + 1:05d}.safetensors",
            "tensors": {n: t.nbytes for n, t in sorted(tensors.items())},
            "meta": json.loads(json.dumps(dict(meta or {}))),
        }
        with self._disk_errors():
            if state is not None:
                self.save_state(key, state)
            entry["bytes"] = write_shard_file(self._model / entry["file"], tensors)
            self._shards.append(entry)
            try:
                self._write_journal()
            except BaseException:
                self._shards.pop()
                raise
            if state is not None:
                for path in self.partial.glob("state-*.safetensors"):
                    if path != self._state_path(key):
                        path.unlink()

    # ---- state between shards

    def save_state(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for a resumed run; a state of the same key is replaced.

        Raises:
            ResourceError: the disk is full.
        """
        with self._disk_errors():
            write_shard_file(self._state_path(key), tensors, {"format": "pt", "key": key})

    def load_state(self, key: str) -> dict[str, Tensor] | None:
        """Tensors that :meth:`save_state` kept under ``key``, or None.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._state_path(key)
        if not path.exists():
            return None
        header = read_header(path)
        return {name: read_tensor(path, name, info) for name, info in header.tensors.items()}

    def drop_state(self, key: str) -> None:
        """Forget a state, if it is there."""
        self._state_path(key).unlink(missing_ok=True)

    # ---- the end

    def finish(
        self,
        config: Mapping[str, Any],
        side_files: Iterable[Path] = (),
        extra: Mapping[str, str | bytes] | None = None,
    ) -> Path:
        """Write index, config and the rest, and rename the folder to its destination.

        Args:
            config: the content of ``config.json``.
            side_files: files to copy, see :meth:`SourceCheckpoint.side_files`.
            extra: further files by name; they win over side files of the same name.

        Returns:
            The destination.

        Raises:
            ResourceError: the disk is full, or ``dst`` appeared meanwhile.
        """
        if not self._shards:
            raise ValueError("nothing was written")
        extra = dict(extra or {})
        for name in extra:
            if Path(name).name != name:
                raise ValueError(f"an extra file's name has no folder in it, unlike {name!r}")
        with self._disk_errors():
            count = len(self._shards)
            names = (
                ["model.safetensors"]
                if count == 1
                else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            )
            weight_map = {}
            for shard, name in zip(self._shards, names, strict=True):
                os.replace(self._model / shard["file"], self._model / name)
                weight_map.update(dict.fromkeys(shard["tensors"], name))
            if count > 1:
                total = sum(sum(shard["tensors"].values()) for shard in self._shards)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_file(self._model / INDEX_NAME, _json_bytes(index))
            for path in side_files:
                # The one subfolder that transformers itself writes.
                nested = path.parent.name == "additional_chat_templates"
                target = self._model / (path.parent.name if nested else "") / path.name
                target.parent.mkdir(exist_ok=True)
                write_file(target, path.read_bytes())
            for name, content in extra.items():
                data = content.encode() if isinstance(content, str) else content
                write_file(self._model / name, data)
            write_file(self._model / "config.json", _json_bytes(config))
            self._refuse_existing()
            os.rename(self._model, self.dst)
            sync_folder(self.dst.parent)
        shutil.rmtree(self.partial)
        self._shards = []
        self.close()
        return self.dst

    def close(self) -> None:
        """Give the lock back. Unfinished work stays for another run; an empty folder does not."""
        if self._lock is None:
            return
        if not self._shards and self._ours and not any(self.partial.glob("state-*.safetensors")):
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- inside

    def _state_path(self, key: str) -> Path:
        # Any key makes a valid name, and no two keys make the same.
        return self.partial / f"state-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.dst):
            raise ResourceError(
                f"{self.dst} already exists and is not overwritten. "
                "Choose another destination or delete it first."
            )

    def _take_lock(self) -> None:
        import fcntl

        self._lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise ResourceError(
                f"another process is writing {self.dst} (it holds {self.partial / 'lock'}). "
                "Wait for it, or choose another destination."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {self.partial} has no locks; see to it that no second process "
                f"writes {self.dst}",
                stacklevel=4,
            )

    def _read_journal(self) -> None:
        if not self._journal_path.exists():
            for path in self._model.iterdir():
                path.unlink()
            return
        start_over = f"Delete {self.partial} to start over, or choose another destination."
        try:
            journal = json.loads(self._journal_path.read_bytes())
            fingerprint, shards = dict(journal["fingerprint"]), list(journal["shards"])
            files = [(s["file"], s["bytes"], s["key"], s["meta"], s["tensors"]) for s in shards]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._journal_path} is damaged. {start_over}") from error
        if fingerprint != self._fingerprint:
            keys = sorted(fingerprint.keys() | self._fingerprint.keys())
            differ = [
                f"{k}: {_short(fingerprint.get(k))} then, {_short(self._fingerprint.get(k))} now"
                for k in keys
                if fingerprint.get(k) != self._fingerprint.get(k)
            ]
            raise ResourceError(
                f"{self.partial} holds unfinished work of a different run ({'; '.join(differ)}). "
                f"Run with the same options to resume it. {start_over}"
            )
        count = len(files)
        for number, (file, size, *_) in enumerate(files, start=1):
            path = self._model / file
            finals = [f"model-{number:05d}-of-{count:05d}.safetensors"]
            if count == 1:
                finals.append("model.safetensors")
            for final in finals:  # stopped inside finish()
                if not path.exists() and (self._model / final).exists():
                    os.replace(self._model / final, path)
            if not path.exists() or path.stat().st_size != size:
                raise CheckpointError(
                    f"{path}, which an earlier run completed, is missing or has changed. "
                    f"{start_over}"
                )
        # What a stopped finish() or a killed write left; it is written again.
        parts = {file for file, *_ in files}
        for path in [*self._model.iterdir(), *self.partial.glob("*.tmp")]:
            if path.name not in parts:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._shards = shards

    def _write_journal(self) -> None:
        journal = {"fingerprint": self._fingerprint, "shards": self._shards}
        with self._disk_errors():
            write_file(self._journal_path, _json_bytes(journal))

    def _check_space(self, total_bytes: int | None) -> None:
        if total_bytes is None:
            return
        needed = total_bytes - sum(shard["bytes"] for shard in self._shards)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise ResourceError(
                f"{self.dst} needs {_in_words(needed)} more, and its disk has "
                f"{_in_words(free)} free. Free some space or choose a destination on another disk."
            )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn what a disk can refuse into a message; everything done is kept."""
        try:
            yield
        except OSError as error:
            place = error.filename or self.partial
            kept = f"{len(self._shards)} finished shards are kept in {self.partial}"
            if error.errno in _DISK_FULL:
                raise ResourceError(
                    f"the disk or quota of {self.partial} is full ({error.strerror}). {kept}: free "
                    "some space and run the same command again to go on, or delete that folder."
                ) from error
            raise ResourceError(
                f"{place} can not be written or read: {error.strerror or error}. {kept}."
            ) from error


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _in_words(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
