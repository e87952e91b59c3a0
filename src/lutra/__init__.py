"""Lutra: low-bit large language models, made from a Hugging Face checkpoint and run fast.

    import lutra

    lutra.quantize("my-model", "my-model-3bit", method="lut-gemm", bits=3, calibration="text.txt")
    model, tokenizer = lutra.load("my-model-3bit")

Importing lutra imports no model library and no compiler. It sees to it that transformers, once
imported, knows the checkpoints that lutra writes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lutra.integrations.hook import register_when_loaded

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lutra.api import evaluate, generate, load, quantize
    from lutra.scheme import Format, Scheme

_HOMES = {
    "evaluate": "lutra.api",
    "generate": "lutra.api",
    "load": "lutra.api",
    "quantize": "lutra.api",
    "Format": "lutra.scheme",
    "Scheme": "lutra.scheme",
}

__all__ = ["Format", "Scheme", "evaluate", "generate", "load", "quantize"]

register_when_loaded()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lutra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
