"""How fast a checkpoint comes to a GPU, and how much of the host's memory that takes.

    python benchmarks/loading.py /disk/folder --shape llama-3-8b --out loading.json

Writes a checkpoint of random packed weights (made on the card) into the folder, then loads it with
each of the two loaders, with the files in the page cache and without, in the same process. Beside
them: reading the same files into memory by eight and sixteen threads, and copying from pinned
memory. What a load takes of the host is anonymous memory (the mapped files are the page cache's),
sampled every five milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lutra.bench.shapes import random_model
from lutra.evaluate.load import load_model, open_checkpoint
from lutra.evaluate.measure import device_name, versions
from lutra.formats.layers import quantization_config
from lutra.scheme import Format, Scheme


def write(
    folder: Path, shape: str, format: Format, layers: int | None, shard_bytes: int,
    device: str = "cuda",
) -> None:  # fmt: skip
    """A checkpoint as `lutra quantize` writes it, of random weights."""
    model, _ = random_model(shape, format, device, None, layers)
    shard: dict[str, torch.Tensor] = {}
    size, place = 0, {}

    def flush() -> None:
        nonlocal size
        name = f"model-{len(set(place.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        place.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    total = 0
    for name, tensor in model.state_dict().items():
        total += tensor.nbytes
        shard[name] = tensor.cpu()
        size += tensor.nbytes
        if size > shard_bytes:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    blocks = "model.decoder.layers.*" if model.config.model_type == "opt" else "model.layers.*"
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(Scheme(((blocks, format),)))
    (folder / "config.json").write_text(json.dumps(config, default=str))


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_all(files: list[Path], threads: int = 8, piece: int = 16 << 20) -> float:
    """Seconds of reading files into memory, by pieces, on several threads."""
    local = threading.local()

    def read(job: tuple[Path, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(piece)
        with job[0].open("rb", buffering=0) as file:
            file.seek(job[1])
            file.readinto(local.buffer)

    jobs = [(f, at) for f in files for at in range(0, f.stat().st_size, piece)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, jobs))
    return time.perf_counter() - begin


def pinned_gbps(size: int = 1 << 30) -> float:
    """Copies from pinned memory to the card, in GB/s."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - begin) / 1e9)
    return best


class Watch(threading.Thread):
    """The most anonymous and shared memory that this process held."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.most = max(self.most, held())


def held() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(v.split()[1]) for v in lines if v.startswith(("RssAnon", "RssShmem"))) * 1024


def load(folder: Path, pinned: bool, device: str = "cuda") -> dict[str, float]:
    os.environ["LUTRA_PINNED_LOAD"] = "1" if pinned else "0"
    gc.collect()
    before, watch = held(), Watch()
    watch.start()
    begin = time.perf_counter()
    model = load_model(open_checkpoint(folder), device, "auto")
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    watch.stopped.set()
    watch.join()
    del model
    torch.cuda.empty_cache()
    return {"seconds": seconds, "host_bytes": watch.most - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--kind", default="ubcq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shard-bytes", type=int, default=1 << 30)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    format = Format(asked.kind, asked.bits, 128)
    write(asked.folder, asked.shape, format, asked.layers, asked.shard_bytes)
    gc.collect()
    torch.cuda.empty_cache()
    files = sorted(asked.folder.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files)
    seconds = time.perf_counter() - begin
    print(f"{size / 1e9:.2f} GB in {len(files)} files written in {seconds:.1f} s", flush=True)
    result: dict[str, Any] = {
        "shape": asked.shape, "format": str(format), "bytes": size, "files": len(files),
        "largest_shard": max(f.stat().st_size for f in files), "device": device_name("cuda"),
        "versions": versions(), "pinned_gbps": pinned_gbps(), "loads": [],
    }  # fmt: skip
    for state in ("cold", "warm"):
        rates = {}
        for threads in (8, 16):
            if state == "cold":
                forget(files)
            rates[threads] = size / read_all(files, threads) / 1e9
        result[f"{state}_read_gbps_by_threads"] = rates
        result[f"{state}_read_gbps"] = max(rates.values())
    print(json.dumps(result), flush=True)
    load(asked.folder, False)  # imports and kernels
    for pinned in (True, False, True):
        for state in ("cold", "warm"):
            if state == "cold":
                forget(files)
            row = {"pinned": pinned, "state": state} | load(asked.folder, pinned)
            row["gbps"] = size / row["seconds"] / 1e9
            result["loads"].append(row)
            print(json.dumps(row), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
