"""Prefill of a Llama-3-8B-shaped model: bfloat16 beside flattened 4- and 8-bit integers.

    python benchmarks/flat_prefill.py --batch 8 --length 2048 --int4-share 0.4829 --out result.json

The weights are random (shapes and speed are those of the real model, texts are not), rounded to
nearest with one scale for each output. 2 % of the channels of every input have twice the range of
the others, so that flattening is at work. Every linear layer but the last is quantized; layers that
share an input (q, k and v; gate and up) are one product, as flattening them together means. Which
groups are 4 bits is drawn at random until their share of the multiplies reaches the one asked for.
Norms before q, k, v and before gate, up, and the product of gate and up, are computed on the way to
the integers; with ``--plain`` they are transformers' own, as everything else is in both runs.

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

from lutra.formats.flat import FlatWeight, largest_digit, pack_digits
from lutra.nn_flat import FlatLinear

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
WIDE_SHARE = 0.02


class SharedInput(nn.Module):
    """Several layers with one input as one product; the first that is called computes it."""

    def __init__(self, layer: FlatLinear, sizes: list[int], norm: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.sizes, self.norm = layer, sizes, norm
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._left = 0

    def part(self, x: Tensor, index: int) -> Tensor:
        if self._input is not x:
            self._input, self._left = x, len(self.sizes)
            self._parts = self.multiply(x).split(self.sizes, dim=-1)
        y = self._parts[index]
        self._left -= 1
        if self._left == 0:
            self._input, self._parts = None, ()
        return y


    def multiply(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return self.layer(x)
        layer = self.layer
        assert layer.choice is not None
        return layer.choice.kernel.norm_linear(
            x, self.norm.weight, self.norm.variance_epsilon, layer._prepared, None, layer._spec
        )


class GatedDown(nn.Module):
    """The last layer of an MLP, which takes silu(gate) * up."""

    def __init__(self, shared: SharedInput, down: FlatLinear) -> None:
        super().__init__()
        self.shared, self.down = shared, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.shared.multiply(x).split(self.shared.sizes, dim=-1)
        down = self.down
        assert down.choice is not None
        return down.choice.kernel.gated_linear(gate, up, down._prepared, None, down._spec)


class Part(nn.Module):
    """One of the layers of a :class:`SharedInput`."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.part(x, self.index)


def flat_weight(weight: Tensor, bits: int, generator: torch.Generator) -> FlatWeight:
    """Rounded to nearest, with a scale for each output and some wide channels."""
    most = largest_digit(bits)
    scale = weight.float().abs().amax(1) / most
    digits = (weight.float() / scale[:, None]).round().to(torch.int8)
    limit = torch.full((weight.shape[1],), most, dtype=torch.int32, device=weight.device)
    wide = torch.randperm(weight.shape[1], generator=generator)[: int(WIDE_SHARE * len(limit))]
    limit[wide.to(weight.device)] *= 2
    none = torch.empty(0, dtype=torch.int32, device=weight.device)
    return FlatWeight(pack_digits(digits, bits), scale, limit, none, bits, weight.shape[1])


def quantize(model: nn.Module, int4_share: float, seed: int, plain: bool) -> dict[str, Any]:
    """Replace the linear layers of the decoder; returns the shares at 4 bits."""
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    groups = [
        (getattr(block, part), names) for block in model.model.layers for part, names in GROUPS
    ]
    sizes = [sum(getattr(p, n).weight.numel() for n in names) for p, names in groups]
    order = chooser.sample(range(len(groups)), len(groups))
    at_four: set[int] = set()
    total, four = sum(sizes), 0
    for index in order:
        if four + sizes[index] / 2 <= int4_share * total:
            at_four.add(index)
            four += sizes[index]
    layers = 0
    for index, (parent, names) in enumerate(groups):
        bits = 4 if index in at_four else 8
        weights = [getattr(parent, name).weight for name in names]
        layer = FlatLinear.from_weight(flat_weight(torch.cat(weights), bits, generator))
        layer.prepare(torch.bfloat16)
        assert layer.choice is not None and layer.choice.kernel.name == "cuda-flat", layer.choice
        if len(names) == 1:
            setattr(parent, names[0], layer)
        else:
            block = model.model.layers[index // len(GROUPS)]
            before = "input_layernorm" if "q_proj" in names else "post_attention_layernorm"
            norm = None if plain else getattr(block, before)
            shared = SharedInput(layer, [len(w) for w in weights], norm)
            if not plain:
                setattr(block, before, nn.Identity())
            for place, name in enumerate(names):
                setattr(parent, name, Part(shared, place))
        layers += bits == 4
    if not plain:
        for block in model.model.layers:
            block.mlp = GatedDown(block.mlp.gate_proj.shared, block.mlp.down_proj)
    return {
        "int4_share_of_multiplies": round(four / total, 4),
        "int4_share_of_groups": round(layers / len(groups), 4),
    }


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and prepared weights, each storage once."""
    storages = {}
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, FlatLinear):
            tensors += module._prepared
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
    parser.add_argument("--plain", action="store_true", help="norms and gates by themselves")
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
        "norms_and_gates_on_the_way": not options.plain,
        "bf16_ms": round(dense_ms, 2), "bf16_worst_ms": round(dense_worst, 2),
        "bf16_bytes": dense_bytes, "runs": [],
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}), flush=True)
    for share in options.int4_share:
        if result["runs"]:
            del model
            torch.cuda.empty_cache()
            model = build()
        row = quantize(model, share, options.seed, options.plain)
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
