"""What a quantized model costs: perplexity, divergence from the original, tasks, size, report."""

from __future__ import annotations

from lutra.evaluate.measure import evaluate
from lutra.evaluate.report import report, write_report
from lutra.evaluate.size import ModelSize, measure_size

__all__ = ["ModelSize", "evaluate", "measure_size", "report", "write_report"]
