"""lm-evaluation-harness: score a loaded model on tasks whose rows are already read.

The harness's own tasks need nothing of ours: after ``import lutra`` its model type ``hf`` loads a
quantized folder, because transformers does::

    import lm_eval, lutra
    lm_eval.simple_evaluate(model="hf", model_args="pretrained=DIR", tasks=["lambada_openai"])

The command ``lm_eval`` alone imports no lutra, and stops with an error on the packed weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lutra.errors import ResourceError

if TYPE_CHECKING:
    from lutra.evaluate.tasks import Task


def require_lm_eval() -> Any:
    """The package ``lm_eval``.

    Raises:
        ResourceError: it, or what it needs to run a Hugging Face model, is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
    except ImportError as error:
        raise ResourceError(
            f"tasks are scored by lm-evaluation-harness, which can not be imported ({error}). "
            'Install it: pip install "lutra[eval]"'
        ) from error
    return lm_eval


def score(
    model: Any, tokenizer: Any, tasks: Sequence[Task], batch_size: int = 1
) -> dict[str, dict[str, Any]]:
    """Score tasks with a loaded model. See :func:`lutra.evaluate.tasks.run_tasks`."""
    lm_eval = require_lm_eval()
    from lm_eval.api.task import ConfigurableTask

    with _quiet():
        evaluated = lm_eval.evaluate(
            lm=lm_eval.models.huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size
            ),
            task_dict={task.name: ConfigurableTask(config=task_config(task)) for task in tasks},
            bootstrap_iters=0,
            log_samples=False,
        )
    scores = {}
    for task in tasks:
        found = evaluated["results"][task.name]
        row: dict[str, Any] = {"items": len(task.rows)}
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" in found:
                row[metric] = float(found[f"{metric},none"])
        # The standard error of a proportion, as the harness computes it for a mean.
        for metric in ("acc", "acc_norm"):
            if metric in row and len(task.rows) > 1:
                p = row[metric]
                row[f"{metric}_stderr"] = (p * (1 - p) / (len(task.rows) - 1)) ** 0.5
        scores[task.name] = row
    return scores


def task_config(task: Task) -> dict[str, Any]:
    """The harness's configuration of a task whose rows are already read."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(task.rows)}

    def mean(metric: str) -> dict[str, Any]:
        return {"metric": metric, "aggregation": "mean", "higher_is_better": True}

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": dataset,
        "test_split": "test",
        "num_fewshot": 0,
    }
    if task.kind == "lambada":
        word_perplexity = {
            "metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False,
        }  # fmt: skip
        return config | {
            "output_type": "loglikelihood",
            "doc_to_text": lambda row: row["context"],
            "doc_to_target": lambda row: row["target"],
            "metric_list": [word_perplexity, mean("acc")],
        }
    config |= {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda row: row["choices"],
        "metric_list": [mean("acc")],
    }
    if task.kind == "contexts":  # a number as the text tells the harness that contexts differ
        return config | {
            "doc_to_text": lambda row: row["gold"],
            "doc_to_target": lambda row: row["target"],
        }
    return config | {
        "doc_to_text": lambda row: row["context"],
        "doc_to_target": lambda row: row["gold"],
        "metric_list": [mean("acc"), mean("acc_norm")],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs its own tables; ours go to the report."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
