"""The command line: verbs, their options, and how results and errors are shown.

Each verb imports what it needs when it runs. With ``--json`` exactly one JSON value goes to
standard output; tables, progress and messages go to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from lutra.errors import LutraError, SchemeError


class _Interrupted(Exception):
    """Ctrl-C, with what to tell the user."""


class _Verbs(typer.core.TyperGroup):
    """typer ends on Ctrl-C without a word, or with status 1, depending on its version."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted("interrupted") from None


app = typer.Typer(
    name="lutra",
    cls=_Verbs,
    help="Make a large language model low-bit, know what that cost, and run it fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
ServedBits = Annotated[
    int | None, typer.Option("--bits", help="Lower precision of a file that serves several.")
]
TensorParallel = Annotated[
    bool,
    typer.Option("--tensor-parallel", help="Cut the model over the processes of torchrun."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; chosen by model and device.")
]


def main() -> None:
    """Entry point of ``lutra``: errors of the user's input become one message and exit status 1."""
    # Before torch is loaded: threads that spin while they wait take cores from whatever else runs,
    # ourselves included (measured: five times slower on two busy cores). Sleeping costs little.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lutra").setLevel(logging.INFO)
    try:
        app()
    except LutraError as error:
        _say(f"[bold red]error:[/] {_escape(str(error))}")
        sys.exit(1)
    except (_Interrupted, KeyboardInterrupt) as stop:
        _say(_escape(str(stop) or "interrupted"))
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for GPUs alone; on CPU only the text tells.
        text = str(error)
        if isinstance(error, RuntimeError) and not (
            "allocate memory" in text or "out of memory" in text
        ):
            raise
        _say(
            f"[bold red]error:[/] out of memory ({_escape(text.splitlines()[0] if text else '')}). "
            "Finished blocks are kept: run the same command again with more memory, or less to do "
            "(see `lutra plan`; --samples and --seq-len make it smaller)."
        )
        sys.exit(1)


# ---- verbs


@app.command()
def quantize(
    src: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    method: Annotated[str, typer.Option(help="See `lutra methods`.")] = "lut-gemm",
    bits: Annotated[int, typer.Option(help="Width of the weights, 1 to 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Inputs per group, a multiple of 32; -1: one group per row.")
    ] = 128,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text to calibrate on.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Train on each block's output (lut-gemm).")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable."),
    ] = None,
    serve_bits: Annotated[
        str, typer.Option(help="Lower precisions to serve from the same file, such as 2,3,4.")
    ] = "",
    lm_head_bits: Annotated[
        int, typer.Option(help="Quantize the head too, with so many bits; 0 leaves it.")
    ] = 0,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Choice of windows, order of training.")] = 0,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into a new folder; the same command again resumes it."""
    from lutra.api import quantize as run
    from lutra.scheme import options_from_strings

    options = options_from_strings(_pairs(settings or []))
    kind = options.pop("format", "")
    if reconstruct:
        options["reconstruct"] = True
    started = time.perf_counter()
    try:
        with _progress("quantizing") as update:
            report = run(
                src, dst, method=method, bits=bits, group_size=group_size, kind=str(kind),
                calibration=calibration, samples=samples, seq_len=seq_len,
                serve_bits=_integers("--serve-bits", serve_bits), lm_head_bits=lm_head_bits,
                device=device, seed=seed, options=options,
                on_progress=lambda p: update(p.done, p.total, p.what),
            )  # fmt: skip
    except KeyboardInterrupt:
        raise _Interrupted(
            "interrupted. The same command again goes on with the block where this one stopped."
        ) from None
    seconds = time.perf_counter() - started
    _write_card(dst, src)
    if as_json:
        _print_json({**report, "output": str(dst), "seconds": seconds})
        return
    _say(f"{dst}: {report['bits_per_weight']:.3f} bits per weight, {seconds:.0f} s")
    if not report["family_known"]:
        _say(
            f"note: the family {report['family']!r} has no entry in lutra's table; its linears "
            "were found by structure and quantized layer by layer"
        )
    cost = report["calibration_cost"]
    if cost:
        _say(
            f"on {cost['tokens']} calibration tokens: perplexity "
            f"{cost['perplexity_original']:.3f} -> {cost['perplexity_quantized']:.3f}, "
            f"KL {cost['kl_mean']:.4f} nats. Measure on other text with: lutra eval {dst} "
            f"--against {src} --text FILE"
        )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint, dense or quantized.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    against: Annotated[str | None, typer.Option(help="The original checkpoint.")] = None,
    bits: ServedBits = None,
    tasks: Annotated[str, typer.Option(help="Task names, such as lambada,arc_easy.")] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder of the task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    join: Annotated[str, typer.Option(help="as-is, or blank-lines between lines.")] = "as-is",
    batch_size: Annotated[int | None, typer.Option(help="Windows in a forward pass.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and KL divergence and top-1 agreement against the original."""
    from lutra.evaluate import evaluate as run

    with _progress("evaluating") as update:
        result = run(
            model, text=text, against=against, bits=bits, seq_len=seq_len, max_windows=max_windows,
            tasks=[t for t in tasks.split(",") if t], tasks_dir=tasks_dir, limit=limit,
            device=device, dtype=dtype, batch_size=batch_size, join=join,
            progress=lambda done, total: update(done, total, "windows"),
        )  # fmt: skip
    if as_json:
        _print_json(result)
        return
    rows = [
        (name.replace("_", " "), _number(result[name]))
        for name in (
            "perplexity", "perplexity_reference", "kl_mean", "kl_p99", "top1_agreement",
            "bits_per_weight", "tokens", "tokens_per_second",
        )
        if result.get(name) is not None
    ]  # fmt: skip
    for name, scores in (result.get("tasks") or {}).items():
        rows.extend((f"{name} {key}", _number(value)) for key, value in scores.items())
    _table(("measure", model), rows)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint, dense or quantized.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    bits: ServedBits = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    tensor_parallel: TensorParallel = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from lutra.generate import generate as run

    shown = False

    def show(piece: str) -> None:
        nonlocal shown
        shown = True
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        result = run(
            model, prompt, max_new_tokens, bits=bits, device=device, dtype=dtype,
            temperature=temperature, top_p=top_p, seed=seed, tensor_parallel=tensor_parallel,
            stream=None if as_json or _is_helper() else show,
        )  # fmt: skip
    except KeyboardInterrupt:
        if shown:  # the text so far has a line of its own
            sys.stdout.write("\n")
        raise
    if _is_helper():
        return
    if as_json:
        _print_json(result)
        return
    sys.stdout.write("\n")
    rate = result["tokens_per_second"]
    _say(f"{result['new_tokens']} tokens" + (f", {rate:.1f} tokens per second" if rate else ""))
    if result["stopped"] == "positions":
        _say(f"{max_new_tokens:,} tokens were asked for; the model has positions for no more.")


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="Quantized checkpoint.")],
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also say which kernel runs each layer, and why.")
    ] = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype of activations, for --kernels.")] = "float32",
    as_json: Json = False,
) -> None:
    """Show how each layer is stored and multiplied, and the measured bits per weight."""
    from lutra.inspection import inspect_checkpoint

    result = inspect_checkpoint(folder, device=device, dtype=dtype, kernels=kernels)
    if as_json:
        _print_json(result)
        return
    chosen = any("rung" in layer for layer in result["layers"])
    more = ("growth", "threshold", "clipped_inputs", "clipped_weights", "kl", "kernel")
    keys = ("name", "format") + (("rung", *more) if chosen else ("bits_per_weight",))
    keys += tuple(k for k in ("kernel", "reason") if kernels and k not in keys)
    head = ("layer", *(k.replace("_", " ") for k in keys[1:]))
    _table(head, [tuple(_number(layer.get(k)) for k in keys) for layer in result["layers"]])
    if kernels and any("runs_with" in layer for layer in result["layers"]):
        programs: dict[tuple[str, ...], list[str]] = {}
        for layer in result["layers"]:
            if "runs_with" not in layer:
                continue
            what = layer["name"].rpartition(".")[2]
            together = ", ".join(n.rpartition(".")[2] for n in layer["runs_with"])
            for row in _programs(layer["batches"]):
                shown = programs.setdefault((together, layer["format"], *row), [])
                if what not in shown:
                    shown.append(what)
        _table(("layers of one product", "format", "tokens", "program", "reason"), programs)
    left = sum(layer["reason"] == "not quantized" for layer in result["layers"])
    also = f"; {left} layers more are not quantized" if left else ""
    packed = len(result["layers"]) - left
    _say(f"{result['bits_per_weight']:.3f} bits per weight over {packed} layers{also}")


@app.command()
def warmup(
    model: Annotated[str, typer.Argument(help="Quantized checkpoint.")],
    device: Annotated[str, typer.Option(help="GPU to compile for: cuda, cuda:1.")] = "cuda",
    arch: Annotated[
        str | None, typer.Option(help="Architecture instead, such as sm_90a; needs no GPU.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Only for these numbers of tokens at a time, by comma.")
    ] = "",
    dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16; the checkpoint's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile ahead every GPU kernel that a model's layers need."""
    from lutra.warmup import warmup as run

    counts = _integers("--tokens", tokens, 1)
    with _progress("compiling") as update:
        result = run(model, device, arch, counts or None, dtype, on_progress=update)
    if as_json:
        _print_json(result)
        return
    _say(
        f"{result['kernels']} kernels for {result['card'] or result['arch']} and {result['dtype']} "
        f"activations: {result['compiled']} compiled in {result['seconds']:.0f} s, the others were "
        f"there; they are in {result['cache']}"
    )


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods, what they need and what they write."""
    from lutra.inspection import list_methods

    rows = list_methods()
    if as_json:
        _print_json(rows)
        return
    _table(
        ("method", "paper", "scope", "needs", "formats"),
        [
            (r["name"], r["paper"], r["scope"], ", ".join(r["needs"]), ", ".join(r["formats"]))
            for r in rows
        ],
    )
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        _say(f"{row['name']}: --set {options}")


@app.command()
def plan(
    src: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    method: Annotated[str, typer.Option(help="See `lutra methods`.")] = "lut-gemm",
    bits: Annotated[int, typer.Option(help="Width of the weights; --budget chooses it.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs per group; -1: per row.")] = 128,
    budget: Annotated[str | None, typer.Option(help="Memory to run in, such as 24GB.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the KV cache to leave room for.")] = 2048,
    lm_head_bits: Annotated[int, typer.Option(help="Width of the head; 0: as it is.")] = 0,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the method.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say from the headers alone what a quantization gives and needs."""
    from lutra.plan import plan as run
    from lutra.scheme import options_from_strings

    options = options_from_strings(_pairs(settings or []))
    kind = str(options.pop("format", ""))
    result = run(
        src, method, bits, group_size, kind=kind, samples=samples, seq_len=seq_len,
        options=options, budget=budget, context=context, lm_head_bits=lm_head_bits,
    )  # fmt: skip
    if as_json:
        _print_json(result)
        return
    rows = [
        (key.replace("_", " "), _in_words(key, value))
        for key, value in result.items()
        if key not in ("layers", "problems", "warnings")
    ]
    _table(("plan", src), rows)
    for kind_of, lines in (("problem", result["problems"]), ("warning", result["warnings"])):
        for line in lines:
            _say(f"{kind_of}: {line}")


@app.command()
def outliers(
    src: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    kinds: Annotated[str, typer.Option(help="norms, up, twins; by comma.")] = "norms",
    share: Annotated[float, typer.Option(help="Share of the channels.")] = 0.01,
    low: Annotated[float, typer.Option(help="Least factor.")] = 20.0,
    high: Annotated[float, typer.Option(help="Largest factor.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Which channels, and how large.")] = 0,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint and give it outlier channels without changing what it computes."""
    from lutra.outliers import inject_outliers

    names = [kind for kind in kinds.split(",") if kind]
    done = inject_outliers(src, dst, names, share=share, low=low, high=high, seed=seed)
    if as_json:
        _print_json(done)
        return
    _say(f"{dst}: {', '.join(names)} in {len(done['blocks'])} blocks; it computes what {src} does")


bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("kernel")
def bench_kernel(
    device: Device = "cpu",
    shape: Annotated[str, typer.Option(help="OUTxIN, by comma.")] = "4096x4096",
    batch: Annotated[str, typer.Option(help="Tokens, by comma.")] = "1",
    kind: Annotated[str, typer.Option(help="planes, or flat for flattened layers.")] = "planes",
    bits: Annotated[str, typer.Option(help="Planes, by comma; flat: 4,8.")] = "",
    group_size: Annotated[str, typer.Option(help="Inputs per group, by comma.")] = "128",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    peers: Annotated[str, typer.Option(help="all, none, or names by comma.")] = "all",
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time the kernels beside dense and every installed peer, in one run."""
    from lutra.bench.kernel import run
    from lutra.scheme import Format

    group_sizes = _integers("--group-size", group_size)
    for size in group_sizes:
        Format("bcq", 4, size)  # refuses what no format has
    _integers("--threads", str(threads), 1)
    result = run(
        device=device, shapes=_shapes(shape), batches=_integers("--batch", batch, 1),
        bits=_integers("--bits", bits or ("4,8" if kind == "flat" else "2,3,4"), 1, 8),
        group_sizes=group_sizes, threads=threads, peers=peers, kind=kind,
    )  # fmt: skip
    if plot is not None:
        from lutra.bench.kernel_plot import plot as draw

        draw(result["rows"], plot)
    if as_json:
        _print_json(result)
        return
    keys = (
        "implementation", "shape", "batch", "bits", "group", "us", "gbps", "speedup_vs_dense",
        "relative_error",
    )  # fmt: skip
    _table(keys, [tuple(_number(row.get(k)) for k in keys) for row in result["rows"]])
    _say(f"streaming read limit of this run: {result['read_limit_gbps']:.1f} GB/s")


@bench.command("model")
def bench_model(
    model: Annotated[str, typer.Argument(help="Checkpoint, or a shape such as llama-3-8b.")],
    bits: Annotated[int, typer.Option(help="Of a named shape; 16 is dense.")] = 4,
    group_size: Annotated[int, typer.Option(help="Of a named shape; -1: one group per row.")] = 128,
    kind: Annotated[str, typer.Option(help="bcq, ubcq or int, of a named shape.")] = "bcq",
    head_bits: Annotated[int, typer.Option(help="Of a named shape's head; 16 is dense.")] = 16,
    prompt_len: Annotated[str, typer.Option(help="Tokens of the prompt, by comma.")] = "64",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 32,
    batch: Annotated[str, typer.Option(help="Sequences decoded together, by comma.")] = "1",
    layers: Annotated[int | None, typer.Option(help="Keep only so many blocks.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs after one that warms up.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time of a token goes.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the profile into this file.")] = None,
    tensor_parallel: TensorParallel = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Time a whole model: prompt, tokens, memory."""
    from lutra.bench.model import bench_model as run

    result = run(
        model, bits=bits, group_size=group_size, kind=kind, head_bits=head_bits,
        prompt_len=_integers("--prompt-len", prompt_len, 1), new_tokens=new_tokens,
        batch=_integers("--batch", batch, 1), layers=layers, repeats=repeats, threads=threads,
        profile=profile or plot is not None, tensor_parallel=tensor_parallel, device=device,
        dtype=dtype,
    )  # fmt: skip
    if tensor_parallel and _is_helper():
        return
    if plot is not None:
        from lutra.bench.profile import plot as draw

        draw({f"{result['model']}, {result['format']}": result["profile"]}, plot)
    if as_json:
        _print_json(result)
        return
    keys = ("ms_per_token", "ttft_ms", "tokens_per_second", "memory_gb", "gbps", "read_limit_gbps")
    _table(("measure", model), [(k.replace("_", " "), _number(result[k])) for k in keys])
    if "rows" in result:
        columns = ("prompt_len", "batch", *(k for k in keys if k != "read_limit_gbps"))
        _table(columns, [tuple(_number(row[k]) for k in columns) for row in result["rows"]])
    if "profile" in result:
        found = result["profile"]
        token = found["token_us"]
        shares = [(p, _number(us), f"{us / token:.1%}") for p, us in found["parts"].items()]
        _table(("part of a token", "us", "share"), shares)
        rows = [
            (row["name"][:60], row["part"], _number(row["calls"]), _number(row["us"]))
            for row in found["kernels"][:20]
        ]
        _table(("kernel or layer", "part", "calls", "us"), rows)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Quantized checkpoint.")],
    text: Annotated[Path | None, typer.Option(help="Evaluate on this text first.")] = None,
    against: Annotated[Path | None, typer.Option(help="The original checkpoint.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    as_json: Json = False,
) -> None:
    """Write report.json, report.html and the model card of a quantized checkpoint."""
    from lutra.evaluate import evaluate as run
    from lutra.evaluate.report import report as write

    evaluation = None
    if text is not None:
        with _progress("evaluating") as update:
            evaluation = run(
                folder, text=text, against=against, seq_len=seq_len, max_windows=max_windows,
                progress=lambda done, total: update(done, total, "windows"),
            )  # fmt: skip
    content = write(folder, evaluation=evaluation, source=against)
    if as_json:
        _print_json(content)
        return
    _say(f"wrote {folder / 'report.html'}, report.json and README.md")


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for the results.")] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """Quantize the small model that comes with the package in several ways and compare them."""
    from lutra.demo import run

    result = run(output, on_stderr=as_json)
    if as_json:
        _print_json(result)


@app.command()
def version(as_json: Json = False) -> None:
    """Show the versions of lutra and of what it stands on."""
    from lutra.evaluate.measure import versions

    if as_json:
        _print_json(versions())
        return
    _table(("package", "version"), list(versions().items()))


# ---- what options say


def _pairs(settings: list[str]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise SchemeError(f"--set takes KEY=VALUE, not {setting!r}")
        pairs[key.replace("-", "_")] = value
    return pairs


def _integers(option: str, text: str, least: int | None = None, most: int = 2**31) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SchemeError(f"{option} takes whole numbers by comma, not {text!r}") from None
    for number in numbers:
        if least is not None and not least <= number <= most:
            end = f" to {most}" if most < 2**31 else " or more"
            raise SchemeError(f"{option} takes numbers of {least}{end}, not {number}")
    return numbers


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        out_features, separator, in_features = part.strip().partition("x")
        numbers = [int(n) for n in (out_features, in_features) if n.isdecimal()]
        if not separator or len(numbers) != 2 or min(numbers) < 1:
            raise SchemeError(f"--shape takes OUTxIN such as 4096x14336, not {part!r}")
        shapes.append((numbers[0], numbers[1]))
    return shapes


# ---- what is shown


def _is_helper() -> bool:
    """Whether this is one of several processes, and another one speaks."""
    return os.environ.get("RANK", "0") != "0"


def _programs(batches: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Tokens, program and reason, neighbours that say the same as one."""
    first = 0
    for i, batch in enumerate(batches):
        following = batches[i + 1] if i + 1 < len(batches) else None
        if following is None or any(batch[k] != following[k] for k in ("program", "reason")):
            begin, end = batches[first]["tokens"], batch["tokens"]
            end_text = f" to {end}" if end > begin else ""
            shown = f"{begin} and more" if following is None else f"{begin}{end_text}"
            yield shown, batch["program"], batch["reason"]
            first = i + 1


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _say(message: str) -> None:
    _console().print(message, soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=str, allow_nan=False)
    sys.stdout.write("\n")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output: it is the result of the command."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_escape(cell) for cell in row))
    # In a file or a pipe a row is one line, however long.
    width = None if sys.stdout.isatty() else 1000
    Console(highlight=False, width=width).print(table)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _in_words(name: str, value: Any) -> str:
    """A value of a plan: bytes as gigabytes, tables entry by entry."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {_in_words(k, v)}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        is_size = "bytes" in name or name in ("program", "activations", "block or head")
        return f"{value / 1e9:.3f} GB" if is_size else f"{value:,}"
    return _number(value)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left, on standard error; plain silence where that is not a terminal."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = _console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(title, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)


def _write_card(dst: Path, src: str) -> None:
    """The model card; its numbers come later, from `lutra report`."""
    from lutra.evaluate.report import report as write

    write(dst, source=src if Path(src).is_dir() else None, page=False)
