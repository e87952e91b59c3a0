"""Decoding a whole model on the CPU, beside llama-cpp-python, and loading one from disk.

    python benchmarks/cpu_model.py decode --threads 1 --json decode.json
    python benchmarks/cpu_model.py load --json load.json

``decode`` builds a Llama of a known shape with random packed weights and, with llama-cpp-python
and gguf installed, a GGUF file of the same shape with random blocks; both live in one process and
take turns of some tokens, so that other work on the machine disturbs both alike. The peer's file
has every matrix in Q2_K and the head in Q6_K; the mixture that llama-quantize makes under the name
of Q2_K has more bits and is slower. Our head is measured dense in bfloat16, as a model has it
unless asked otherwise, and with some bits.

``load`` writes a checkpoint of that shape, drops it from the page cache, loads it in a new
process, and compares time and memory with plainly reading the files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lutra.bench.cpu import machine
from lutra.bench.model import read_limit_gbps
from lutra.bench.shapes import SHAPES, fill, random_model
from lutra.nn import QuantizedLinear
from lutra.runtime.step import DecodeStep
from lutra.scheme import Format

PROMPT = 64


# ---- the peer's file


def write_gguf(path: Path, shape: dict[str, Any], layers: int) -> None:
    """A GGUF file of a Llama's shape with random blocks whose weights are of order width^-1/2."""
    import gguf
    import numpy as np

    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    width, mlp, vocabulary = (
        shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"],
    )  # fmt: skip
    kv = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    step = np.float16(width**-0.5 / 10)  # of Q2_K: scales to 15 and levels to 3 make it 10 wide

    def half(value: float, blocks: tuple[int, int]) -> Any:
        return np.full((*blocks, 1), value, np.float16).view(np.uint8)

    def matrix(rows: int, columns: int, kind: Any) -> Any:
        blocks = (rows, columns // 256)

        def random(n: int) -> Any:
            return np.frombuffer(rng.bytes(blocks[0] * blocks[1] * n), np.uint8).reshape(*blocks, n)

        if kind == kinds.Q2_K:  # scales and minima, levels, step, step of the minima
            parts = [random(80), half(step, blocks), half(1.5 * step, blocks)]
        else:  # Q6_K: levels, scales of 8 bits, step
            scales = rng.integers(-8, 9, (*blocks, 16), dtype=np.int8).view(np.uint8)
            parts = [random(192), scales, half(width**-0.5 / 90, blocks)]
        return np.concatenate(parts, -1).reshape(rows, -1)

    writer = gguf.GGUFWriter(str(path), "llama", use_temp_file=False)
    writer.add_block_count(layers)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(width // shape["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3, *[6] * 256]  # unknown, control, byte
    tokens += [f"t{i}" for i in range(vocabulary - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(vocabulary)])
    writer.add_token_types(types + [1] * (vocabulary - len(types)))

    def add(name: str, rows: int, columns: int, kind: Any) -> None:
        writer.add_tensor(f"{name}.weight", matrix(rows, columns, kind), raw_dtype=kind)

    low = kinds.Q2_K
    add("token_embd", vocabulary, width, low)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    add("output", vocabulary, width, kinds.Q6_K)
    for i in range(layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(width, np.float32))
        add(f"blk.{i}.attn_q", width, width, low)
        add(f"blk.{i}.attn_k", kv, width, low)
        add(f"blk.{i}.attn_v", kv, width, low)
        add(f"blk.{i}.attn_output", width, width, low)
        add(f"blk.{i}.ffn_gate", mlp, width, low)
        add(f"blk.{i}.ffn_up", mlp, width, low)
        add(f"blk.{i}.ffn_down", width, mlp, low)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """Decodes random tokens one by one through llama-cpp-python."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.bytes = path.stat().st_size
        self.model = llama_cpp.Llama(
            str(path), n_ctx=512, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads,
            verbose=False, use_mmap=False,
        )  # fmt: skip
        self.vocabulary = self.model.n_vocab()
        self.numpy, self.tokens = np, np.random.default_rng(1)

    def prompt(self) -> None:
        self.model.reset()
        self.model.eval([int(t) for t in self.tokens.integers(300, self.vocabulary, PROMPT)])

    def token(self) -> None:
        self.model.eval([int(self.tokens.integers(300, self.vocabulary))])
        logits = self.model._ctx.get_logits()
        int(self.numpy.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


# ---- ours


class Ours:
    """Decodes greedily: by the steps behind ``model.generate``, or by calling the model."""

    def __init__(self, model: Any, head: torch.nn.Module, by_steps: bool) -> None:
        self.model, self.head, self.by_steps = model, head, by_steps
        self.vocabulary: int = model.config.vocab_size
        self.ids, self.cache = torch.zeros(1, 1, dtype=torch.long), None
        self.step = DecodeStep(model, 1, 512)

    def prompt(self) -> None:
        self.model.lm_head = self.head
        self.cache = None
        self.ids = torch.randint(0, self.vocabulary, (1, PROMPT))
        if self.by_steps:
            with torch.no_grad():
                self.step.prefill(self.ids)
        else:
            self.token()

    def token(self) -> None:
        self.model.lm_head = self.head
        if self.by_steps:
            with torch.no_grad():
                self.step.advance()
            return
        with torch.inference_mode():
            output = self.model(
                self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            self.ids = output.logits[:, -1:].argmax(-1)
        self.cache = output.past_key_values

    def shares(self, tokens: int) -> dict[str, float]:
        """Milliseconds of a token by where they are spent: layers of blocks, the head, the rest."""
        from lutra.kernels.cpu.linear import CpuKernel

        spent = {"linear layers": 0.0, "head": 0.0}
        linear, forward = CpuKernel.linear, self.head.forward

        def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def measured(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return call(*args, **kwargs)
                finally:
                    spent[name] += time.perf_counter() - begin

            return measured

        CpuKernel.linear = timed(linear, "linear layers")  # type: ignore[method-assign]
        self.head.forward = timed(forward, "head")  # type: ignore[method-assign]
        begin = time.perf_counter()
        try:
            for _ in range(tokens):
                self.token()
        finally:
            CpuKernel.linear = linear  # type: ignore[method-assign]
            del self.head.forward
        whole = time.perf_counter() - begin
        if isinstance(self.head, QuantizedLinear):  # its product was counted among the layers'
            spent["linear layers"] -= spent["head"]
        spent["rest"] = whole - sum(spent.values())
        return {name: round(1000 * seconds / tokens, 2) for name, seconds in spent.items()}


def random_head(model: Any, format: Format) -> QuantizedLinear:
    head = model.lm_head
    packed = QuantizedLinear(head.in_features, head.out_features, format)
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            fill(name, parameter, head.in_features)
    return packed


def packed_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def decode(options: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[options.shape]
    layers = options.layers or shape["num_hidden_layers"]
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    format = Format("bcq", options.bits, options.group_size)
    model, _ = random_model(options.shape, format, "cpu", "bfloat16", layers)
    block_bytes = packed_bytes(model.model.layers)
    heads = {"bfloat16": model.lm_head}
    for bits in options.head_bits:
        heads[f"{bits} bits"] = random_head(model, Format("bcq", bits, options.group_size))
    head_bytes = {name: packed_bytes(head) for name, head in heads.items()}
    contenders: dict[str, Any] = {
        f"lutra, head {n}": Ours(model, h, by_steps=True) for n, h in heads.items()
    }
    last, head = list(heads.items())[-1]
    by_torch = f"lutra, head {last}, transformers' own loop"
    contenders[by_torch] = Ours(model, head, by_steps=False)
    sizes = {f"lutra, head {n}": block_bytes + b for n, b in head_bytes.items()}
    sizes[by_torch] = block_bytes + head_bytes[last]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if not options.no_peer:
            path = Path(options.gguf or folder) / f"q2_k-{options.shape}-{layers}.gguf"
            if not path.exists():
                write_gguf(path, shape, layers)
            contenders["llama-cpp-python Q2_K"] = LlamaCpp(path, options.threads)
            embedding = shape["vocab_size"] * shape["hidden_size"] * 84 // 256
            sizes["llama-cpp-python Q2_K"] = path.stat().st_size - embedding
    limit = read_limit_gbps("cpu")
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.turns + 1):
        for name, contender in contenders.items():
            if turn == 0:
                contender.prompt()
            for i in range(options.tokens + 1):
                begin, begin_cpu = time.perf_counter(), time.process_time()
                contender.token()
                if turn and i:  # the first after the others finds their weights in the caches
                    wall[name].append(time.perf_counter() - begin)
                    cpu[name].append(time.process_time() - begin_cpu)
            time.sleep(0.05)  # their threads spin for a while
    limit = max(limit, read_limit_gbps("cpu"))
    rows = []
    for name in contenders:
        ms = 1000 * statistics.median(wall[name])
        rows.append({
            "implementation": name, "bytes_per_token": sizes[name],
            "ms_per_token": round(ms, 2), "best_ms": round(1000 * min(wall[name]), 2),
            "cpu_ms_per_token": round(1000 * statistics.median(cpu[name]), 2),
            "tokens_per_second": round(1000 / ms, 3),
            "gbps": round(sizes[name] / ms / 1e6, 2),
        })  # fmt: skip
    shares = {n: c.shares(options.tokens) for n, c in contenders.items() if isinstance(c, Ours)}
    import importlib.metadata

    result = {
        "model": options.shape, "layers": layers, "format": str(format), "prompt": PROMPT,
        "read_limit_gbps": round(limit, 2), "machine": machine(options.threads), "rows": rows,
        "ms_by_part": shares,
    }  # fmt: skip
    for package in ("transformers", "llama-cpp-python"):
        try:
            result["machine"]["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


# ---- loading


def write_checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """A checkpoint as `lutra quantize` writes it, one file per block, with random weights."""
    from lutra.formats.checkpoint import OutputFolder, quantization_config
    from lutra.scheme import Scheme

    torch.manual_seed(0)
    block_format = Format("bcq", options.bits, options.group_size)
    head_format = None
    model, _ = random_model(options.shape, block_format, "cpu", "bfloat16", options.layers)
    if options.head_bits:
        head_format = Format("bcq", options.head_bits[0], options.group_size)
        model.lm_head = random_head(model, head_format)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        path = name.split(".")
        part = f"block {path[2]}" if path[:2] == ["model", "layers"] else "rest"
        parts.setdefault(part, {})[name] = tensor
    parts["rest"] = parts.pop("rest")  # last, as there
    with OutputFolder(folder, "random") as output:
        for part, tensors in parts.items():
            output.write_shard(part, tensors)
        config = model.config.to_dict()
        config["architectures"] = ["LlamaForCausalLM"]
        config["dtype"] = "bfloat16"
        config["quantization_config"] = quantization_config(
            Scheme((("lm_head", head_format), ("model.layers.*", block_format)))
        )
        output.finish(config)


def drop_from_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(folder: Path) -> float:
    """Seconds to read all files of weights, in pieces of 16 MiB."""
    buffer = bytearray(16 << 20)
    begin = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


def memory_of_process() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    names = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "of files"}
    return {ours: round(int(values[theirs]) / 1e6, 3) for theirs, ours in names.items()}


def load_once(folder: Path, threads: int) -> dict[str, Any]:
    """Load in this process, which has imported everything already, and decode some tokens."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from lutra.evaluate.load import load_model, open_checkpoint

    torch.set_num_threads(threads)
    before = memory_of_process()
    begin = time.perf_counter()
    model = load_model(open_checkpoint(folder), "cpu", torch.bfloat16)
    loaded = time.perf_counter()
    after = memory_of_process()
    with torch.inference_mode():
        output = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(8):
            ids = output.logits[:, -1:].argmax(-1)
            output = model(ids, past_key_values=output.past_key_values, use_cache=True)
    return {
        "load_seconds": round(loaded - begin, 3),
        "load_and_first_token_seconds": round(first - begin, 3),
        "gb_before": before, "gb_loaded": after, "gb_after_9_tokens": memory_of_process(),
    }  # fmt: skip


def load(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(options.checkpoint or Path(parent) / "model")
        write = [sys.executable, __file__, "write", "--folder", str(folder)]
        write += ["--shape", options.shape]
        write += ["--bits", str(options.bits), "--group-size", str(options.group_size)]
        write += ["--layers", str(options.layers)] if options.layers else []
        write += ["--head-bits", *map(str, options.head_bits)]
        if not folder.exists():
            subprocess.run(write, check=True)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for state in ("cold", "warm"):
            for _ in range(options.turns):
                if state == "cold":
                    drop_from_cache(folder)
                reading = read_files(folder)
                if state == "cold":
                    drop_from_cache(folder)
                command = [sys.executable, __file__, "load-once", "--folder", str(folder)]
                command += ["--threads", str(options.threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = {"page_cache": state, "read_seconds": round(reading, 3)}
                rows.append({**row, **json.loads(done.stdout)})
                print(rows[-1], file=sys.stderr, flush=True)
    return {
        "model": options.shape, "format": f"bcq{options.bits}g{options.group_size}",
        "head_bits": options.head_bits[0] if options.head_bits else 16,
        "layers": options.layers or SHAPES[options.shape]["num_hidden_layers"],
        "file_gb": round(size / 1e9, 3), "machine": machine(options.threads), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["decode", "load", "write", "load-once"])
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--head-bits", type=int, nargs="*", default=[6])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--tokens", type=int, default=4, help="of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", help="for the files, which are deleted")
    parser.add_argument("--gguf", help="folder in which GGUF files are looked for and kept")
    parser.add_argument("--checkpoint", help="for load: one that `write` made, and is kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "write":
        write_checkpoint(Path(options.folder), options)
        return
    if options.what == "load-once":
        print(json.dumps(load_once(Path(options.folder), options.threads)))
        return
    result = decode(options) if options.what == "decode" else load(options)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
