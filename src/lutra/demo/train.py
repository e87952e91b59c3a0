"""Train the demo model: a small Llama on the text that ships with Python.

    python -m lutra.demo.train OUTPUT_DIR [--device cuda] [--steps N] [--seed S]

2.75 M parameters in bfloat16 (5.5 MB): 4 blocks of width 256, MLP 512, 4 query and 2 key/value
heads of 64, tied head, byte-level BPE of 1,536 entries, context 256. All widths are multiples of
128, so groups of 64 and 128 mean what they mean in a large model. The text is small (2 MB), so
several passes are made over it and dropout on the residual branches keeps it from being learnt by
heart.

The same seed, versions and device give the same bytes. Three minutes on a GPU, hours without one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lutra.demo.text import held_out_text, training_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    vocabulary: int = 1536
    context: int = 256
    batch: int = 32
    steps: int = 5000
    warmup: int = 60
    peak_rate: float = 3e-3
    final_rate: float = 1e-4
    weight_decay: float = 0.3
    dropout: float = 0.25
    seed: int = 0


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: every byte is in the vocabulary, so no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model in float32, residual branches shrunk by depth as in GPT-2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for block in model.model.layers:
            for branch in (block.self_attn.o_proj, block.mlp.down_proj):
                branch.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to ``final_rate``."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_rate + (recipe.peak_rate - recipe.final_rate) * fall


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, context: int) -> float:
    """Mean negative log-likelihood in nats a token over non-overlapping windows."""
    model.eval()
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    total = 0.0
    for batch in windows.split(32):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(batch).logits
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (windows.shape[0] * (context - 1))


def train(
    output: Path, recipe: Recipe, documents: list[str], held_out: str, device: torch.device
) -> dict[str, float | int]:
    """Train, save the folder, and return what was measured.

    Args:
        output: folder to write ``config.json``, ``model.safetensors`` and the tokenizer to.
        recipe: sizes, schedule and seed.
        documents: training texts.
        held_out: evaluation text; nothing is chosen by it, it is only measured.
        device: where to compute.

    Returns:
        ``train_loss`` (mean of the last 50 steps), ``held_out_loss`` and ``held_out_unigram_loss``
        in nats a token, ``held_out_perplexity``, ``tokens`` in one pass, ``seconds``.
    """
    started = time.time()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    encoded = tokenizer.encode_batch(documents)
    stream = torch.tensor([i for e in encoded for i in (0, *e.ids)], dtype=torch.long)
    evaluation = torch.tensor(tokenizer.encode(held_out).ids, dtype=torch.long)
    _say(f"{len(documents)} documents, {len(stream):,} tokens a pass, {len(evaluation):,} held out")
    counts = torch.bincount(stream, minlength=recipe.vocabulary) + 1
    unigram = -(counts / counts.sum()).log()[evaluation].mean().item()
    stream, evaluation = stream.to(device), evaluation.to(device)

    model: Any = build_model(recipe)  # transformers' `to` is typed for another purpose
    model = model.to(device)
    torch.manual_seed(recipe.seed)  # dropout
    dropout_after = [b for layer in model.model.layers
                     for b in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [
        module.register_forward_hook(lambda m, _, y: F.dropout(y, recipe.dropout, m.training))
        for module in (model.model.embed_tokens, *dropout_after)
    ]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    span = torch.arange(recipe.context + 1, device=device)
    recent: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        starts = torch.randint(
            len(stream) - recipe.context, (recipe.batch, 1), generator=generator
        )
        batch = stream[starts.to(device) + span]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            _say(
                f"step {step + 1}/{recipe.steps}  train {sum(recent) / len(recent):.4f}  "
                f"held out {held_out_loss(model, evaluation, recipe.context):.4f}  "
                f"{time.time() - started:.0f} s"
            )
    for hook in hooks:
        hook.remove()

    model.to(torch.bfloat16)
    final = held_out_loss(model, evaluation, recipe.context)
    model.cpu().eval().save_pretrained(output)
    _save_tokenizer(tokenizer, output)
    return {
        "train_loss": sum(recent) / len(recent),
        "held_out_loss": final,
        "held_out_perplexity": math.exp(final),
        "held_out_unigram_loss": unigram,
        "tokens": len(stream),
        "seconds": round(time.time() - started),
    }


def _save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train lutra's demo model.")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; name a new folder")
    recipe = Recipe(steps=args.steps, seed=args.seed)
    result = train(args.output, recipe, training_documents(), held_out_text(), args.device)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
