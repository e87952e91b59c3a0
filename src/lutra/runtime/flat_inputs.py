"""Norms and activations of a model that flattened layers compute while they quantize.

In the blocks of known families, a norm is read by q, k and v (or gate and up) alone, and the
activation of the MLP by its last layer. Where those are flattened layers, whose kernel can compute
such things on the way to integers, the module returns a
:class:`~lutra.kernels.flat.deferred.Deferred` in place of its result. The modules stay in the tree,
keep their weights and are called as before; a hook on them, or whoever else reads the result, gets
it computed by the module's own ``forward``.

An activation gives the same bits either way. A norm may differ in the last one, because its
squares are added up in another order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lutra.architectures import architecture_of, meta_model
from lutra.errors import CheckpointError
from lutra.kernels.flat.before import Activation, Before, Norm
from lutra.kernels.flat.deferred import Deferred
from lutra.nn_flat import FlatLinear

#: Classes of transformers that compute ``weight * round(x / sqrt(mean(x^2) + variance_epsilon))``.
RMS_NORMS = {f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")}
#: Where the activation of the MLP stands in a block, by family.
ACTIVATION_OF = {
    "llama": "mlp.act_fn", "mistral": "mlp.act_fn", "qwen2": "mlp.act_fn", "qwen3": "mlp.act_fn",
    "phi3": "mlp.activation_fn", "phi": "mlp.activation_fn", "opt": "activation_fn",
    "gpt_neox": "mlp.act", "gpt2": "mlp.act",
}  # fmt: skip


def defer(model: Any) -> int:
    """Let norms and activations be computed by the flattened layers that read them.

    Whether a layer does is decided at each call, by its kernel: it depends on the device and dtype.

    Returns:
        How many modules may leave their work to others.
    """
    if not any(isinstance(module, FlatLinear) for module in model.modules()):
        return 0
    try:
        entry = architecture_of(model.config, model)
        blocks = model.get_submodule(entry.blocks)
    except (CheckpointError, AttributeError):
        return 0  # a family without a table, or a model without a head around its blocks
    if not entry.known:
        return 0
    made = 0
    for block in blocks:
        for site in entry.folds:
            source = _at(block, site.source)
            if source is not None and before_of(source) is not None:
                made += _leave_to(source, [_at(block, path) for path in site.targets])
        source = _at(block, ACTIVATION_OF.get(entry.family, ""))
        if source is not None and before_of(source) is not None:
            made += _leave_to(source, [_at(block, entry.groups[-1][-1])])
    return made


def before_of(module: nn.Module) -> Before | None:
    """What a norm or an activation computes, in terms of the kernels; None if they cannot."""
    name = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    if name in RMS_NORMS:
        return Norm(weight, float(module.variance_epsilon))  # type: ignore[arg-type]
    if type(module) is nn.LayerNorm:
        if weight is None or len(module.normalized_shape) != 1:
            return None
        bias = module.bias if module.bias is not None else torch.zeros_like(weight)
        return Norm(weight, module.eps, bias)
    if name in ("SiLU", "SiLUActivation"):
        return Activation("silu")
    if type(module) is nn.ReLU:
        return Activation("relu")
    if name == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu:
        return Activation("gelu")
    if name in ("GELUTanh", "PytorchGELUTanh"):
        return Activation("gelu_tanh")
    return None


def may_read(config: Any, path: str) -> list[Before]:
    """What the layer at the end of ``path`` may compute on the way, in a model of this config.

    Found on a model without weights; for those who prepare programs before one is loaded.
    """
    try:
        entry = architecture_of(config)
        block = meta_model(config).get_submodule(entry.blocks)[0]  # type: ignore[index]
    except (CheckpointError, AttributeError):
        return []
    sources = [site.source for site in entry.folds if any(path.endswith(t) for t in site.targets)]
    found = [before_of(module) for s in sources if (module := _at(block, s)) is not None]
    if path.endswith(entry.groups[-1][-1]):
        module = _at(block, ACTIVATION_OF.get(entry.family, ""))
        before = None if module is None else before_of(module)
        if isinstance(before, Activation):
            found += [before, Activation(before.name, torch.empty(0))]
    return [before for before in found if before is not None]


class _Readers:
    """The layers that read a module's result; a model is freed as soon as it is dropped."""

    def __init__(self, layers: Iterable[FlatLinear]) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Readers:
        present = [layer for ref in self.layers if (layer := ref()) is not None]
        return _Readers(memo.get(id(layer), layer) for layer in present)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Readers, ((),)  # a pickled module computes by itself

    def take(self, before: Before, x: Tensor) -> bool:
        """Whether one of them computes ``before`` by itself; a result is made for the others."""
        present = [layer for ref in self.layers if (layer := ref()) is not None]
        return any(layer.reads(before, x.dtype) for layer in present)


def _leave_to(module: Any, layers: list[nn.Module | None]) -> int:
    readers = [layer for layer in layers if isinstance(layer, FlatLinear)]
    if len(readers) < len(layers) or not readers or "forward" in module.__dict__:
        return 0
    module.lutra_readers = _Readers(readers)
    module.forward = MethodType(_forward, module)
    return 1


def _forward(self: Any, x: Tensor) -> Tensor:
    """``forward`` of a module whose result others may compute."""
    if not _is_watched(x):
        before = before_of(self)
        if before is not None and _fits(before, x) and self.lutra_readers.take(before, x):
            return Deferred(x, before, lambda: type(self).forward(self, x))
    result: Tensor = type(self).forward(self, x)
    return result


def _fits(before: Before, x: Tensor) -> bool:
    """Whether the weights of a norm are such as the kernels take."""
    if isinstance(before, Activation):
        return True
    given = [before.weight] if before.bias is None else [before.weight, before.bias]
    return all(
        w.dtype == x.dtype and w.device == x.device and w.shape == x.shape[-1:] for w in given
    )


def _is_watched(x: Tensor) -> bool:
    """Whether something follows or changes what is done with tensors."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.device.type == "meta"
        or torch.is_autocast_enabled(x.device.type)
        or (torch.is_grad_enabled() and x.requires_grad)
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _at(parent: nn.Module, path: str) -> nn.Module | None:
    if not path:
        return None
    try:
        return parent.get_submodule(path)
    except AttributeError:
        return None
