"""The figures of an experiment's evaluations: their names, which way is better, and where a document has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENERATED = "generated_exact_match"
EXAMPLE_METRICS = ("exact_match", GENERATED, "nll", "perplexity", "kl", "top1")
"""Figures of an evaluation by examples that a table can show."""
_TITLES = {
    "exact_match": "exact match, teacher-forced",
    GENERATED: "exact match of free answers",
    "nll": "negative log-likelihood, nats per token",
    "perplexity": "perplexity",
    "kl": "KL divergence to the dense model, nats per token",
    "top1": "same most likely token as the dense model",
}
_SHARES = ("exact_match", GENERATED, "top1")
_SMALLER_IS_BETTER = ("nll", "perplexity", "kl", "bits_per_byte", "brier", "ter", "wer", "cer", "mse", "mae")

Document = Mapping[str, Any]
Figure = Mapping[str, Any]
"""``value``, ``low`` and ``high``, of which the ends may be null."""


@dataclass(frozen=True)
class Metric:
    """A figure of one evaluation: its key, and of lm-eval's figures the task."""

    key: str
    task: str | None = None

    @property
    def smaller_is_better(self) -> bool:
        """Whether a smaller figure is a better one."""
        name = self.key.partition(",")[0]
        return name in _SMALLER_IS_BETTER or name.endswith(("perplexity", "_loss"))

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1 and is shown in percent."""
        return self.task is None and self.key in _SHARES

    @property
    def title(self) -> str:
        """What a table of it is called."""
        name = _TITLES[self.key] if self.task is None else f"{self.task}: {self.key}"
        return f"{name} ({'smaller' if self.smaller_is_better else 'larger'} is better)"

    def of(self, figures: Document | None) -> Figure | None:
        """The figure in what an evaluation found out, None where it is not there."""
        if figures is None:
            return None
        if self.task is not None:
            found = figures["tasks"].get(self.task, {}).get(self.key)
        elif self.key == GENERATED:
            found = (figures["generation"] or {}).get("exact_match")
        else:
            found = figures["quality"].get(self.key)
        return found if found is None or found["value"] is not None else None


def metrics_of(evaluation: Document, dense: Document) -> list[Metric]:
    """The figures of an evaluation that tables show."""
    if evaluation["kind"] == "examples":
        return [Metric(key) for key in evaluation["metrics"]]
    tasks = {task: figures for task, figures in dense["tasks"].items() if task == evaluation["task"]} or dense["tasks"]
    return [
        Metric(key, task)
        for task, figures in tasks.items()
        for key in figures
        if not evaluation["metrics"] or key in evaluation["metrics"]
    ]
