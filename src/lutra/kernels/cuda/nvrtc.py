"""Compile CUDA C++ to machine code for one architecture, once, and keep it on disk.

NVRTC needs neither a GPU nor a CUDA toolkit: the libraries that come with torch are enough. The
cache is a folder of files named by the hash of source, options, architecture and NVRTC version:
``$LUTRA_CACHE/cubin`` (default ``$XDG_CACHE_HOME/lutra/cubin``, then ``~/.cache/lutra/cubin``).
Each file carries a digest of its content; one that does not fit is compiled anew. A folder that
cannot be written costs a compilation per process, nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from lutra.errors import KernelError

logger = logging.getLogger(__name__)

_HEADER = b"lutra cubin 1\n"
_DIGEST_BYTES = 32
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
COMMON_OPTIONS = ("-default-device", "--std=c++17")


@cache
def source(name: str) -> str:
    """Text of a kernel of this folder with all that it includes.

    Kernels of bit planes follow ``common.cuh``; the flat ones (``flat_*``) include what they need.
    """
    folder = Path(__file__).parent

    def read(file: str) -> str:
        text = (folder / file).read_text(encoding="utf-8")
        return _INCLUDE.sub(lambda match: read(match[1]), text)

    text = read(f"{name}.cu")
    return text if name.startswith("flat_") else read("common.cuh") + text


@cache
def version() -> tuple[int, int]:
    """Version of the NVRTC library.

    Raises:
        KernelError: cuda-bindings or the NVRTC library is missing.
    """
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise KernelError(
            f"CUDA kernels are compiled by NVRTC, which cannot be loaded here ({error}); "
            "install it with: pip install lutra[cuda]"
        ) from error
    _check(status)
    return major, minor


@cache
def supported_archs() -> frozenset[int]:
    """Compute capabilities that this NVRTC compiles for, as numbers like 90."""
    version()
    from cuda.bindings import nvrtc

    status, count = nvrtc.nvrtcGetNumSupportedArchs()
    _check(status)
    status, archs = nvrtc.nvrtcGetSupportedArchs()
    _check(status)
    return frozenset(archs[:count])


def version_text() -> str:
    return ".".join(map(str, version()))


def _options(defines: Mapping[str, int], arch: str) -> list[str]:
    parameters = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    return [f"--gpu-architecture={arch}", *COMMON_OPTIONS, *parameters]


def _entry(name: str, text: str, options: list[str], arch: str) -> Path:
    """File of the cache for a source text and its options."""
    key = hashlib.sha256("\0".join([text, *options, repr(version())]).encode()).hexdigest()
    return cache_folder() / f"{name}-{arch}-{key[:32]}.cubin"


def is_cached(name: str, defines: Mapping[str, int], arch: str) -> bool:
    """Whether :func:`compile_cubin` would find the kernel on disk."""
    return _read(_entry(name, source(name), _options(defines, arch), arch)) is not None


def check_cache() -> None:
    """Refuse a cache folder that cannot be written, for those who compile for later.

    Raises:
        KernelError: it cannot; the message names it and says how to choose another.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KernelError(
            f"the kernel cache {folder} cannot be written ({error}); "
            "choose another folder with the environment variable LUTRA_CACHE"
        ) from error


def compile_cubin(name: str, defines: Mapping[str, int], arch: str) -> bytes:
    """Machine code of kernel file ``name`` for ``arch`` (``sm_90a``), from the cache or compiled.

    Raises:
        KernelError: NVRTC is missing or refuses the source; its log is in the message.
    """
    text, options = source(name), _options(defines, arch)
    path = _entry(name, text, options, arch)
    found = _read(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            found = _read(path)  # another process may have been faster
            if found is None:
                _say_compiling(str(path.parent))
                found = compile_uncached(text, options, f"{name}.cu")[0]
                _write(path, found)
        return found
    except OSError as error:
        _say_once(f"the kernel cache {path.parent} cannot be used ({error}); compiling in memory")
        return compile_uncached(text, options, f"{name}.cu")[0]


def compile_uncached(text: str, options: list[str], name: str) -> tuple[bytes, str]:
    """Machine code and compiler log of a source text, whatever the cache holds."""
    version()
    from cuda.bindings import nvrtc

    status, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    _check(status)
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log_bytes = bytes(size)
        nvrtc.nvrtcGetProgramLog(program, log_bytes)
        log = log_bytes.rstrip(b"\0").decode(errors="replace").strip()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(f"NVRTC {version()} cannot compile {name} with {options}:\n{log}")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status)
        cubin = bytes(size)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin)[0])
        return cubin, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cache_folder() -> Path:
    """Folder of compiled kernels; it need not exist."""
    own = os.environ.get("LUTRA_CACHE")
    if own:
        return Path(own) / "cubin"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lutra" / "cubin"


def _check(status: object) -> None:
    from cuda.bindings import nvrtc

    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC failed: {status}")


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    start = len(_HEADER) + _DIGEST_BYTES
    digest, cubin = content[len(_HEADER) : start], content[start:]
    if content.startswith(_HEADER) and hashlib.sha256(cubin).digest() == digest:
        return cubin
    _say_once(f"the cached kernel {path} is damaged; compiling it again")
    return None


def _write(path: Path, cubin: bytes) -> None:
    write_whole(path, _HEADER + hashlib.sha256(cubin).digest() + cubin)


def write_whole(path: Path, content: bytes) -> None:
    """Whole file or nothing: written beside its place, then renamed.

    Others may read it as far as the umask lets them: a cache can be filled by one user for all.
    """
    temporary = path.with_name(f"{path.stem}-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Hold a lock file, so that of several processes one compiles and the others read."""
    with path.open("ab") as file:
        try:
            import fcntl
        except ImportError:  # no such lock on Windows: the rename alone keeps the file whole
            yield file
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@cache
def _say_compiling(folder: str) -> None:
    logger.info(
        "compiling GPU kernels, about a second each, once on this machine (kept in %s); "
        "`lutra warmup MODEL` does that ahead", folder,
    )  # fmt: skip


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
