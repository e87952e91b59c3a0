"""The family table against transformers' own models: names, shared inputs, exact folds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lutra import architectures
from lutra.architectures import (
    architecture_of,
    describe,
    expand_scale,
    fold,
    fold_channels,
    fold_query_key,
    is_linear,
    meta_model,
    query_key_scale_shape,
    reduce_scale,
)
from lutra.errors import CheckpointError
from lutra.formats.checkpoint import SourceCheckpoint
from lutra.plan import plan
from lutra.runner.walk import Recipe, quantize_checkpoint

transformers = pytest.importorskip("transformers")

_LLAMA = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64,
}  # fmt: skip
_OPT = {
    "hidden_size": 48, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 61, "max_position_embeddings": 64, "word_embed_proj_dim": 48,
}  # fmt: skip
_NEOX = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 61, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
_PHI = dict(_NEOX, partial_rotary_factor=0.5)
_PHI3 = dict(_LLAMA, pad_token_id=0, eos_token_id=1, bos_token_id=1)

# name: (model_type, config, number of fold sites)
VARIANTS = {
    "llama": ("llama", _LLAMA, 4),
    "llama-tied-bias": (
        "llama",
        dict(_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        4,
    ),
    "llama-wide-heads": ("llama", dict(_LLAMA, head_dim=16), 4),
    "mistral": ("mistral", dict(_LLAMA, sliding_window=4), 4),
    "qwen2": ("qwen2", _LLAMA, 4),
    "qwen3": ("qwen3", dict(_LLAMA, head_dim=12), 4),
    "phi": ("phi", _PHI, 2),
    "phi-gqa-qknorm": (
        "phi",
        dict(_PHI, num_attention_heads=6, num_key_value_heads=3, qk_layernorm=True),
        2,
    ),
    "phi3": ("phi3", _PHI3, 4),
    "opt": ("opt", _OPT, 4),
    "opt-post-norm": ("opt", dict(_OPT, do_layer_norm_before=False, word_embed_proj_dim=24), 2),
    "opt-no-bias": ("opt", dict(_OPT, enable_bias=False, layer_norm_elementwise_affine=False), 2),
    "opt-gelu": ("opt", dict(_OPT, activation_function="gelu"), 3),
    "gpt_neox": ("gpt_neox", _NEOX, 3),
    "gpt_neox-serial": ("gpt_neox", dict(_NEOX, use_parallel_residual=False), 3),
    "gpt2": ("gpt2", _GPT2, 3),
}


def _model(variant: str) -> nn.Module:
    kind, config, _ = VARIANTS[variant]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **config)
    ).eval()
    for parameter in model.parameters():  # norms and biases start as 1 and 0, which hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(22).view(2, 11) + 5).logits


def test_every_family_is_tested():
    assert {kind for kind, _, _ in VARIANTS.values()} == set(architectures.families())


@pytest.mark.parametrize("variant", VARIANTS)
def test_paths_exist_and_cover_the_model(variant):
    model = _model(variant)
    arch = architecture_of(model.config)
    assert arch.known and arch.family == VARIANTS[variant][0]
    blocks = model.get_submodule(arch.blocks)
    assert len(blocks) == 2
    for block in blocks:
        linears = {name for name, module in block.named_modules() if is_linear(module)}
        assert set(arch.linears) == linears
        assert arch.groups_of(block) == arch.groups
        for site in arch.folds:
            block.get_submodule(site.source)
    assert model.get_submodule(arch.head) is model.get_output_embeddings()

    # Everything outside the blocks that holds a weight or a buffer is listed once.
    def holds_something(name: str) -> bool:
        module = model.get_submodule(name)
        return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])

    names = (name for name, _ in model.named_modules() if not name.startswith(arch.blocks + "."))
    listed = [*arch.prelude, *arch.epilogue, arch.head]
    assert sorted(filter(holds_something, names)) == sorted(filter(holds_something, listed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_as_dict_gives_the_same_entry(variant):
    kind, values, _ = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(kind, **values)
    assert architecture_of({**config.to_dict()}) == architecture_of(config)
    assert architecture_of({"model_type": kind, **values}) == architecture_of(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_share_one_input_and_run_in_order(variant):
    model = _model(variant)
    arch = architecture_of(model.config)
    block = model.get_submodule(arch.blocks)[0]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].clone())
        )
        for name in arch.linears
    ]
    _logits(model)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == set(arch.linears)
    for group in arch.groups:
        for name in group[1:]:
            assert torch.equal(seen[name], seen[group[0]])
    firsts = [seen[group[0]] for group in arch.groups]
    for i, one in enumerate(firsts):
        assert not any(one.shape == b.shape and torch.equal(one, b) for b in firsts[i + 1 :])
    order = [list(seen).index(group[0]) for group in arch.groups]
    assert order == sorted(order)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequential_says_whether_the_mlp_reads_attention(variant):
    model = _model(variant)
    arch = architecture_of(model.config)
    block = model.get_submodule(arch.blocks)[0]
    attention_out = arch.groups[1][0]  # the linear after attention in every family
    mlp = next(n for n in arch.linears if n.startswith(("mlp.", "fc1")))
    inputs = []

    def remember(_, args):
        inputs.append(args[0].clone())

    hook = block.get_submodule(mlp).register_forward_pre_hook(remember)
    _logits(model)
    block.get_submodule(attention_out).weight.data.mul_(3)
    _logits(model)
    hook.remove()
    assert torch.equal(*inputs) is not arch.sequential


@pytest.mark.parametrize("variant", VARIANTS)
def test_folds_change_nothing(variant):
    model = _model(variant).double()
    arch = architecture_of(model.config)
    assert len(arch.folds) == VARIANTS[variant][2]
    before = _logits(model)
    generator = torch.Generator().manual_seed(1)
    for site in arch.folds:
        folded = copy.deepcopy(model)
        for block in folded.get_submodule(arch.blocks):
            tensors = dict(block.named_parameters())
            source = tensors[f"{site.source}.weight"]
            outputs = source.shape[-1] if arch.transposed else source.shape[0]
            channels = len(fold_channels(site, arch, outputs))
            scale = torch.rand(channels, generator=generator, dtype=torch.float64) * 3 + 0.2
            changed = fold(site, arch, tensors, scale)
            for name, tensor in changed.items():
                assert tensor.shape == tensors[name].shape
                assert not torch.equal(tensor, tensors[name])
                tensors[name].data.copy_(tensor)
        assert (_logits(folded) - before).abs().max() < 1e-10 * before.abs().max(), site


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_between_queries_and_keys_change_nothing(variant):
    model = _model(variant).double()
    arch = architecture_of(model.config)
    assert arch.query_key is not None
    before = _logits(model)
    generator = torch.Generator().manual_seed(2)
    for block in model.get_submodule(arch.blocks):
        tensors = dict(block.named_parameters())
        size = query_key_scale_shape(arch)
        scale = torch.rand(size, generator=generator, dtype=torch.float64) * 3 + 0.2
        changed = fold_query_key(arch, tensors, scale)
        assert {n.rpartition(".")[0] for n in changed} == {arch.query_key.query, arch.query_key.key}
        for name, tensor in changed.items():
            assert not torch.equal(tensor, tensors[name])
            tensors[name].data.copy_(tensor)
    assert (_logits(model) - before).abs().max() < 1e-10 * before.abs().max()


def test_scales_of_a_rotated_pair_must_agree():
    """The test above can fail: with the pairs ignored, rotary embedding mixes unequal channels."""
    model = _model("llama").double()
    arch = architecture_of(model.config)
    before = _logits(model)
    unpaired = replace(arch, rotary_dim=0)
    for block in model.get_submodule(arch.blocks):
        tensors = dict(block.named_parameters())
        scale = torch.rand(query_key_scale_shape(unpaired), dtype=torch.float64) + 0.5
        for name, tensor in fold_query_key(unpaired, tensors, scale).items():
            tensors[name].data.copy_(tensor)
    assert (_logits(model) - before).abs().max() > 1e-4


@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3"])
def test_folds_in_float32_stay_within_rounding(variant):
    model = _model(variant)
    arch = architecture_of(model.config)
    before = _logits(model)
    for block in model.get_submodule(arch.blocks):
        for site in arch.folds:
            tensors = dict(block.named_parameters())
            source = tensors[f"{site.source}.weight"]
            outputs = source.shape[-1] if arch.transposed else source.shape[0]
            channels = len(fold_channels(site, arch, outputs))
            for name, tensor in fold(site, arch, tensors, torch.rand(channels) + 0.5).items():
                tensors[name].data.copy_(tensor)
    assert (_logits(model) - before).abs().max() <= 1e-5 * before.abs().max()


def _relative_error(model: nn.Module, path: Path) -> float:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    expected = _logits(model)
    return float((_logits(loaded) - expected).norm() / expected.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_quantized_and_loads(tmp_path, variant):
    """From checkpoint to logits; the plan knows the size to the byte."""
    model = _model(variant)
    model.save_pretrained(tmp_path / "source")
    for head in (0, 8):
        out = tmp_path / f"head{head}"
        quantize_checkpoint(tmp_path / "source", out, Recipe("rtn", 8, 32, lm_head_bits=head))
        planned = plan(tmp_path / "source", "rtn", 8, 32, lm_head_bits=head)
        assert SourceCheckpoint.open(out, quantized=True).total_bytes() == planned["output_bytes"]
        assert _relative_error(model, out) < 0.03


def test_head_that_is_tied_and_stored_all_the_same(tmp_path):
    model = _model("llama-tied-bias")
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    for head in (0, 8):
        out = tmp_path / f"head{head}"
        quantize_checkpoint(tmp_path / "source", out, Recipe("rtn", 8, 32, lm_head_bits=head))
        planned = plan(tmp_path / "source", "rtn", 8, 32, lm_head_bits=head)
        assert SourceCheckpoint.open(out, quantized=True).total_bytes() == planned["output_bytes"]
        assert _relative_error(model, out) < 0.03


def _as_on_the_hub(variant: str) -> tuple[tuple[str, str], dict[str, torch.Tensor]]:
    """How old checkpoints of a family look: prefix taken off, masks and frequencies left in."""
    names = {
        "gpt2": ("transformer.", ""), "opt": ("model.", ""), "gpt_neox": ("lm_head", "embed_out")
    }  # fmt: skip
    causal = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    left = {
        "gpt2": {"h.0.attn.bias": causal, "h.0.attn.masked_bias": torch.tensor(-1e4)},
        "opt": {},
        "gpt_neox": {
            "gpt_neox.layers.0.attention.bias": causal,
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
        },
    }
    return names[variant], left[variant]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("variant", ["gpt2", "opt", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*pickled weights:UserWarning")
def test_old_checkpoints_are_quantized_and_load(tmp_path, variant, pickled):
    model = _model(variant)
    source = tmp_path / "source"
    model.save_pretrained(source)
    (old, new), left = _as_on_the_hub(variant)
    file = source / "model.safetensors"
    tensors = {n.replace(old, new, 1): t for n, t in load_file(file).items()} | left
    file.unlink()
    if pickled:
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        save_file(tensors, file)
    config = json.loads((source / "config.json").read_text())
    if variant != "gpt_neox":
        del config["tie_word_embeddings"]  # old configs leave the default out
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out", Recipe("rtn", 8, 32, lm_head_bits=8))
    assert _relative_error(model, tmp_path / "out") < 0.03


def test_reduce_is_the_largest_over_a_group_of_query_heads():
    arch = architecture_of({"model_type": "llama", **_LLAMA})
    site = next(s for s in arch.folds if s.per_head)
    scale = torch.rand(2 * 8)
    wide = expand_scale(site, arch, scale)
    assert wide.shape == (48,)
    assert torch.equal(reduce_scale(site, arch, wide), scale)
    bump = torch.zeros(48)
    bump[17] = 9  # query head 2, channel 1: kv head 0, channel 1
    assert reduce_scale(site, arch, bump)[1] == 9


def test_unknown_family_is_described_by_structure():
    config = transformers.AutoConfig.for_model(
        "starcoder2", **_LLAMA, bos_token_id=0, eos_token_id=0
    )
    arch = architecture_of(config)
    assert not arch.known and arch.folds == ()
    assert arch.blocks == "model.layers" and arch.head == "lm_head"
    assert all(len(group) == 1 for group in arch.groups)
    assert set(arch.linears) == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.c_fc", "mlp.c_proj",
    }  # fmt: skip
    assert {"model.embed_tokens", "model.norm", "model.rotary_emb"} <= set(arch.prelude)
    assert architecture_of(config.to_dict()) == arch


@pytest.mark.parametrize("variant", VARIANTS)
def test_structure_alone_finds_the_same_blocks(variant):
    kind, values, _ = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(kind, **values)
    known = architecture_of(config)
    found = describe(meta_model(config), kind)
    assert (found.blocks, found.head) == (known.blocks, known.head)
    assert set(found.linears) == set(known.linears)
    assert found.transposed == known.transposed


def test_wrong_configs_are_named():
    with pytest.raises(CheckpointError, match="no model_type"):
        architecture_of({})
    with pytest.raises(CheckpointError, match="surely-unknown"):
        architecture_of({"model_type": "surely-unknown"})
    with pytest.raises(CheckpointError, match="lacks num_attention_heads"):
        architecture_of({"model_type": "llama"})
    with pytest.raises(CheckpointError, match="no list of blocks"):
        describe(nn.Linear(3, 3), "tiny")
