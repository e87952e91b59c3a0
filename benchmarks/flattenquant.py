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
checkpoint; options go behind a colon, such as ``flattenquant:static=true:growth=0.25``. Rows that
stand in the output file already are kept.

    python benchmarks/flattenquant.py --table OUT.json --rows w8a8,smoothquant,flattenquant

prints what the file has as a table: the rise of perplexity, from the least seed to the largest, and
for ``flattenquant`` the stored bits per weight and the share of 4-bit multiplies.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import commit, machine  # noqa: E402

BASELINES = ("w8a8", "smoothquant", "rtn-w4a4", "hadamard-w4a4")
WITHOUT_CALIBRATION = ("rtn-w4a4",)
ALPHAS = (0.5, 0.85)
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


class Subject:
    """A model that is measured: its predictions, its linears, what calibration shows of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import lutra.api
        from lutra.architectures import architecture_of
        from lutra.evaluate.perplexity import cut_windows, token_nll

        self.arguments = arguments
        self.name = arguments.name or Path(arguments.model).name
        self.model, self.tokenizer = lutra.api.load(
            arguments.model, device=arguments.device, dtype="float32"
        )
        self.architecture = architecture_of(self.model.config)
        self.seq_len = min(SEQ_LEN, self.model.config.max_position_embeddings)
        self.ids_WL = cut_windows(
            Path(arguments.text), self.tokenizer, self.model.config.vocab_size, self.seq_len,
            arguments.windows,
        ).ids_WL  # fmt: skip
        with torch.no_grad():
            self.logits = [self._logits(self.model, ids) for ids in self.ids_WL.split(1)]
        windows = self.ids_WL.to(self.model.device).split(1)
        nll = [token_nll(x, ids) for x, ids in zip(self.logits, windows, strict=True)]
        self.perplexity = math.exp(float(torch.cat(nll).mean()))
        blocks = self.model.get_submodule(self.architecture.blocks)
        self.linears = {
            f"{i}.{path}": block.get_submodule(path)
            for i, block in enumerate(blocks)
            for path in self.architecture.linears
        }
        self.rotations: dict[int, Tensor] = {}
        self._maxima: dict[tuple[int, bool], dict[str, Tensor]] = {}

    def _logits(self, model: Any, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits

    def compare(self, model: Any) -> dict[str, float]:
        """Perplexity and the divergence from the original, window by window."""
        from lutra.evaluate.divergence import divergence
        from lutra.evaluate.perplexity import token_nll

        nll, kl = [], []
        with torch.no_grad():
            for ids, original in zip(self.ids_WL.split(1), self.logits, strict=True):
                logits = self._logits(model, ids)
                nll.append(token_nll(logits, ids.to(logits.device)))
                kl.append(divergence(original, logits)[0])
        return {
            "perplexity": math.exp(min(float(torch.cat(nll).mean()), 700.0)),
            "perplexity_reference": self.perplexity,
            "kl_mean": float(torch.cat(kl).mean()),
            "tokens": sum(x.numel() for x in nll),
        }

    def maxima(self, seed: int, rotated: bool) -> dict[str, Tensor]:
        """The largest input of each channel of each linear on the calibration windows."""
        from lutra.runner.calibrate import calibration_windows

        if (seed, rotated) in self._maxima:
            return self._maxima[seed, rotated]
        found: dict[str, Tensor] = {}

        def seen(name: str) -> Callable[..., None]:
            def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                if rotated:
                    x = x @ self.rotation(x.shape[1])
                largest = x.abs().amax(0)
                found[name] = torch.maximum(found[name], largest) if name in found else largest

            return hook

        windows = calibration_windows(
            self.tokenizer, self.arguments.calibration, CALIBRATION_WINDOWS, self.seq_len, seed
        )
        hooks = [m.register_forward_pre_hook(seen(name)) for name, m in self.linears.items()]
        with torch.no_grad():
            for ids in windows.ids_NT.split(2):
                self._logits(self.model, ids)
        for hook in hooks:
            hook.remove()
        self._maxima[seed, rotated] = found
        return found

    def rotation(self, width: int) -> Tensor:
        if width not in self.rotations:
            self.rotations[width] = rotation(width).to(self.model.device)
        return self.rotations[width]


def simulate(subject: Subject, row: str, seed: int, alpha: float) -> dict[str, float]:
    """The figures of a baseline: the linears of the model replaced, and put back afterwards."""
    from lutra.transforms.smooth import smoothing_scale

    rotated = row == "hadamard-w4a4"
    most = 127 if row in ("w8a8", "smoothquant") else 7
    maxima = {} if row in WITHOUT_CALIBRATION else subject.maxima(seed, rotated)
    for name, module in subject.linears.items():
        path = name.split(".", 1)[1]
        weight, scale = module.weight.detach(), None
        largest = maxima.get(name)
        if row == "smoothquant":
            behind_norm = [
                s.targets for s in subject.architecture.folds
                if path in s.targets and s.source not in subject.architecture.linears
            ]  # fmt: skip
            if behind_norm:
                i = name.split(".")[0]
                together = torch.stack(
                    [subject.linears[f"{i}.{p}"].weight.abs().amax(0) for p in behind_norm[0]]
                ).detach()
                scale = smoothing_scale(maxima[name], together.amax(0), alpha)
                weight, largest = weight * scale, maxima[name] / scale
        turn = subject.rotation(weight.shape[1]) if rotated else None
        if turn is not None:
            weight = weight @ turn
        if most == 127:
            weight = quantized(weight, float(weight.abs().max()) / most, most)
        else:
            weight = quantized(weight, weight.abs().amax(1, keepdim=True) / most, most)
        step = None if largest is None else float(largest.max()) / most
        module.forward = _forward(weight, module.bias, scale, turn, step, most)
    try:
        return subject.compare(subject.model)
    finally:
        for module in subject.linears.values():
            del module.forward


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


def quantize(
    subject: Subject, out: Path, bits: int, seed: int, options: dict[str, Any]
) -> dict[str, float]:
    """``lutra quantize``; with ``--surveys``, rows that differ in the budget alone share a survey.

    What a survey finds does not depend on the budget. So an unfinished run that is about to choose
    is kept, and each budget goes on from a copy of it.
    """
    import lutra.api

    arguments = subject.arguments
    settings: dict[str, Any] = {
        "method": "flattenquant", "bits": bits, "calibration": arguments.calibration,
        "seq_len": subject.seq_len, "seed": seed, "device": arguments.device,
    }  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    if arguments.surveys:
        shared = {k: v for k, v in options.items() if k != "budget"}
        key = "-".join((subject.name, str(bits), *map(str, shared.items()), str(seed)))
        survey = arguments.surveys / f".{key}.lutra-partial"
        if not survey.exists():

            def stop(progress: Any) -> None:
                if progress.what.startswith("choosing"):
                    raise KeyboardInterrupt

            with contextlib.suppress(KeyboardInterrupt):
                lutra.api.quantize(
                    arguments.model, arguments.surveys / key, **settings, options=shared,
                    on_progress=stop,
                )  # fmt: skip
        partial = out.parent / f".{out.name}.lutra-partial"
        shutil.copytree(survey, partial)
        journal = json.loads((partial / "progress.json").read_text())
        journal["fingerprint"]["options"] = dict(sorted(options.items()))
        (partial / "progress.json").write_text(json.dumps(journal))
    lutra.api.quantize(arguments.model, out, **settings, options=options)
    if arguments.surveys:
        return {}
    return {
        "quantize_seconds": round(time.perf_counter() - started, 1),
        "quantize_cpu_seconds": round(time.process_time() - cpu, 1),
    }


def multiplies(report: dict[str, Any]) -> float:
    """Multiplies in units of those of W8A8: growth counted, 4 bits half, 16 bits twice."""
    done = wanted = 0.0
    for layer in report["layers"].values():
        width = max(layer["bits"], layer["input_bits"]) if "bits" in layer else 16
        done += width / 8 * layer.get("columns", layer["in_features"]) * layer["out_features"]
        wanted += layer["in_features"] * layer["out_features"]
    return done / wanted


def measure(row: str, seed: int, subject: Subject) -> dict[str, Any]:
    """One row of the table with one seed of the calibration."""
    import transformers

    import lutra.api
    from lutra.scheme import options_from_strings

    arguments = subject.arguments
    facts: dict[str, Any] = {}
    if row.startswith("flattenquant"):
        _, *settings = row.split(":")
        options = options_from_strings(dict(s.split("=", 1) for s in settings))
        bits = int(options.pop("bits", 4))
        temporary = Path(tempfile.mkdtemp(dir=arguments.work))
        out = (arguments.keep or temporary) / f"{subject.name}-{row.replace(':', '-')}-{seed}"
        try:
            if not out.exists():
                facts |= quantize(subject, out, bits, seed, options)
            report = json.loads((out / "lutra_report.json").read_text())
            layers = report["layers"].values()
            facts |= {
                "bits_per_weight": report["bits_per_weight"],
                "multiplies_of_w8a8": multiplies(report),
                "shares": report["choice"]["shares"],
                "within_budget": report["choice"]["within_budget"],
                "rungs": dict(Counter(layer["rung"] for layer in layers)),
                "rotated_layers": sum(layer.get("rotated", 0) > 0 for layer in layers),
                "calibration_cost": report["calibration_cost"],
            }
            model, _ = lutra.api.load(out, device=arguments.device, dtype="float32")
            result = subject.compare(model)
        finally:
            shutil.rmtree(temporary)
    else:
        result = {}
        for alpha in ALPHAS if row == "smoothquant" else (0.0,):
            trial = simulate(subject, row, seed, alpha)
            if row == "smoothquant":
                trial["alpha"] = alpha
            if not result or trial["perplexity"] < result["perplexity"]:
                result = trial
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {
        "model": subject.name,
        "row": row,
        "seed": seed,
        **result,
        "rise": result["perplexity"] / result["perplexity_reference"] - 1,
        **facts,
        "text": Path(arguments.text).name,
        "windows": f"{len(subject.ids_WL)} of {subject.seq_len}",
        "calibration": Path(arguments.calibration).name,
        "machine": machine(arguments.device),
        "versions": versions,
        "commit": arguments.commit or commit(),
        "command": f"benchmarks/flattenquant.py {subject.name} --rows {row} --seeds {seed} "
        f"--windows {arguments.windows} --device {arguments.device}",
    }


def add(out: Path, found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The results so far, ``found`` included; several runs may add to one file in turn."""
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
        if found is not None:
            done.append(found)
            out.write_text(json.dumps(done, indent=1) + "\n")
    return done


def line(found: dict[str, Any]) -> str:
    """A result for people."""
    text = (
        f"{found['model']} {found['row']} seed {found['seed']}: perplexity "
        f"{found['perplexity_reference']:.3f} -> {found['perplexity']:.3f} "
        f"({100 * found['rise']:+.2f} %), KL {found['kl_mean']:.5f}"
    )
    if "shares" in found:
        text += (
            f", {found['bits_per_weight']:.2f} bits, "
            f"INT4 {100 * found['shares']['int4_multiplies']:.1f} %, "
            f"{found['multiplies_of_w8a8']:.3f} of the multiplies of W8A8"
        )
    return text


def span(values: list[float], write: Callable[[float], str]) -> str:
    """The least and the largest value, or the one that there is."""
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def percent(value: float) -> str:
    return f"{100 * value:+.2f} %" if abs(value) < 1 else f"{100 * value:+,.0f} %"


def table(results: list[dict[str, Any]], rows: list[str]) -> str:
    """Markdown: a line for each model, a column for each row."""
    lines = ["| model | perplexity | " + " | ".join(rows) + " |", "|---" * (len(rows) + 2) + "|"]
    for name in dict.fromkeys(r["model"] for r in results):
        cells = []
        for row in rows:
            found = [r for r in results if (r["model"], r["row"]) == (name, row)]
            if not found:
                cells.append("not run")
                continue
            cell = span([r["rise"] for r in found], percent)
            if row not in WITHOUT_CALIBRATION:
                cell += f" [{len(found)}]"
            if "shares" in found[0]:
                bits = span([r["bits_per_weight"] for r in found], "{:.2f}".format)
                int4 = span([100 * r["shares"]["int4_multiplies"] for r in found], "{:.0f}".format)
                cell += f"; {bits} bits, {int4} % INT4"
            cells.append(cell)
        # Rows may have been measured on more or fewer windows.
        longest = max((r for r in results if r["model"] == name), key=lambda r: r["tokens"])
        perplexity = f"{longest['perplexity_reference']:.2f}"
        lines.append(f"| {name} | {perplexity} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--table", type=Path, help="print a table of these results and stop")
    parser.add_argument("--name", default="", help="what the model is called in the results")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--rows", default=",".join((*BASELINES, "flattenquant")))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--keep", type=Path, help="folder in which quantized models are kept, and taken from"
    )
    parser.add_argument("--work", help="folder for quantized models while they are measured")
    parser.add_argument("--surveys", type=Path, help="folder for surveys that budgets share")
    parser.add_argument("--commit", help="of the code, where it does not run from a checkout")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text()), arguments.rows.split(",")))
        return
    if not all((arguments.model, arguments.calibration, arguments.text, arguments.out)):
        parser.error("a model, --calibration, --text and --out are needed")
    subject = Subject(arguments)
    seeds = list(map(int, arguments.seeds.split(",")))
    for seed in seeds:
        for row in arguments.rows.split(","):
            at = seeds[0] if row in WITHOUT_CALIBRATION else seed
            done = {(r["model"], r["row"], r["seed"]) for r in add(arguments.out, None)}
            if (subject.name, row, at) not in done:
                found = measure(row, at, subject)
                add(arguments.out, found)
                print(line(found), flush=True)


if __name__ == "__main__":
    main()
