"""A model of which only the part in use is in memory.

The module tree is built on the meta device; a part's weights are read from the checkpoint when the
part is needed and given back afterwards. What the decoder blocks are called with (masks, rotary
tables, positions) is recorded from transformers' own forward pass, so no family needs code here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lutra.architectures import Architecture, architecture_of, meta_model
from lutra.errors import CheckpointError
from lutra.formats.checkpoint import SourceCheckpoint, check_finite


class _Stop(Exception):
    """Ends a forward pass once the last block's arguments are known."""


class _StandIn(nn.Module):
    """Stands in for a block and returns what it is given, whatever reaches it."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # for its attributes only, as below
        self.output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes the hidden state on."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        # Not a submodule: models look at attributes of a block (attention_type), never at weights.
        object.__setattr__(self, "block", block)
        self.last = last
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden_states, (args, kwargs)
        if self.last:
            raise _Stop
        return hidden_states


class StreamedModel:
    """The module tree of a checkpoint, with weights present only where they were loaded.

    Args:
        checkpoint: where the weights are.
        dtype: dtype in which parts are loaded and run.
        device: where they are run.

    Attributes:
        model: the module tree.
        architecture: the family's entry.
        blocks: the decoder blocks.
    """

    def __init__(
        self, checkpoint: SourceCheckpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.model = meta_model(checkpoint.config).eval()
        self.model.requires_grad_(False)
        self.architecture: Architecture = architecture_of(checkpoint.config, self.model)
        self.blocks: nn.ModuleList = self.model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        for name, module in self.model.named_modules():
            if module is embedding:
                checkpoint.name_embedding(f"{name}.weight")
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._returns_tuple = False
        self._example_1T: Tensor | None = None
        self._make_buffers()

    def block_path(self, index: int) -> str:
        return f"{self.architecture.blocks}.{index}"

    def _make_buffers(self) -> None:
        """Real buffers (rotary frequencies, causal masks), computed by the model's own code."""
        for path, module in self.model.named_modules():
            names = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
            if not names:
                continue
            attempts = []
            for fill in (0, 1):  # two different starts show whether the values were computed
                for name in names:
                    old = module._buffers[name]
                    assert old is not None
                    module._buffers[name] = torch.full_like(old, fill, device=self.device)
                self.model._init_weights(module)  # type: ignore[operator]
                attempts.append([module._buffers[n] for n in names])
            for name, first, second in zip(names, *attempts, strict=True):
                stored = self.checkpoint.resolve(f"{path}.{name}")
                if stored is not None:
                    module._buffers[name] = self.checkpoint.tensor(stored).to(self.device)
                elif first is None or second is None or not torch.equal(first, second):
                    raise CheckpointError(
                        f"{self.checkpoint.path}: the buffer {path}.{name} of this "
                        f"{self.architecture.family} model is not in the checkpoint and can not be "
                        "computed without the weights, so the model can not be streamed"
                    )

    # ---- weights in and out

    def load(self, path: str) -> None:
        """Read the parameters under ``path`` from the checkpoint.

        Raises:
            CheckpointError: one is missing, has another shape than the config says, or NaN or inf.
        """
        for owner_path, module in self._modules(path):
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                value = self.read(f"{owner_path}.{name}", tuple(parameter.shape))
                # A copy: nothing may keep the file's memory alive.
                value = value.to(self.device, self.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One parameter by its name in the module tree, checked."""
        stored = self._stored(name, shape)
        tensor = self.checkpoint.tensor(stored)
        check_finite(stored, tensor)
        return tensor

    def check_shapes(self) -> None:
        """Compare every parameter of the module tree with the headers of the checkpoint.

        Raises:
            CheckpointError: one is missing or has another shape than the config says.
        """
        for name, parameter in self.model.named_parameters():
            self._stored(name, tuple(parameter.shape))

    def _stored(self, name: str, shape: tuple[int, ...]) -> str:
        stored = self.checkpoint.resolve(name)
        if stored is None:
            advice = "Is a shard missing?"
            if not self.architecture.known:
                advice += (
                    " Or this family, which has no entry in lutra.architectures, stores its "
                    "weights under other names than it runs them (mixtures of experts do)."
                )
            raise CheckpointError(
                f"{self.checkpoint.path} has no tensor {name!r}, which a "
                f"{self.architecture.family} model of this config needs. {advice}"
            )
        if self.checkpoint.shape(stored) != shape:
            raise CheckpointError(
                f"tensor {stored!r} of {self.checkpoint.path} has shape "
                f"{list(self.checkpoint.shape(stored))}; config.json says {list(shape)}"
            )
        return stored

    def unload(self, path: str) -> None:
        """Give the parameters under ``path`` back."""
        for _, module in self._modules(path):
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[None]:
        """Parts in memory for the length of a ``with`` block."""
        try:
            for path in paths:
                self.load(path)
            yield
        finally:
            for path in paths:
                self.unload(path)

    def _modules(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.model.get_submodule(path).named_modules():
            yield (f"{path}.{name}" if name else path), module

    # ---- running

    def embed(self, ids_NT: Tensor, batch: int) -> Tensor:
        """What block 0 reads, ``[samples, tokens, hidden]``; records every block's other arguments.

        Args:
            ids_NT: token ids.
            batch: samples in one forward pass.
        """
        self._example_1T = ids_NT[:1].clone()
        recorders = [_Recorder(b, i + 1 == len(self.blocks)) for i, b in enumerate(self.blocks)]
        hidden: list[Tensor] = []
        with (
            self.loaded(*self.architecture.prelude),
            self._in_place_of_blocks(recorders),
            torch.no_grad(),
        ):
            for ids in ids_NT.split(batch):
                try:
                    self.model(input_ids=ids.to(self.device), use_cache=False)
                except _Stop:
                    pass
                first = recorders[0]
                assert first.hidden is not None
                hidden.append(first.hidden.detach().clone())
                if len(ids) not in self._calls:
                    calls = [r.call for r in recorders]
                    self._calls[len(ids)] = [c for c in calls if c is not None]
        return torch.cat(hidden)

    @contextmanager
    def _in_place_of_blocks(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        owner, _, attribute = self.architecture.blocks.rpartition(".")
        parent = self.model.get_submodule(owner)
        setattr(parent, attribute, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(parent, attribute, self.blocks)

    def run_block(self, index: int, hidden_NTD: Tensor) -> Tensor:
        """Output of a loaded block. Samples are as long as those that :meth:`embed` has seen."""
        args, kwargs = self._arguments(index, len(hidden_NTD))
        output = self.blocks[index](hidden_NTD, *args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    def call_block(self, index: int, parameters: dict[str, Tensor], hidden_NTD: Tensor) -> Tensor:
        """As :meth:`run_block`, with some parameters replaced; differentiable in them."""
        args, kwargs = self._arguments(index, len(hidden_NTD))
        output = torch.func.functional_call(
            self.blocks[index], parameters, (hidden_NTD, *args), kwargs
        )
        return output[0] if isinstance(output, tuple) else output

    def _arguments(self, index: int, samples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if samples not in self._calls:
            assert self._example_1T is not None, "embed() comes first"
            self.embed(self._example_1T.expand(samples, -1), samples)
        return self._calls[samples][index]

    @contextmanager
    def tail(self) -> Iterator[None]:
        """What :meth:`finish` and :meth:`logits` need in memory, for the length of a ``with``."""
        known = self.architecture.known
        with self.loaded(*(self.architecture.epilogue if known else self.architecture.prelude)):
            yield

    def finish(self, hidden_NTD: Tensor) -> Tensor:
        """What the head reads: the hidden state through the modules behind the last block."""
        if not self.architecture.known:
            return self._own_forward(hidden_NTD, None)
        for path in self.architecture.epilogue:
            hidden_NTD = self.model.get_submodule(path)(hidden_NTD)
        return hidden_NTD

    def logits(self, hidden_NTD: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """Logits of what :meth:`finish` gives.

        Args:
            hidden_NTD: output of :meth:`finish`.
            head: the head's ``weight`` and, if it has one, ``bias``.
        """
        if not self.architecture.known:
            return self._own_forward(hidden_NTD, head)
        return nn.functional.linear(hidden_NTD, head["weight"], head.get("bias"))

    def _own_forward(self, hidden_NTD: Tensor, parameters: Mapping[str, Tensor] | None) -> Tensor:
        """The model's own forward pass, since only it knows what a family outside the table does
        behind the blocks (norms, multipliers, capped logits).

        Args:
            hidden_NTD: what the last block gives; with ``parameters``, what the head reads.
            parameters: of the head. Without them the answer is what the head reads, else logits.
        """
        assert self._example_1T is not None, "embed() comes first"
        head = self.model.get_submodule(self.architecture.head)
        read: list[Tensor] = []

        def at_head(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if parameters is not None:
                return (hidden_NTD, *inputs[1:])
            read.append(inputs[0])
            raise _Stop

        behind_NTD = hidden_NTD.to(self.dtype)
        output = (behind_NTD,) if self._returns_tuple else behind_NTD
        ids = self._example_1T.expand(len(hidden_NTD), -1).to(self.device)
        kept = dict(head._parameters)
        handle = head.register_forward_pre_hook(at_head)
        try:
            for name, value in (parameters or {}).items():
                head._parameters[name] = nn.Parameter(value, requires_grad=False)
            stand_ins = [_StandIn(b, output) for b in self.blocks]
            with self._in_place_of_blocks(stand_ins), torch.no_grad():
                return self.model(input_ids=ids, use_cache=False).logits
        except _Stop:
            return read[0]
        finally:
            handle.remove()
            head._parameters.update(kept)


def compute_dtype(stored: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype in which blocks are run, and why.

    bfloat16 only where the hardware multiplies it faster than float32 and the weights are
    16 bit anyway; otherwise float32.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32, f"the weights are {str(stored).removeprefix('torch.')}"
    if device.type == "cuda":
        return torch.bfloat16, "16-bit weights on a GPU"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    if stored == torch.bfloat16 and has_amx:
        return torch.bfloat16, "bfloat16 weights, and this CPU has AMX"
    return torch.float32, "this CPU multiplies float32 as fast as 16 bit"
