"""Greedy tokens of one checkpoint on two devices: the same, but for choices that are ties.

Devices add up in different orders, and 16-bit activations round where 32-bit ones do not, so two
tokens whose logits are closer than that may change places; from there on the texts differ. So each
departure is shown with the gap of the two largest logits at it, on the reference's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PROMPTS = (
    "The history of", "In the summer of 1944", "The city lies on", "He was born in",
    "The album was released", "A species of bird", "During the war,", "The river flows",
    "She played the role of", "The game received",
)  # fmt: skip
NEW_TOKENS = 64
TIE = 1e-3  # of a logit


def reference_tokens(
    folder: str | Path,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Greedy tokens of a checkpoint by transformers' own loop, one prompt at a time.

    Returns:
        For each prompt ``ids`` (its tokens), ``tokens`` (new ones) and ``gaps`` (by how much the
        largest logit exceeded the second, at each new token).
    """
    import lutra

    model, tokenizer = lutra.load(folder, device=device, dtype=dtype)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
        made = type(model).generate(
            model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        two = [step[0].float().topk(2).values.tolist() for step in made.logits]
        found.append(
            {
                "ids": ids[0].tolist(),
                "tokens": made.sequences[0, ids.shape[1] :].tolist(),
                "gaps": [first - second for first, second in two],
            }
        )
    return found


def compare_tokens(
    folder: str | Path, wanted: Sequence[dict[str, Any]], device: str, dtype: str
) -> dict[str, Any]:
    """Decode the same prompts as :func:`reference_tokens` did, by ``model.generate``.

    Returns:
        ``equal``, ``ties`` (texts that depart where the gap is at most :data:`TIE`), ``other``
        (texts that depart elsewhere), ``departures`` (``prompt``, ``at`` which new token, ``gap``),
        ``recorded`` and ``fused`` (how the tokens were made), ``kernels``.
    """
    import lutra
    from lutra.packed import packed_layers

    model, _ = lutra.load(folder, device=device, dtype=dtype)
    departures = []
    for index, row in enumerate(wanted):
        ids = torch.tensor([row["ids"]], device=device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(row["tokens"]),
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        pairs = enumerate(zip(made, row["tokens"], strict=True))
        at = next((i for i, (a, b) in pairs if a != b), None)
        if at is not None:
            departures.append({"prompt": index, "at": at, "gap": row["gaps"][at]})
    ties = sum(d["gap"] <= TIE for d in departures)
    choices = [layer.choice for layer in packed_layers(model)]
    steps = list(model.lutra_decoding.steps.values())
    return {
        "dtype": dtype,
        "equal": len(wanted) - len(departures),
        "ties": ties,
        "other": len(departures) - ties,
        "departures": departures,
        "recorded": bool(steps) and all(step.is_recorded for step in steps),
        "fused": bool(steps) and all(step.fallback is None for step in steps),
        "kernels": sorted({c.kernel.name for c in choices if c is not None}),
    }
