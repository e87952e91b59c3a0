"""The model families: where the blocks are, which linears share an input, what can be folded.

One entry per family. Paths are those of the module tree that transformers builds; paths in
``groups`` and ``folds`` count from a block. A family that is not listed is described by its
structure (:func:`describe`), with every linear a group of its own and nothing to fold; methods that
look at one layer at a time work there, and others should say why they do not.

A *group* is a set of linears that read the same tensor, so one set of statistics (a Hessian, a
scale) serves all of them; groups stand in the order in which they run.

A *fold site* is a place where channels can be rescaled without changing what the model computes:
divide the outputs of ``source`` by s and multiply the matching inputs of ``targets`` by s (AWQ,
arXiv 2306.00978, section 3.2; SmoothQuant, arXiv 2211.10438, section 4). It is exact

- from a norm with a weight to the linears that alone read it,
- from v to o, because attention mixes tokens and never channels; with grouped-query attention one
  channel of v feeds the same channel of every query head of its group,
- from up to down in a gated MLP, and from fc1 to fc2 where the activation is ReLU, since
  relu(x / s) = relu(x) / s for s > 0. GELU has no such property, so those families have no site.

Queries and keys meet in a dot product, so q may be multiplied and k divided by the same scale. With
rotary embeddings the two channels of a rotated pair (i and i + rotary_dim / 2) must share theirs,
and with grouped-query attention all query heads of a group; see :class:`QueryKeySite`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lutra.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class FoldSite:
    """One place where channels can be rescaled. See the module's docstring.

    Attributes:
        source: path in the block of the norm or linear whose outputs are divided.
        targets: paths of the linears whose inputs are multiplied.
        rows: which outputs of ``source``, see :func:`rows_of`.
        per_head: whether targets see each source head once per query head of its group.
    """

    source: str
    targets: tuple[str, ...]
    rows: str = "all"
    per_head: bool = False


@dataclass(frozen=True)
class QueryKeySite:
    """Where queries can be multiplied and keys divided by a scale.

    Attributes:
        query, key: paths in the block of what gives queries and keys: linears, or the norms behind
            them where a family norms heads (their weight is shared by all heads).
        query_rows, key_rows: which outputs of each, see :func:`rows_of`.
        shared: whether one scale serves all heads, because a norm's weight does.
    """

    query: str
    key: str
    query_rows: str = "all"
    key_rows: str = "all"
    shared: bool = False


@dataclass(frozen=True)
class Architecture:
    """What a method and a runner need to know about a family.

    Attributes:
        family: the ``model_type`` of the config.
        blocks: path of the list of decoder blocks.
        prelude: modules that run before block 0, or that blocks need (rotary embedding). For an
            unknown family, every module outside the blocks and the head.
        epilogue: modules between the last block and the head.
        head: path of the head.
        groups: linears of a block that share one input, in the order in which they run.
        folds: fold sites of a block.
        query_key: where queries and keys can be rescaled against each other; None if unknown.
        sequential: whether the MLP reads what attention has added; False where both read the
            block's input, so their statistics do not depend on each other.
        transposed: whether linears store ``[in, out]`` (GPT-2's Conv1D).
        known: False for an entry made by :func:`describe`.
        heads, kv_heads, head_dim: shape of attention; 0 for an unknown family.
        rotary_dim: channels of a head that rotary embedding turns; 0 without it.
    """

    family: str
    blocks: str
    prelude: tuple[str, ...]
    epilogue: tuple[str, ...]
    head: str
    groups: tuple[tuple[str, ...], ...]
    folds: tuple[FoldSite, ...] = ()
    query_key: QueryKeySite | None = None
    sequential: bool = True
    transposed: bool = False
    known: bool = True
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    rotary_dim: int = 0

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all quantizable linears of a block, in the order in which they run."""
        return tuple(path for group in self.groups for path in group)

    def groups_of(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """The groups of one block; where blocks differ (unknown families), those of this one."""
        if self.known:
            return self.groups
        return tuple((name,) for name, module in block.named_modules() if is_linear(module))


Adapt = Callable[[Architecture, Mapping[str, Any]], Architecture]


def _opt(entry: Architecture, config: Mapping[str, Any]) -> Architecture:
    """The variants of OPT: OPT-350m norms after the sum and projects its embeddings."""
    decoder = "model.decoder."
    prelude, epilogue, folds = entry.prelude, entry.epilogue, list(entry.folds)
    before = config.get("do_layer_norm_before", True)
    if not before or config.get("_remove_final_layer_norm", False):
        epilogue = ()
    width = config.get("hidden_size", 768)
    if (config.get("word_embed_proj_dim") or width) != width:
        prelude = (*prelude, decoder + "project_in")
        epilogue = (*epilogue, decoder + "project_out")
    if not before or not config.get("layer_norm_elementwise_affine", True):
        # Norms after the sum also feed the next residual, and norms without a weight can not scale.
        folds = [site for site in folds if not site.source.endswith("layer_norm")]
    if config.get("activation_function", "relu") != "relu":
        folds = [site for site in folds if site.source != "fc1"]
    return replace(entry, prelude=prelude, epilogue=epilogue, folds=tuple(folds))


def _phi(entry: Architecture, config: Mapping[str, Any]) -> Architecture:
    if not config.get("qk_layernorm", False):
        return entry
    norms = QueryKeySite("self_attn.q_layernorm", "self_attn.k_layernorm", shared=True)
    return replace(entry, query_key=norms)


def _gpt_neox(entry: Architecture, config: Mapping[str, Any]) -> Architecture:
    return replace(entry, sequential=not config.get("use_parallel_residual", True))


_QUERY_KEY = QueryKeySite("self_attn.q_proj", "self_attn.k_proj")

_LLAMA = Architecture(
    family="llama",
    blocks="model.layers",
    prelude=("model.embed_tokens", "model.rotary_emb"),
    epilogue=("model.norm",),
    head="lm_head",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    folds=(
        FoldSite("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        FoldSite("self_attn.v_proj", ("self_attn.o_proj",), per_head=True),
        FoldSite("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        FoldSite("mlp.up_proj", ("mlp.down_proj",)),
    ),
    query_key=_QUERY_KEY,
)

_TABLE: dict[str, tuple[Architecture, Adapt | None]] = {
    "llama": (_LLAMA, None),
    "mistral": (replace(_LLAMA, family="mistral"), None),
    "qwen2": (replace(_LLAMA, family="qwen2"), None),
    "qwen3": (
        replace(
            _LLAMA,
            family="qwen3",
            query_key=QueryKeySite("self_attn.q_norm", "self_attn.k_norm", shared=True),
        ),
        None,
    ),
    "phi3": (
        Architecture(
            family="phi3",
            blocks="model.layers",
            prelude=("model.embed_tokens", "model.rotary_emb"),
            epilogue=("model.norm",),
            head="lm_head",
            groups=(
                ("self_attn.qkv_proj",),
                ("self_attn.o_proj",),
                ("mlp.gate_up_proj",),
                ("mlp.down_proj",),
            ),
            folds=(
                FoldSite("input_layernorm", ("self_attn.qkv_proj",)),
                FoldSite("self_attn.qkv_proj", ("self_attn.o_proj",), rows="v", per_head=True),
                FoldSite("post_attention_layernorm", ("mlp.gate_up_proj",)),
                FoldSite("mlp.gate_up_proj", ("mlp.down_proj",), rows="up"),
            ),
            query_key=QueryKeySite("self_attn.qkv_proj", "self_attn.qkv_proj", "q", "k"),
        ),
        None,
    ),
    "phi": (
        Architecture(
            family="phi",
            blocks="model.layers",
            prelude=("model.embed_tokens", "model.rotary_emb"),
            epilogue=("model.final_layernorm",),
            head="lm_head",
            # Attention and MLP read the same normed input.
            groups=(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
                ("self_attn.dense",),
                ("mlp.fc2",),
            ),
            folds=(
                FoldSite(
                    "input_layernorm",
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
                ),
                FoldSite("self_attn.v_proj", ("self_attn.dense",), per_head=True),
            ),
            query_key=_QUERY_KEY,
            sequential=False,
        ),
        _phi,
    ),
    "opt": (
        Architecture(
            family="opt",
            blocks="model.decoder.layers",
            prelude=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            epilogue=("model.decoder.final_layer_norm",),
            head="lm_head",
            groups=(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.out_proj",),
                ("fc1",),
                ("fc2",),
            ),
            folds=(
                FoldSite(
                    "self_attn_layer_norm",
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ),
                FoldSite("self_attn.v_proj", ("self_attn.out_proj",), per_head=True),
                FoldSite("final_layer_norm", ("fc1",)),
                FoldSite("fc1", ("fc2",)),
            ),
            query_key=_QUERY_KEY,
        ),
        _opt,
    ),
    "gpt_neox": (
        Architecture(
            family="gpt_neox",
            blocks="gpt_neox.layers",
            prelude=("gpt_neox.embed_in", "gpt_neox.rotary_emb"),
            epilogue=("gpt_neox.final_layer_norm",),
            head="lm_head",
            groups=(
                ("attention.query_key_value",),
                ("attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
            folds=(
                FoldSite("input_layernorm", ("attention.query_key_value",)),
                FoldSite(
                    "attention.query_key_value", ("attention.dense",), rows="v interleaved",
                    per_head=True,
                ),
                FoldSite("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            ),
            query_key=QueryKeySite(
                "attention.query_key_value", "attention.query_key_value",
                "q interleaved", "k interleaved",
            ),
        ),
        _gpt_neox,
    ),
    "gpt2": (
        Architecture(
            family="gpt2",
            blocks="transformer.h",
            prelude=("transformer.wte", "transformer.wpe"),
            epilogue=("transformer.ln_f",),
            head="lm_head",
            groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
            folds=(
                FoldSite("ln_1", ("attn.c_attn",)),
                FoldSite("attn.c_attn", ("attn.c_proj",), rows="v", per_head=True),
                FoldSite("ln_2", ("mlp.c_fc",)),
            ),
            query_key=QueryKeySite("attn.c_attn", "attn.c_attn", "q", "k"),
            transposed=True,
        ),
        None,
    ),
}  # fmt: skip


# What transformers takes where a config does not say it.
_ROTARY_PARTS = {"gpt2": 0.0, "opt": 0.0, "phi": 0.5, "gpt_neox": 0.25}


def families() -> list[str]:
    """Families with an entry of their own, sorted."""
    return sorted(_TABLE)


def sibling_groups(family: str | None) -> tuple[tuple[str, ...], ...]:
    """Paths in a block of linears that read one input, by groups of two and more."""
    if family not in _TABLE:
        return ()
    return tuple(group for group in _TABLE[family][0].groups if len(group) > 1)


def architecture_of(
    config: Mapping[str, Any] | PretrainedConfig, model: nn.Module | None = None
) -> Architecture:
    """The entry of a model's family, with what its config changes already applied.

    Args:
        config: ``config.json`` as a dict, or a transformers config.
        model: the model, if it is at hand (it may be on the meta device); used for families
            without an entry. Otherwise one is built there, without memory.

    Raises:
        CheckpointError: the config has no ``model_type``, or it is unknown here and in the
            installed transformers, or the model has no list of blocks.
    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    family = values.get("model_type")
    if not isinstance(family, str):
        raise CheckpointError("config.json has no model_type; is this a Hugging Face checkpoint?")
    if family not in _TABLE:
        return describe(model if model is not None else meta_model(config), family)
    entry, adapt = _TABLE[family]
    heads = values.get("num_attention_heads") or values.get("n_head") or 0
    width = values.get("hidden_size") or values.get("n_embd") or 0
    if not heads or not width:
        raise CheckpointError(
            f"config.json of this {family} model lacks num_attention_heads or hidden_size"
        )
    # Qwen3's own default is 128, whatever the width.
    head_dim = values.get("head_dim") or (128 if family == "qwen3" else width // heads)
    rope = values.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if part is None:
        part = values.get("rotary_pct", _ROTARY_PARTS.get(family, 1.0))
    entry = replace(
        entry,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        # Frequencies are made for every second channel, so an odd number is rounded up.
        rotary_dim=-(-int(head_dim * part) // 2) * 2,
    )
    return adapt(entry, values) if adapt else entry


def meta_model(config: Mapping[str, Any] | PretrainedConfig) -> nn.Module:
    """The model of a config on the meta device: its module tree and shapes, no memory.

    Raises:
        CheckpointError: the installed transformers does not know the model, or it needs code of
            the checkpoint's own, which is never run.
    """
    import transformers

    try:
        if isinstance(config, Mapping):
            values = {k: v for k, v in config.items() if k != "quantization_config"}
            config = transformers.AutoConfig.for_model(**values)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        family = config.get("model_type") if isinstance(config, Mapping) else config.model_type
        raise CheckpointError(
            f"transformers {transformers.__version__} can not build a causal language model of "
            f"type {family!r} ({error}). A newer transformers may know it; code that lies in a "
            "checkpoint is never run."
        ) from error


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be quantized: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def describe(model: nn.Module, family: str) -> Architecture:
    """An entry made from the module tree: the blocks are the list that holds most parameters.

    Raises:
        CheckpointError: no list of modules holds linears.
    """

    def weight(blocks: nn.ModuleList) -> int:
        return sum(p.numel() for p in blocks.parameters())

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(is_linear(m) for m in module.modules())
    ]
    if not lists:
        raise CheckpointError(
            f"a model of type {family!r} has no list of blocks with linear layers, "
            "so there is nothing here to quantize block by block"
        )
    # max() keeps the first of equals, and an outer list comes before the lists inside it.
    blocks_name, blocks = max(lists, key=lambda item: weight(item[1]))
    head = "lm_head"
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if output is not None and module is output:
            head = name
    inside = blocks_name + "."
    around = [
        name
        for name, module in model.named_modules()
        if name
        and name not in (head, blocks_name)
        and not name.startswith(inside)
        and not any(True for _ in module.children())
        and (list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)))
    ]
    groups = tuple((name,) for name, module in blocks[0].named_modules() if is_linear(module))
    transposed = any(type(m).__name__ == "Conv1D" for m in blocks[0].modules())
    return Architecture(
        family=family, blocks=blocks_name, prelude=tuple(around), epilogue=(), head=head,
        groups=groups, transposed=transposed, known=False,
    )  # fmt: skip


def longest_list(model: nn.Module) -> nn.ModuleList | None:
    """The decoder blocks of any model: its longest list of modules, or None without any."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=None)


# ---- folding


def rows_of(rows: str, shape: Architecture, outputs: int) -> Tensor:
    """Indices of a part of a linear's outputs, ``[channels]``.

    Args:
        rows: ``all``; ``q``, ``k``, ``v`` (parts of a fused ``[q; k; v]``); ``q interleaved`` and
            so on (fused head by head, ``[head][q, k, v][head_dim]``); ``up`` (the second half of a
            fused ``[gate; up]``).
        shape: the family's entry, for the shape of attention.
        outputs: number of outputs of the linear.
    """
    d = shape.head_dim
    queries, keys = shape.heads * d, shape.kv_heads * d
    part, _, interleaved = rows.partition(" ")
    if interleaved:
        within = "qkv".index(part) * d + torch.arange(d)
        return (torch.arange(shape.heads)[:, None] * 3 * d + within).flatten()
    begin, end = {
        "all": (0, outputs),
        "q": (0, queries),
        "k": (queries, queries + keys),
        "v": (queries + keys, queries + 2 * keys),
        "up": (outputs // 2, outputs),
    }[part]
    return torch.arange(begin, end)


def fold_channels(site: FoldSite, shape: Architecture, source_outputs: int) -> Tensor:
    """Which outputs of the source are rescaled, as indices ``[channels]``."""
    return rows_of(site.rows, shape, source_outputs)


def expand_scale(site: FoldSite, shape: Architecture, scale_C: Tensor) -> Tensor:
    """The scale as the targets' inputs see it, ``[in]``: repeated over a group's query heads."""
    if not site.per_head or shape.kv_heads == shape.heads:
        return scale_C
    by_head = scale_C.view(shape.kv_heads, shape.head_dim)
    return by_head.repeat_interleave(shape.heads // shape.kv_heads, dim=0).flatten()


def reduce_scale(site: FoldSite, shape: Architecture, statistic_I: Tensor) -> Tensor:
    """A statistic of the targets' inputs ``[in]`` as one value per source channel: the largest.

    The inverse direction of :func:`expand_scale`, for methods that derive a scale from activations.
    """
    if not site.per_head or shape.kv_heads == shape.heads:
        return statistic_I
    by_head = statistic_I.view(shape.kv_heads, -1, shape.head_dim)
    return by_head.amax(dim=1).flatten()


def fold(
    site: FoldSite, shape: Architecture, tensors: Mapping[str, Tensor], scale_C: Tensor
) -> dict[str, Tensor]:
    """Divide the source's channels by ``scale`` and multiply the targets' inputs by it.

    Args:
        site: the fold site.
        shape: the entry that the site is of.
        tensors: the block's parameters by path (``"self_attn.v_proj.weight"``), stored as the
            model stores them (``[in, out]`` where ``shape.transposed``).
        scale_C: positive, one value per rescaled channel (:func:`fold_channels`).

    Returns:
        New tensors for the parameters that change, in their dtypes.
    """
    changed = _scale_outputs(tensors, site.source, site.rows, shape, scale_C.reciprocal())
    scale_I = expand_scale(site, shape, scale_C)
    for target in site.targets:
        name = f"{target}.weight"
        tensor = tensors[name]
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        wide = wide * (scale_I[:, None] if shape.transposed else scale_I)
        changed[name] = wide.to(tensor.dtype)
    return changed


def query_key_scale_shape(shape: Architecture) -> tuple[int, int]:
    """How many scales are free between queries and keys: ``(heads, channels)``.

    Channels that rotary embedding turns in pairs share a scale, so there are
    ``head_dim - rotary_dim / 2`` of them; heads are key heads, or 1 where norms serve all heads.
    """
    if shape.query_key is None:
        raise ValueError(f"the {shape.family} family has no site between queries and keys")
    heads = 1 if shape.query_key.shared else shape.kv_heads
    return heads, shape.head_dim - shape.rotary_dim // 2


def fold_query_key(
    shape: Architecture, tensors: Mapping[str, Tensor], scale_KF: Tensor
) -> dict[str, Tensor]:
    """Multiply queries and divide keys by ``scale``, which leaves attention as it is.

    Args:
        shape: the family's entry.
        tensors: the block's parameters by path, stored as the model stores them.
        scale_KF: positive, of the shape that :func:`query_key_scale_shape` gives.

    Returns:
        New tensors for the parameters that change, in their dtypes.
    """
    heads, _ = query_key_scale_shape(shape)
    site = shape.query_key
    assert site is not None
    pairs = shape.rotary_dim // 2
    scale_KD = torch.cat([scale_KF[:, :pairs], scale_KF], dim=1)  # both halves of the turned part
    per_query = 1 if site.shared else shape.heads // heads
    scale_Q = scale_KD.repeat_interleave(per_query, dim=0).flatten()
    changed = _scale_outputs(tensors, site.query, site.query_rows, shape, scale_Q)
    after = {**tensors, **changed}  # queries and keys may be rows of the same tensor
    keys = _scale_outputs(after, site.key, site.key_rows, shape, scale_KD.flatten().reciprocal())
    return {**changed, **keys}


def _scale_outputs(
    tensors: Mapping[str, Tensor], path: str, rows: str, shape: Architecture, scale_C: Tensor
) -> dict[str, Tensor]:
    """Weight and bias of a linear or norm with some outputs multiplied."""
    changed: dict[str, Tensor] = {}
    for suffix in ("weight", "bias"):
        name = f"{path}.{suffix}"
        tensor = tensors.get(name)
        if tensor is None:
            continue
        turned = tensor.dim() == 2 and shape.transposed
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        outputs_first = wide.t() if turned else wide
        index = rows_of(rows, shape, outputs_first.shape[0])
        outputs_first[index] *= scale_C[:, None] if tensor.dim() == 2 else scale_C
        changed[name] = wide.to(tensor.dtype)
    if not changed:
        raise ValueError(f"{path} has neither weight nor bias, so nothing can be folded")
    return changed
