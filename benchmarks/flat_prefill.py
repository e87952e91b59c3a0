"""Prefill of a Llama-3-8B-shaped model: bfloat16 beside flattened 4- and 8-bit integers.

    python benchmarks/flat_prefill.py --batch 8 --length 2048 --int4-share 0.4829 --out result.json

The weights are random (shapes and speed are those of the real model, texts are not), rounded to
nearest with one scale for each output. 2 % of the channels of every input have twice the range of
the others, so that flattening is at work. Every linear layer of the blocks becomes a
:class:`lutra.nn_flat.FlatLinear` in transformers' own model, which is then made ready as a loaded
checkpoint is: layers of one input are one product, and norms and activations are left to the layers
that read them. ``--plain`` leaves both out. Which groups are 4 bits is drawn at random until their
share of the multiplies reaches the one asked for. With ``--head`` the head is 8 bits too.

Times are medians over forward passes of ``batch x length`` tokens that fill a key-value cache and
compute the logits of the last token. Resident bytes are those of all parameters and prepared
weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lutra.architectures import architecture_of
from lutra.formats.flat import FlatWeight, largest_digit, pack_digits
from lutra.nn_flat import FlatLinear
from lutra.runtime.flat_inputs import defer
from lutra.siblings import join_siblings

WIDE_SHARE = 0.02


def flat_layer(weight: Tensor, bits: int, wide: Tensor | None) -> FlatLinear:
    """Rounded to nearest, with a scale for each output and some wide channels."""
    most = largest_digit(bits)
    scale = weight.float().abs().amax(1) / most
    digits = (weight.float() / scale[:, None]).round().to(torch.int8)
    limit = torch.full((weight.shape[1],), most, dtype=torch.int32, device=weight.device)
    if wide is not None:
        limit[wide] *= 2
    none = torch.empty(0, dtype=torch.int32, device=weight.device)
    packed = FlatWeight(pack_digits(digits, bits), scale, limit, none, bits, weight.shape[1])
    return FlatLinear.from_weight(packed)


def quantize(
    model: Any, int4_share: float, seed: int, plain: bool, with_head: bool
) -> dict[str, Any]:
    """Replace the linear layers of the decoder; returns the shares at 4 bits."""
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    entry = architecture_of(model.config)
    groups = [(block, paths) for block in model.model.layers for paths in entry.groups]
    sizes = [sum(b.get_submodule(p).weight.numel() for p in paths) for b, paths in groups]
    at_four: set[int] = set()
    total, four = sum(sizes), 0
    for index in chooser.sample(range(len(groups)), len(groups)):
        if four + sizes[index] / 2 <= int4_share * total:
            at_four.add(index)
            four += sizes[index]
    for index, (block, paths) in enumerate(groups):
        inputs = block.get_submodule(paths[0]).weight.shape[1]
        wide = torch.randperm(inputs, generator=generator)[: int(WIDE_SHARE * inputs)].cuda()
        for path in paths:
            weight = block.get_submodule(path).weight
            block.set_submodule(path, flat_layer(weight, 4 if index in at_four else 8, wide))
    if with_head:
        model.lm_head = flat_layer(model.lm_head.weight, 8, None)
    found = {}
    if not plain:
        found = {"joint_products": join_siblings(model), "left_to_layers": defer(model)}
    for module in model.modules():
        if isinstance(module, FlatLinear):
            module.prepare_if_local(torch.bfloat16)
            assert module.choice is not None and module.choice.kernel.name == "cuda-flat"
    return {
        "int4_share_of_multiplies": round(four / total, 4),
        "int4_share_of_groups": round(len(at_four) / len(groups), 4), **found,
    }  # fmt: skip


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and prepared weights, each storage once."""
    storages = {}
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, FlatLinear):
            tensors += module.prepared_tensors()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def prefill_ms(model: nn.Module, tokens: Tensor, repeats: int) -> tuple[float, float, Tensor]:
    """Median and worst milliseconds of a forward pass, and the logits of the last tokens."""
    times = []
    logits = None
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        logits = model(tokens, use_cache=True, logits_to_keep=1).logits
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    assert logits is not None
    return statistics.median(times[2:]), max(times[2:]), logits[:, -1].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--int4-share", type=float, nargs="+", default=[0.4829])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="both runs through torch.compile")
    parser.add_argument("--plain", action="store_true", help="every layer and norm by itself")
    parser.add_argument("--head", action="store_true", help="the head in 8 bits too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
        rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=False,
        attn_implementation="sdpa", dtype="bfloat16", initializer_range=0.01,
    )  # fmt: skip
    tokens = torch.randint(0, 128256, (options.batch, options.length), device="cuda")

    def build() -> nn.Module:
        torch.manual_seed(options.seed)
        with torch.device("cuda"):
            return LlamaForCausalLM(config).to(torch.bfloat16).eval()

    model = build()
    dense_bytes = resident_bytes(model)
    run = torch.compile(model) if options.compile else model
    dense_ms, dense_worst, dense_logits = prefill_ms(run, tokens, options.repeats)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "batch": options.batch, "length": options.length, "compiled": options.compile,
        "plain": options.plain, "head_8_bits": options.head,
        "bf16_ms": round(dense_ms, 2), "bf16_worst_ms": round(dense_worst, 2),
        "bf16_bytes": dense_bytes, "runs": [],
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}), flush=True)
    for share in options.int4_share:
        if result["runs"]:
            del model
            torch.cuda.empty_cache()
            model = build()
        row = quantize(model, share, options.seed, options.plain, options.head)
        run = torch.compile(model) if options.compile else model
        ms, worst, logits = prefill_ms(run, tokens, options.repeats)
        own = resident_bytes(model)
        row |= {
            "ms": round(ms, 2), "worst_ms": round(worst, 2), "speedup": round(dense_ms / ms, 3),
            "bytes": own, "memory_ratio": round(dense_bytes / own, 3),
            "logits_relative_error": round(
                ((logits - dense_logits).norm() / dense_logits.norm()).item(), 4
            ),
        }  # fmt: skip
        result["runs"].append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
