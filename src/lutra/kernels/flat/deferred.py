"""A tensor of which a norm or an activation is still to be computed.

Between a norm and the flattened layers that read it nothing else happens, and these layers can
compute the norm while they turn it into integers. So a norm may return a :class:`Deferred`: it has
the shape, dtype and device of its result, and whoever does anything with it but multiply a
flattened layer gets the result, computed then by the module itself. The same holds for the
activation of an MLP, also when it is multiplied by another tensor (``act(gate) * up``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lutra.kernels.flat.before import Activation, Before


class Deferred(Tensor):
    """What ``before`` makes of ``source``, not yet computed.

    Args:
        source: what is read; nobody may change it before this tensor is read.
        before: what is to be computed.
        compute: computes it.
    """

    source: Tensor
    before: Before
    _compute: Callable[[], Tensor]
    _value: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Deferred], source: Tensor, before: Before, compute: Callable[[], Tensor]
    ) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=source.dtype, device=source.device
        )
        made.source, made.before, made._compute, made._value = source, before, compute, None
        return made

    @property
    def is_computed(self) -> bool:
        """Whether somebody has asked for the value."""
        return self._value is not None

    def value(self) -> Tensor:
        """The tensor, computed at most once."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({self.before}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mul.Tensor:
            times = _times(*args)
            if times is not None:
                return times
        args, kwargs = tree_map_only(Deferred, lambda t: t.value(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _times(a: Any, b: Any) -> Deferred | None:
    """The product of an activation that nobody has computed and a plain tensor, as one more."""
    if not isinstance(a, Deferred):
        a, b = b, a
    if not isinstance(a, Deferred) or isinstance(b, Deferred) or a.is_computed:
        return None
    if not isinstance(a.before, Activation) or a.before.times is not None:
        return None
    if not isinstance(b, Tensor) or (b.shape, b.dtype, b.device) != (a.shape, a.dtype, a.device):
        return None
    return Deferred(a.source, Activation(a.before.name, b), lambda: a.value() * b)
