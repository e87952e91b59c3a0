"""Bring files into the system's page cache before they are needed.

A model is built for some tenths of a second before the first of its tensors is wanted, and then
they are wanted one by one, page by page. In the meantime threads read the files from begin to end,
so that a disk is busy from the start, and what is mapped is there when it is touched. What lies in
the page cache already is passed over.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

THREADS = 8
# Large, because between two pieces a thread waits for the interpreter, which builds the model.
PIECE_BYTES = 32 << 20
BUFFER_BYTES = 1 << 20  # what is read is not kept, so one buffer takes all of a piece


class ReadAhead:
    """Reads files in a given order, on threads, while the context lasts.

    It is advice: a file that can not be read is left to whoever needs it, who meets the same error.

    Args:
        files: in the order in which they are needed.
        lead: bytes by which it may be ahead of :meth:`reached`.
    """

    def __init__(self, files: Sequence[Path], lead: int) -> None:
        self.lead = lead
        self.read = 0  # bytes that were not in the page cache
        self._pieces = iter(
            [(file, at) for file in files for at in range(0, file.stat().st_size, PIECE_BYTES)]
        )
        self._given = 0
        self._reached = 0
        self._ended = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ReadAhead:
        for number in range(THREADS):
            thread = threading.Thread(
                target=self._run, name=f"lutra-read-ahead-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def reached(self, size: int) -> None:
        """So many bytes of the files have been used and are not needed any more."""
        with self._changed:
            self._reached = size
            self._changed.notify_all()

    def _next(self) -> tuple[Path, int] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or self._given - self._reached < self.lead
            )
            if self._ended:
                return None
            self._given += PIECE_BYTES
            return next(self._pieces, None)

    def _run(self) -> None:
        buffer = bytearray(min(BUFFER_BYTES, PIECE_BYTES))
        while (piece := self._next()) is not None:
            file, at = piece
            try:
                handle = os.open(file, os.O_RDONLY)
                try:
                    self._bring(handle, at, buffer)
                finally:
                    os.close(handle)
            except OSError as error:
                logger.info("%s is not read ahead: %s", file, error)
                return

    def _bring(self, handle: int, at: int, buffer: bytearray) -> None:
        size = min(PIECE_BYTES, os.fstat(handle).st_size - at)
        if _is_cached(handle, at, size):
            return
        if hasattr(os, "posix_fadvise"):  # all of it at once; reads by themselves are shorter
            os.posix_fadvise(handle, at, size, os.POSIX_FADV_WILLNEED)
        done = 0
        with memoryview(buffer) as view:
            while done < size:
                whole, rest = divmod(size - done, len(buffer))
                count = os.preadv(handle, [view] * whole + [view[:rest]], at + done)
                if count == 0:
                    break
                done += count
        with self._changed:
            self.read += done


def _is_cached(handle: int, at: int, size: int) -> bool:
    """Whether the ends and the middle of a piece can be read without waiting for the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    one = bytearray(1)
    try:
        return all(
            os.preadv(handle, [one], place, os.RWF_NOWAIT) == 1
            for place in (at, at + size // 2, at + size - 1)
        )
    except OSError:  # it would have to wait, or the file system can not tell
        return False
