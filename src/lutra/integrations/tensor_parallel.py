"""Tensor parallelism: the linears of each block cut over the ranks of a process group.

The first linears of attention and of the MLP are cut by outputs (columns of ``W.T``), the second by
inputs (rows), so a block needs two sums over the ranks and no other exchange. Each rank reads its
part of the packed tensors from disk; none holds the whole. Embeddings, norms and the head are on
every rank, and every rank gets the same tokens.

    torchrun --nproc-per-node 2 -m lutra generate DIR --prompt TEXT --device cuda --tensor-parallel

Bit planes are cut along whole words of 32 inputs and along whole groups; a format with one scale
per row is cut anywhere.

transformers has tensor parallelism of its own (``DistributedConfig``). Tried with 5.23, it cuts the
bit planes of a Llama where they have to be cut, but has no plan for OPT, needs ``accelerate``, and
leaves every parameter a DTensor, which no kernel takes and no two layers can be joined of. Its
hooks around each module also cost more than what a token computes: 17 against 7 ms for a forward
pass of two small dense blocks over two processes of a CPU. So the ranks here run plain modules of
their own shapes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lutra.errors import CheckpointError, ResourceError, SchemeError
from lutra.formats.shard import read_header
from lutra.kernels.cuda.token_step import DirectSum
from lutra.nn import QuantizedLinear
from lutra.packed import packed_layers
from lutra.runtime.generation import enable
from lutra.runtime.loading import check_fits
from lutra.scheme import Format, Scheme
from lutra.siblings import join_siblings

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
ROWS = ("o_proj", "out_proj", "down_proj", "fc2")


class Sum:
    """Adds up partial results over ranks.

    On the GPUs of one host the few kilobytes of a token go through memory that all of them can
    write (``token_sum.cu``); NCCL takes 19 us for 24 KB between two H200s. All else goes through
    the process group.

    Args:
        group: the ranks; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.direct: DirectSum | None = None
        self._memory: list[Any] = []

    def use_direct(self, device: torch.device, most: int) -> bool:
        """Set up shared memory for sums of up to ``most`` values; whether there is such memory."""
        ranks = dist.get_world_size(self.group)
        if device.type != "cuda" or not 2 <= ranks <= 8:
            return False
        import torch.distributed._symmetric_memory as symmetric

        assert self.group is not None
        try:
            size = DirectSum.bytes_for(most, ranks)
            buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
            shared = symmetric.rendezvous(buffer, self.group.group_name)
        except RuntimeError as error:
            logger.info("sums over ranks go through NCCL: no memory that all can write (%s)", error)
            return False
        buffer.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(self.group)
        self._memory = [buffer, shared]
        offset = buffer.data_ptr() - shared.buffer_ptrs[shared.rank]  # in a larger allocation
        addresses = [address + offset for address in shared.buffer_ptrs]
        self.direct = DirectSum(addresses, shared.rank, most, device)
        return True

    def __call__(self, x: Tensor) -> Tensor:
        if self.direct is not None and self.direct.takes(x):
            return self.direct(x)
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Sum:
        return self  # a group of processes is no more than one


class SummedQuantized(QuantizedLinear):
    """A packed layer of which each rank holds some inputs; the results are summed over ranks."""

    total: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.total(super().forward(x))


class SummedLinear(nn.Linear):
    """The same for a dense layer."""

    total: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.total(super().forward(x))


def start() -> tuple[int, int]:
    """Join the processes that torchrun has started; this one's rank and how many there are.

    Raises:
        ResourceError: the process was not started by torchrun, or has no GPU of its own.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ResourceError(
                "tensor parallelism needs one process per device: start it with "
                "torchrun --nproc-per-node 2 -m lutra ..."
            )
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise ResourceError(
                    f"process {local} has no GPU: torch sees {torch.cuda.device_count()}. "
                    "Start no more processes than there are GPUs."
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def degrees(config: Any, scheme: Scheme | None) -> list[int]:
    """Numbers of ranks over which a model can be cut, 1 among them."""
    most = _heads(config)[1]
    return [d for d in range(1, most + 1) if why_not(config, scheme, d) is None]


def check_degree(config: Any, scheme: Scheme | None, ranks: int) -> None:
    """Refuse a number of ranks over which a model can not be cut.

    Raises:
        SchemeError: heads, words or groups do not divide, or the family is not known.
    """
    refusal = why_not(config, scheme, ranks)
    if refusal is not None:
        allowed = ", ".join(map(str, degrees(config, scheme)))
        raise SchemeError(
            f"this model can not be cut over {ranks} ranks: {refusal}. It can over {allowed}."
        )


def why_not(config: Any, scheme: Scheme | None, ranks: int) -> str | None:
    """Why a model can not be cut over so many ranks, in words, or None."""
    if ranks == 1:
        return None
    if config.model_type not in FAMILIES:
        return f"the family {config.model_type!r} has no plan (there are {', '.join(FAMILIES)})"
    heads, kv_heads = _heads(config)
    for name, count in (("attention heads", heads), ("key and value heads", kv_heads)):
        if count % ranks:
            return f"it has {count} {name}"
    hidden = config.hidden_size
    width = config.ffn_dim if config.model_type == "opt" else config.intermediate_size
    attended = heads * (getattr(config, "head_dim", None) or hidden // heads)
    for name, inputs in (("inputs of the MLP's second layer", width), ("attended", attended)):
        if inputs % ranks:
            return f"{inputs} {name} do not divide"
    if scheme is None:
        return None
    for layer, inputs in _row_layers(config, attended, width):
        format = scheme.format_of(layer)
        if format is None:
            continue
        part = inputs // ranks
        if part % 32:
            return f"{layer} would get {part} inputs a rank, which is no multiple of 32"
        size = format.group_size_for(inputs)
        if size < inputs and part % size:
            return f"{layer} would get {part} inputs a rank, in groups of {size}"
    return None


def _heads(config: Any) -> tuple[int, int]:
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _row_layers(config: Any, attended: int, width: int) -> list[tuple[str, int]]:
    """Names of the layers that are cut by inputs, and how many inputs they have."""
    found = []
    for block in range(config.num_hidden_layers):
        if config.model_type == "opt":
            stem = f"model.decoder.layers.{block}."
            found += [(stem + "self_attn.out_proj", attended), (stem + "fc2", width)]
        else:
            stem = f"model.layers.{block}."
            found += [(stem + "self_attn.o_proj", attended), (stem + "mlp.down_proj", width)]
    return found


def cut_blocks(
    model: nn.Module, format_of: Callable[[str], Format | None], rank: int, ranks: int,
    total: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """Replace the linears of a model on the meta device by this rank's parts of them.

    Args:
        format_of: storage format of a layer by its name; None for dense ones.
        total: sums results over the ranks.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            format = format_of(name)
            if last in COLUMNS or last in ROWS:
                part = _part(module, format, last in ROWS, rank, ranks)
                if isinstance(part, SummedQuantized | SummedLinear):
                    part.total = total
                model.set_submodule(name, part)
            elif format is not None:
                model.set_submodule(name, _part(module, format, False, 0, 1))
    for attention in model.modules():
        if type(attention).__name__ == "OPTAttention":  # the others count heads by their outputs
            attention.__dict__["num_heads"] //= ranks


def _part(
    module: nn.Linear, format: Format | None, by_inputs: bool, rank: int, ranks: int
) -> QuantizedLinear | nn.Linear:
    inputs = module.in_features // ranks if by_inputs else module.in_features
    outputs = module.out_features if by_inputs else module.out_features // ranks
    # What is summed over ranks must have the bias once.
    bias = module.bias is not None and (not by_inputs or rank == 0)
    dtype = module.weight.dtype
    with torch.device("meta"):
        if format is None:
            kind: type[nn.Linear] = SummedLinear if by_inputs else nn.Linear
            return kind(inputs, outputs, bias=bias, dtype=dtype)
        packed: type[QuantizedLinear] = SummedQuantized if by_inputs else QuantizedLinear
        return packed(inputs, outputs, format, bias, dtype)


def load_parallel(
    folder: str | Path,
    device: str | torch.device,
    dtype: torch.dtype | str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Any:
    """This rank's part of a checkpoint, as a transformers model that works with the other ranks.

    Args:
        folder: dense or quantized checkpoint, in safetensors.
        device: this rank's device.
        dtype: of activations and of what is not quantized; ``auto`` is the checkpoint's own.
        group: the ranks; None for all processes.

    Raises:
        SchemeError: the model can not be cut over so many ranks; the message says over how many.
        CheckpointError: the folder can not be used.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from lutra.evaluate.load import load_config, open_checkpoint
    from lutra.evaluate.size import is_quantized
    from lutra.formats.checkpoint import read_quantization_config

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint)
    scheme = None
    if is_quantized(checkpoint.config):
        scheme = read_quantization_config(checkpoint.config)
        del config.quantization_config
    check_degree(config, scheme, ranks)
    place = torch.device(device)
    own = getattr(config, "dtype", None) or torch.float32
    wanted = own if isinstance(dtype, str) else dtype
    total = Sum(group)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config).to(wanted)
    cut_blocks(
        model, lambda name: None if scheme is None else scheme.format_of(name), rank, ranks, total
    )
    check_fits(model, place, f"this rank's part of {checkpoint.path}")
    files = _Files(checkpoint.path)
    modules = dict(model.named_modules())
    tied = set(model.all_tied_weights_keys)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if name in tied and checkpoint.resolve(name) is None:
            continue
        stored = checkpoint.resolve(name)
        if stored is None:
            raise CheckpointError(f"{checkpoint.path} has no tensor {name!r}")
        last = owner.rpartition(".")[2]
        tensor = files.part(stored, parameter.shape, last in COLUMNS, last in ROWS, rank)
        if leaf in ("weight", "bias") and tensor.is_floating_point():
            tensor = tensor.to(wanted)
        module._parameters[leaf] = nn.Parameter(tensor.to(place), requires_grad=False)
    model.tie_weights()
    new_buffers(model, config, place)
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return ready(model, total)


def new_buffers(model: Any, config: Any, device: torch.device) -> None:
    """Compute the tables of rotary embeddings, which no checkpoint holds."""
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config=config).to(device))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise CheckpointError(f"tables {left} of this model are in no file and can not be computed")


def ready(model: Any, total: Sum) -> Any:
    """Prepare kernels and exchange, and let ``generate`` decode by recorded steps."""
    embedding = model.get_input_embeddings().weight
    model.eval()
    join_siblings(model)
    for layer in packed_layers(model):
        layer.prepare_if_local(embedding.dtype)
    total.use_direct(embedding.device, 64 * model.config.hidden_size)
    return enable(model)


class _Files:
    """The tensors of a folder, read in parts."""

    def __init__(self, folder: Path) -> None:
        self.place = {
            name: path for path in sorted(folder.glob("*.safetensors"))
            for name in read_header(path).tensors
        }  # fmt: skip
        self.opened: dict[Path, Any] = {}

    def part(
        self, name: str, shape: tuple[int, ...], by_outputs: bool, by_inputs: bool, rank: int
    ) -> Tensor:
        """This rank's part, of the shape wanted; only it is read from disk."""
        from safetensors import safe_open

        if name not in self.place:
            raise CheckpointError(f"tensor {name!r} is in no .safetensors file of the folder")
        path = self.place[name]
        if path not in self.opened:
            self.opened[path] = safe_open(path, framework="pt")
        stored = self.opened[path].get_slice(name)
        whole = tuple(stored.get_shape())
        cuts = [slice(None)] * len(whole)
        for axis, (have, want) in enumerate(zip(whole, shape, strict=True)):
            if have != want:
                expected = len(whole) - 2 if by_outputs and len(whole) > 1 else len(whole) - 1
                if not (by_outputs or by_inputs) or axis != expected:
                    raise CheckpointError(
                        f"tensor {name!r} has shape {list(whole)}; a part of {list(shape)} "
                        "can not be cut from it"
                    )
                cuts[axis] = slice(rank * want, (rank + 1) * want)
        return stored[tuple(cuts)].contiguous()
