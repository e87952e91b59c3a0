"""Shapes of well-known models, and models of these shapes with random weights.

Packed weights are made as such on the device, so a model needs no more memory than its quantized
form: OPT-175B at 3 bits is built on one card, where its 16-bit weights would not fit two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lutra.architectures import longest_list
from lutra.errors import SchemeError
from lutra.evaluate.load import choose_dtype
from lutra.formats.flat import largest_digit
from lutra.integrations.tensor_parallel import Sum, check_degree, cut_blocks, new_buffers
from lutra.nn import QuantizedLinear
from lutra.nn_flat import FlatLinear
from lutra.runtime.flat_inputs import defer
from lutra.runtime.loading import check_fits
from lutra.scheme import Format, Scheme
from lutra.siblings import join_siblings


def _gated(
    family: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    tied: bool, positions: int, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Llama and its relatives."""
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
        **more,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }


#: Shapes by name, as arguments of transformers' configs.
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": _gated("llama", 2048, 5632, 22, 32, 4, 32000, False, 2048),
    "llama-3.2-1b": _gated("llama", 2048, 8192, 16, 32, 8, 128256, True, 131072),
    "llama-3.2-3b": _gated("llama", 3072, 8192, 28, 24, 8, 128256, True, 131072),
    "llama-2-7b": _gated("llama", 4096, 11008, 32, 32, 32, 32000, False, 4096),
    "mistral-7b": _gated(
        "mistral", 4096, 14336, 32, 32, 8, 32768, False, 32768, sliding_window=None
    ),
    "llama-3-8b": _gated("llama", 4096, 14336, 32, 32, 8, 128256, False, 8192),
    "llama-2-13b": _gated("llama", 5120, 13824, 40, 40, 40, 32000, False, 4096),
    "llama-3-70b": _gated("llama", 8192, 28672, 80, 64, 8, 128256, False, 8192),
    "qwen2.5-7b": _gated("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 131072),
    "qwen2.5-72b": _gated("qwen2", 8192, 29568, 80, 64, 8, 152064, False, 131072),
    "qwen3-8b": _gated("qwen3", 4096, 12288, 36, 32, 8, 151936, False, 40960, head_dim=128),
    "opt-125m": _opt(768, 12, 12),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
}


def random_model(
    shape: str,
    format: Format | None,
    device: str,
    dtype: str | None,
    layers: int | None,
    head_format: Format | None = None,
    exchange: Sum | None = None,
) -> tuple[Any, int]:
    """A model of a named shape with random weights, packed ones built as such.

    Args:
        shape: a name of :data:`SHAPES`.
        format: of the linears of all blocks; None for dense ones.
        device, dtype: where, and the dtype of what is not quantized.
        layers: keep only so many blocks.
        head_format: of the head; None leaves it dense.
        exchange: sums over the ranks, each of which makes its part of the model; None for one
            process.

    Returns:
        The model and the number of blocks of the whole shape.

    Raises:
        SchemeError: more layers are asked for than the shape has.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    family = settings.pop("model_type", "llama")
    total = settings["num_hidden_layers"]
    if layers is not None:
        check_layers(layers, total)
        settings["num_hidden_layers"] = layers
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        blocks = blocks_of(model)
        # The dtype is that of the whole model, however many blocks are kept.
        left_out = (total - len(blocks)) * sum(p.numel() for p in blocks[0].parameters())
        parameters = left_out + sum(p.numel() for p in model.parameters())
        chosen, _ = choose_dtype(dtype, parameters, device)
        own = torch.float16 if family == "opt" else torch.bfloat16
        model.to(own if isinstance(chosen, str) else chosen)
        if exchange is not None:
            stem = next(name for name, module in model.named_modules() if module is blocks) + "."
            ranks = torch.distributed.get_world_size(exchange.group)
            rules = () if format is None else ((f"{stem}*", format),)
            check_degree(config, Scheme(rules), ranks)
            rank = torch.distributed.get_rank(exchange.group)
            cut_blocks(model, Scheme(rules).format_of, rank, ranks, exchange)
        for block in blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear) and format is not None:
                    block.set_submodule(name, _packed(module, format))
        if head_format is not None:
            model.set_output_embeddings(_packed(model.get_output_embeddings(), head_format))
            config.tie_word_embeddings = False
    check_fits(model, torch.device(device), shape, " Or cut its depth with --layers.")
    model.to_empty(device=device)
    model.tie_weights()
    new_buffers(model, config, torch.device(device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter, config.hidden_size)
        for module in model.modules():
            if isinstance(module, FlatLinear):
                _fill_flat(module)
    model.generation_config.eos_token_id = None  # random text has no end
    join_siblings(model)
    defer(model)
    return model.eval(), total


def _packed(module: nn.Linear, format: Format) -> QuantizedLinear | FlatLinear:
    kind = FlatLinear if format.kind == "flat" else QuantizedLinear
    return kind(
        module.in_features, module.out_features, format, module.bias is not None,
        module.weight.dtype,
    )  # fmt: skip


def fill(name: str, parameter: Tensor, width: int) -> None:
    """Random values that keep activations of order 1 through any depth."""
    if parameter.dtype == torch.int32:
        parameter.random_(-(2**31), 2**31 - 1)
    elif parameter.dtype == torch.uint8:
        parameter.random_(0, 2)
    elif name.endswith("weight_scale"):
        parameter.uniform_(0.5, 1.5).mul_(width**-0.5)
    elif name.endswith("weight_offset"):
        parameter.uniform_(-0.1, 0.1).mul_(width**-0.5)
    elif name.endswith("bias"):
        parameter.uniform_(-0.1, 0.1)
    elif parameter.ndim == 1:
        parameter.uniform_(0.5, 1.5)
    else:
        parameter.normal_(0, width**-0.5)


def _fill_flat(layer: FlatLinear) -> None:
    """What random bits cannot be: scales that fit random digits, and ranges of the inputs.

    Every fiftieth input has twice the range of the others, so that flattening is at work.
    """
    most = largest_digit(layer.format.bits)
    layer.weight_scale.mul_(3**0.5 / most)
    layer.input_limit.fill_(most)
    layer.input_limit[::50] *= 2


def check_layers(layers: int, total: int) -> None:
    """Refuse to keep more blocks than there are."""
    if layers > total:
        raise SchemeError(f"--layers {layers}: the model has only {total} blocks")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the longest list of modules.

    Raises:
        SchemeError: there is no list of modules.
    """
    blocks = longest_list(model)
    if blocks is None:
        raise SchemeError("the model has no list of decoder blocks to count")
    return blocks
