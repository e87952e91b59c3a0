"""Quantize a checkpoint that is several times larger than the memory that is allowed.

    python benchmarks/memory.py                     # 8 GiB of bfloat16 weights within 2 GiB
    python benchmarks/memory.py --gib 1 --limit-gib 1 --method gptq

A Llama-shaped checkpoint of random weights is generated (tensor by tensor, so that this program
stays small too), then `lutra quantize` runs in a process whose address space is limited as with
`ulimit -v`: everything that it maps counts, libraries included, so the limit is stricter than one
on resident memory. The peak of resident memory, the time and the sizes go to
`benchmarks/results/memory.json`, one entry for each size, limit and method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from lutra.formats.checkpoint import OutputFolder, SourceCheckpoint
from lutra.formats.shard import Deferred
from lutra.plan import plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"


def llama_config(gib: float) -> dict[str, Any]:
    """A Llama of 2048 channels, with as many blocks as fill ``gib`` with bfloat16 weights."""
    hidden, mlp, vocab = 2048, 5632, 32000
    block = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * mlp + 2 * hidden)
    blocks = round((gib * 2**30 - 2 * 2 * vocab * hidden) / block)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": max(blocks, 1),
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def generate(folder: Path, config: dict[str, Any]) -> None:
    """Write the checkpoint, with the weights of a tensor following from its name."""
    hidden, mlp, vocab = (
        config[k] for k in ("hidden_size", "intermediate_size", "vocab_size")
    )
    narrow = hidden // 4

    def tensor(name: str, shape: tuple[int, ...]) -> Deferred:
        def make() -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02

        return Deferred(torch.bfloat16, shape, make)

    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    with OutputFolder(folder, {"benchmark": "memory", "config": config}) as output:
        for block in range(config["num_hidden_layers"]):
            key = f"model.layers.{block}"
            if key in output.done_keys():
                continue
            names = {f"{key}.{n}.weight": shape for n, shape in linears.items()}
            output.write_shard(key, {n: tensor(n, shape) for n, shape in names.items()})
        outside = {
            "model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
        }  # fmt: skip
        output.write_shard("outside", {n: tensor(n, shape) for n, shape in outside.items()})
        output.finish(config, (), _tokenizer())


def _tokenizer() -> dict[str, str]:
    """A tokenizer of single bytes, for calibrated runs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}


def quantize(command: list[str], limit: int) -> tuple[float, int]:
    """Run a command within ``limit`` bytes of address space: seconds and peak resident bytes."""

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    started = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=confine)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the run failed with status {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def _machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    import transformers

    return {
        "cpu": model or platform.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gib", type=float, default=8, help="size of the bfloat16 weights")
    parser.add_argument("--limit-gib", type=float, default=2, help="address space of the run")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where to work; kept, and reused if there")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, destination = folder / f"llama-{options.gib:g}gib", folder / "quantized"
        if not source.exists():
            print(f"generating {source}", file=sys.stderr)
            generate(source, llama_config(options.gib))
        command = [
            sys.executable, "-c", "from lutra.cli import main; main()", "quantize", str(source),
            str(destination), "--method", options.method, "--bits", str(options.bits),
        ]  # fmt: skip
        if options.method != "rtn":
            text = folder / "text.txt"
            text.write_text("All work and no play makes a dull calibration text. " * 2000)
            command += ["--calibration", str(text), "--samples", str(options.samples)]
            command += ["--seq-len", str(options.seq_len)]
        expected = plan(
            source, options.method, options.bits, samples=options.samples, seq_len=options.seq_len
        )
        machine = _machine()
        limit = int(options.limit_gib * 2**30)
        seconds, peak = quantize(command, limit)
        source_bytes = SourceCheckpoint.open(source).total_bytes()
        output_bytes = SourceCheckpoint.open(destination, quantized=True).total_bytes()
        row = {
            "source_bytes": source_bytes,
            "limit_bytes": limit,
            "weights_over_limit": source_bytes / limit,
            "method": options.method,
            "bits": options.bits,
            "peak_resident_bytes": peak,
            "planned_peak_bytes": expected["memory"]["peak_bytes"],
            "output_bytes": output_bytes,
            "planned_output_bytes": expected["output_bytes"],
            "seconds": seconds,
            "command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]),
            "machine": machine,
        }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = ("source_bytes", "limit_bytes", "method", "bits")
    rows = [r for r in rows if any(r[k] != row[k] for k in same)] + [row]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
