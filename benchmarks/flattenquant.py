"""Accuracy of 4- and 8-bit weights and activations: the tables of FlattenQuant in docs/results.md.

    python benchmarks/flattenquant.py MODEL --calibration wiki.txt --text heldout.txt \
        --rows w8a8,smoothquant,rtn-w4a4,hadamard-w4a4,flattenquant --seeds 0,1,2 --out OUT.json

Baselines are simulated in float32 in the model that transformers runs; they are here to be compared
with and are no methods of the package:

- ``w8a8``: one static step for each tensor, weights and activations, 8 bits.
- ``smoothquant``: the same behind SmoothQuant (alpha 0.5 and 0.85 behind norms; the better counts).
- ``rtn-w4a4``: 4 bits, a step for each token and each output, nearest.
- ``hadamard-w4a4``: 4 bits behind an orthogonal rotation of the inputs (Hadamard times a random
  orthogonal factor where the width is no power of two), one static step for the activations, a step
  for each output of the weights.

``flattenquant`` is the method as ``lutra quantize`` runs it, the result loaded and evaluated as any
checkpoint; options go behind a colon, such as ``flattenquant:static=true:growth=0.25``. All see the
same calibration windows of a seed. Rows already in the output file are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import commit, machine  # noqa: E402

BASELINES = ("w8a8", "smoothquant", "rtn-w4a4", "hadamard-w4a4")
SEQ_LEN = 1024
CALIBRATION_WINDOWS = 8


def quantized(x: Tensor, step: Tensor | float, most: int) -> Tensor:
    """x rounded to ``most`` steps on either side."""
    return (x / step).round().clamp(-most, most) * step


def rotation(width: int) -> Tensor:
    """An orthogonal matrix ``[width, width]``: Hadamard where it can be."""
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(width // power, width // power, generator=generator, dtype=torch.float64)
    rest = torch.linalg.qr(rest).Q.contiguous()
    return torch.kron(rest, hadamard / math.sqrt(power)).float()


def simulate(model: Any, architecture: Any, row: str, ids_NT: Tensor, alpha: float) -> None:
    """Replace the linears of the blocks by a baseline's, with what the windows show."""
    from lutra.architectures import is_linear
    from lutra.transforms.smooth import smoothing_scale

    blocks = model.get_submodule(architecture.blocks)
    linears = {
        f"{i}.{path}": block.get_submodule(path)
        for i, block in enumerate(blocks)
        for path in architecture.linears
    }
    rotations: dict[int, Tensor] = {}
    maxima: dict[str, Tensor] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            if row == "hadamard-w4a4":
                if x.shape[1] not in rotations:
                    rotations[x.shape[1]] = rotation(x.shape[1]).to(x.device)
                x = x @ rotations[x.shape[1]]
            largest = x.abs().amax(0)
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        return hook

    hooks = [m.register_forward_pre_hook(seen(name)) for name, m in linears.items()]
    with torch.no_grad():
        for ids in ids_NT.split(2):
            model(input_ids=ids.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        assert is_linear(module) and isinstance(module, torch.nn.Linear)
        path = name.split(".", 1)[1]
        weight, scale = module.weight.detach(), None
        largest = maxima[name]
        if row == "smoothquant":
            behind_norm = [
                s.targets for s in architecture.folds
                if path in s.targets and s.source not in architecture.linears
            ]  # fmt: skip
            if behind_norm:
                i = name.split(".")[0]
                together = torch.stack(
                    [linears[f"{i}.{p}"].weight.detach().abs().amax(0) for p in behind_norm[0]]
                )
                scale = smoothing_scale(largest, together.amax(0), alpha)
                weight, largest = weight * scale, largest / scale
        turn = rotations.get(weight.shape[1])
        if turn is not None:
            weight = weight @ turn
        most = 127 if row in ("w8a8", "smoothquant") else 7
        if most == 127:
            weight = quantized(weight, float(weight.abs().max()) / most, most)
        else:
            weight = quantized(weight, weight.abs().amax(1, keepdim=True) / most, most)
        step = None if row == "rtn-w4a4" else float(largest.max()) / most
        module.forward = _forward(weight, module.bias, scale, turn, step, most)


def _forward(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, turn: Tensor | None,
    step: float | None, most: int,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    def forward(x: Tensor) -> Tensor:
        if scale is not None:
            x = x / scale
        if turn is not None:
            x = x @ turn
        used = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most if step is None else step
        return torch.nn.functional.linear(quantized(x, used, most), weight, bias)

    return forward


def compare(model: Any, reference: Any, ids_WL: Tensor) -> dict[str, float]:
    """Perplexity of both and the divergence, window by window."""
    from lutra.evaluate.divergence import divergence
    from lutra.evaluate.perplexity import token_nll

    nll, nll_reference, kl = [], [], []
    with torch.no_grad():
        for ids in ids_WL.split(1):
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            original = reference(input_ids=ids, use_cache=False).logits
            nll.append(token_nll(logits, ids))
            nll_reference.append(token_nll(original, ids))
            kl.append(divergence(original, logits)[0])
    mean = torch.cat(nll).mean(), torch.cat(nll_reference).mean()
    return {
        "perplexity": math.exp(min(float(mean[0]), 700.0)),
        "perplexity_reference": math.exp(float(mean[1])),
        "kl_mean": float(torch.cat(kl).mean()),
        "tokens": sum(x.numel() for x in nll),
    }


def measure(row: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table with one seed of the calibration."""
    import lutra.api
    from lutra.architectures import architecture_of
    from lutra.evaluate.perplexity import cut_windows
    from lutra.runner.calibrate import calibration_windows
    from lutra.scheme import options_from_strings

    device = arguments.device
    reference, tokenizer = lutra.api.load(arguments.model, device=device, dtype="float32")
    seq_len = min(SEQ_LEN, reference.config.max_position_embeddings)
    windows = cut_windows(
        Path(arguments.text), tokenizer, reference.config.vocab_size, seq_len, arguments.windows
    )
    started, cpu = time.perf_counter(), time.process_time()
    facts: dict[str, Any] = {}
    if row.startswith("flattenquant"):
        _, *settings = row.split(":")
        options = options_from_strings(dict(s.split("=", 1) for s in settings))
        bits = int(options.pop("bits", 4))
        name = arguments.name or Path(arguments.model).name
        temporary = Path(tempfile.mkdtemp(dir=arguments.work))
        out = (arguments.keep or temporary) / f"{name}-{row.replace(':', '-')}-{seed}"
        try:
            if not out.exists():
                lutra.api.quantize(
                    arguments.model, out, method="flattenquant", bits=bits,
                    calibration=arguments.calibration, seq_len=seq_len, seed=seed, device=device,
                    options=options,
                )  # fmt: skip
                facts["quantize_seconds"] = round(time.perf_counter() - started, 1)
                facts["quantize_cpu_seconds"] = round(time.process_time() - cpu, 1)
            report = json.loads((out / "lutra_report.json").read_text())
            facts |= {
                "bits_per_weight": report["bits_per_weight"],
                "shares": report["choice"]["shares"],
                "within_budget": report["choice"]["within_budget"],
                "rungs": {n: layer["rung"] for n, layer in report["layers"].items()},
                "calibration_cost": report["calibration_cost"],
            }
            model, _ = lutra.api.load(out, device=device, dtype="float32")
            result = compare(model, reference, windows.ids_WL)
        finally:
            shutil.rmtree(temporary)
    else:
        architecture = architecture_of(reference.config)
        calibration = calibration_windows(
            tokenizer, arguments.calibration, CALIBRATION_WINDOWS, seq_len, seed
        )
        result = {}
        for alpha in (0.5, 0.85) if row == "smoothquant" else (0.0,):
            model, _ = lutra.api.load(arguments.model, device=device, dtype="float32")
            if row != "original":
                simulate(model, architecture, row, calibration.ids_NT, alpha)
            trial = compare(model, reference, windows.ids_WL)
            if row == "smoothquant":
                trial["alpha"] = alpha
            if not result or trial["perplexity"] < result["perplexity"]:
                result = trial
    return {
        "model": arguments.name or Path(arguments.model).name,
        "row": row,
        "seed": seed,
        **result,
        "rise": result["perplexity"] / result["perplexity_reference"] - 1,
        **facts,
        "text": Path(arguments.text).name,
        "windows": f"{len(windows.ids_WL)} of {seq_len}",
        "calibration": Path(arguments.calibration).name,
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "command": f"benchmarks/flattenquant.py {Path(arguments.model).name} --rows {row} "
        f"--seeds {seed} --windows {arguments.windows} --device {device}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--name", default="", help="what the model is called in the results")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rows", default=",".join((*BASELINES, "flattenquant")))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--keep", type=Path, help="folder in which quantized models are kept, and taken from"
    )
    parser.add_argument("--work", help="folder for quantized models while they are measured")
    arguments = parser.parse_args()
    name = arguments.name or Path(arguments.model).name
    for row in arguments.rows.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            # Read again each time: several runs may add to one file in turn.
            done = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            if any((m["model"], m["row"], m["seed"]) == (name, row, seed) for m in done):
                continue
            last = measure(row, seed, arguments)
            done = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            arguments.out.write_text(json.dumps([*done, last], indent=1) + "\n")
            shares = last.get("shares", {}).get("int4_multiplies")
            print(
                f"{name} {row} seed {seed}: perplexity {last['perplexity_reference']:.3f} -> "
                f"{last['perplexity']:.3f} ({100 * last['rise']:+.2f} %), KL {last['kl_mean']:.4f}"
                + ("" if shares is None else f", INT4 {100 * shares:.1f} % of multiplies"),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
