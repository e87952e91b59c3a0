"""The greedy tokens of quantized checkpoints on a GPU beside those of a CPU.

    python benchmarks/greedy_tokens.py reference DIR... --out tokens.json      # on any machine
    python benchmarks/greedy_tokens.py compare DIR... --tokens tokens.json --out result.json

The reference is float32 through transformers' own loop; what is compared with it is what a user
gets from ``model.generate``: recorded steps, fused blocks, the kernels of the device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lutra.bench.tokens import compare_tokens, reference_tokens
from lutra.evaluate.measure import device_name, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reference", "compare"))
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["float16"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.what == "reference":
        found = {folder.name: reference_tokens(folder) for folder in asked.folders}
        asked.out.write_text(json.dumps({"versions": versions(), "models": found}) + "\n")
        return
    wanted = json.loads(asked.tokens.read_text())
    rows = []
    for folder in asked.folders:
        for dtype in asked.dtype:
            row = compare_tokens(folder, wanted["models"][folder.name], asked.device, dtype)
            rows.append({"model": folder.name} | row)
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "device": device_name(asked.device), "versions": versions(),
        "reference": wanted["versions"], "rows": rows,
    }  # fmt: skip
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
