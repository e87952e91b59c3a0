"""Register with transformers without importing it.

transformers finds no plugins by itself, and importing it takes seconds, which ``import lutra`` must
not cost. So registration waits until transformers loads its own table of quantizers: a finder on
``sys.meta_path`` lets that one module load as usual and then adds ours to it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE_MODULE = "transformers.quantizers.auto"


def register_when_loaded() -> None:
    """Register now if transformers has its table of quantizers loaded, else when it loads it."""
    if TABLE_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterLoading) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterLoading())


def _register() -> None:
    from lutra.integrations.transformers import register

    register()


class _AfterLoading(importlib.abc.MetaPathFinder):
    """Finds nothing itself; adds a step behind the loading of one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
