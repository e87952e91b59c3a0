"""Accuracy of methods at several widths: the table of docs/results.md.

    python benchmarks/accuracy.py MODEL --calibration wiki.txt --text wiki.test.raw \
        --rows rtn:4:128,gptq:4:128,lut-gemm:4:256 --out benchmarks/results/accuracy_MODEL.json

A row is METHOD:BITS:GROUP, with further options behind it as key=value, such as
``lut-gemm:2:256:reconstruct=true`` or ``lut-gemm:2:384:format=bcq``. Each row is quantized with
128 windows of 1024 tokens and evaluated on the first 40 windows of 1024 of the text. Rows already
in the output file are kept, so a run can be interrupted and extended.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize and evaluate one row."""
    import lutra.api
    from lutra.scheme import options_from_strings

    method, bits, group_size, *settings = row.split(":")
    options = options_from_strings(dict(s.split("=", 1) for s in settings))
    kind = str(options.pop("format", ""))
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        started, cpu = time.perf_counter(), time.process_time()
        report = lutra.api.quantize(
            arguments.model, folder / "out", method=method, bits=int(bits),
            group_size=int(group_size), kind=kind, calibration=arguments.calibration,
            samples=arguments.samples, seq_len=1024, device=arguments.device, options=options,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        result = lutra.api.evaluate(
            folder / "out", text=arguments.text, against=arguments.model, seq_len=1024,
            max_windows=40, device=arguments.device,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    keys = (
        "perplexity", "perplexity_reference", "kl_mean", "kl_p99", "top1_agreement",
        "bits_per_weight", "size_bytes", "tokens",
    )  # fmt: skip
    return {
        "row": row,
        **{key: result[key] for key in keys},
        "calibration_kl_mean": (report["calibration_cost"] or {}).get("kl_mean"),
        "quantize_seconds": round(seconds, 1),
        "quantize_cpu_seconds": round(cpu, 1),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "compute": report["compute"],
        "versions": report["versions"],
        "machine": machine(arguments.device),
        "commit": commit(),
        "command": f"lutra quantize {Path(arguments.model).name} DST --method {method} "
        f"--bits {bits} --group-size {group_size} --calibration {Path(arguments.calibration).name} "
        f"--samples {arguments.samples} --seq-len 1024 --device {arguments.device}"
        + "".join(f" --set {s}" for s in settings)
        + f"; lutra eval DST --against {Path(arguments.model).name} "
        f"--text {Path(arguments.text).name} --seq-len 1024 --max-windows 40",
    }


def machine(device: str) -> str:
    """The processor, and its cores; or the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of this checkout, with a mark if files differ from it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", help="folder for the quantized models while they are measured")
    arguments = parser.parse_args()
    measured = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for row in arguments.rows.split(","):
        if any(m["row"] == row for m in measured):
            continue
        measured.append(measure(row, arguments))
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n")
        last = measured[-1]
        print(f"{row}: {last['bits_per_weight']:.3f} bits, perplexity {last['perplexity']:.3f}")


if __name__ == "__main__":
    main()
