"""What a quantized model costs: perplexity, divergence from the original, tasks, size, report."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lutra.evaluate.measure import evaluate
from lutra.evaluate.report import report, write_report
from lutra.evaluate.size import ModelSize, measure_size

__all__ = ["ModelSize", "evaluate", "measure_size", "report", "write_report"]


class _Verb(ModuleType):
    """``lutra.evaluate`` is this package once it is imported, and stays the verb it was before."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
