"""Does rotating what remains help, once the large channels have their range? Errors of layers.

    python benchmarks/flattenquant_rotation.py MODEL --calibration wiki.txt --out OUT.json

For each group of linears of some blocks, on the original model's activations, the relative squared
error of the output at 4 bits (weights and activations, the method's `int4` rung): as the method
does it, without smoothing, and with ``rotate=hadamard``, which rotates where it promises a tenth
less. Ranges and weights are fitted to one half of the tokens and the errors are of the other half.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import commit, machine  # noqa: E402


def errors(
    group: tuple[str, ...], block: Any, fitted_TI: Tensor, other_TI: Tensor, options: Any
) -> dict[str, float]:
    """Output error of a group by treatment."""
    from lutra.methods.flattenquant import ladder, solve_group

    weight_OI = torch.cat([block.weights[p] for p in group])
    exact_TO = other_TI @ weight_OI.T

    def solved(chosen: Any) -> tuple[float, int]:
        (candidate,) = solve_group(group, block, fitted_TI, chosen, ladder(chosen, 4)[:1])
        y_TO = torch.cat([candidate.run(p, other_TI, None) for p in group], dim=1)
        error = float((y_TO - exact_TO).square().sum() / exact_TO.square().sum())
        return error, candidate.facts["rotated"]

    error, block_size = solved(replace(options, rotate="hadamard"))
    return {
        "flattened": solved(replace(options, smooth="none"))[0],
        "flattened, smoothed": solved(options)[0],
        "rotate=hadamard": error,
        "rotated block": block_size,
    }


def _inputs(
    model: Any, module: Any, groups: tuple[tuple[str, ...], ...], ids_NT: Tensor
) -> dict[tuple[str, ...], list[Tensor]]:
    """What each group of a block reads, window by window."""
    seen: dict[tuple[str, ...], list[Tensor]] = {g: [] for g in groups}
    hooks = [
        module.get_submodule(g[0]).register_forward_pre_hook(
            lambda _, x, g=g: seen[g].append(x[0].reshape(-1, x[0].shape[-1]))
        )
        for g in groups
    ]
    with torch.no_grad():
        for window in ids_NT.split(1):
            model(input_ids=window, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def main() -> None:
    from lutra.api import load
    from lutra.architectures import architecture_of
    from lutra.methods import Block
    from lutra.methods.flattenquant import Options
    from lutra.runner.calibrate import calibration_windows

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--name", default="")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--blocks", default="3")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, dtype="float32")
    shape = architecture_of(model.config)
    seq_len = min(1024, model.config.max_position_embeddings)
    ids = calibration_windows(tokenizer, arguments.calibration, arguments.windows, seq_len, 0)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for index in map(int, arguments.blocks.split(",")):
        module = model.get_submodule(f"{shape.blocks}.{index}")
        seen = _inputs(model, module, shape.groups, ids.ids_NT)
        parameters = dict(module.named_parameters())
        weights = {p: parameters.pop(f"{p}.weight").detach() for p in shape.linears}
        block = Block(f"{shape.blocks}.{index}", weights, {}, {}, parameters, shape)
        for group, parts in seen.items():
            rows = torch.cat(parts)
            half = len(rows) // 2
            with torch.no_grad():
                found = errors(group, block, rows[:half], rows[half:], Options())
            name = arguments.name or Path(arguments.model).name
            results.append(
                {"model": name, "layer": f"{index}.{group[0]}", "errors": found,
                 "machine": machine("cpu"), "commit": commit()}
            )  # fmt: skip
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(index, group[0], {k: round(v, 5) for k, v in found.items()}, flush=True)


if __name__ == "__main__":
    main()
