"""Scores of lm-evaluation-harness tasks with their intervals, and the paired difference of two models."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Bootstrap, Estimate
from shape_moe.evaluation.measures import Figures, figures_of

_NORMAL_95 = 1.96
_SAME_MEAN = 1e-9


@dataclass(frozen=True)
class TaskResult:
    """What a model scored at one task, or at a group of tasks.

    Attributes:
        task: its name.
        metrics: by name; one that belongs to a filter is ``metric,filter``.
        items: number of items.
        num_fewshot: examples in the prompt, None where the tasks of a group differ.
        lm_eval_version: version of lm-evaluation-harness.
        task_version: version of the task, as its author counts.
        task_hash: sha256 over documents, prompts and targets; None for a group.
        item_hashes: one hash per item, over document, prompt and target; empty for a group.
        scores: by metric, one score per item; only metrics that are the mean of their scores are here.
    """

    task: str
    metrics: dict[str, Estimate]
    items: int
    num_fewshot: int | None
    lm_eval_version: str
    task_version: str | None
    task_hash: str | None = None
    item_hashes: tuple[str, ...] = field(default=(), repr=False)
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def to_document(self) -> dict[str, dict[str, float | None]]:
        """The metrics as a JSON object."""
        return {name: estimate.to_document() for name, estimate in self.metrics.items()}

    @classmethod
    def from_document(cls, task: str, metrics: Mapping[str, Any], items: int) -> TaskResult:
        """The result as a document describes it: without what pairing with another result needs."""
        return cls(task, figures_of(metrics), items, num_fewshot=None, lm_eval_version="", task_version=None)

    def to_items(self) -> dict[str, Any]:
        """Everything, the scores of single items too, for JSON: what pairing with another result later needs."""
        return asdict(self)

    @classmethod
    def from_items(cls, found: Mapping[str, Any]) -> TaskResult:
        """The result that :meth:`to_items` took apart."""
        return cls(
            **{
                **found,
                "metrics": {name: Estimate(**estimate) for name, estimate in found["metrics"].items()},
                "item_hashes": tuple(found["item_hashes"]),
                "scores": {name: tuple(scores) for name, scores in found["scores"].items()},
            }
        )


def task_changes(result: TaskResult, dense: TaskResult, *, seed: int) -> Figures:
    """Paired differences to the dense model, as :func:`paired_difference` makes them, for all metrics that allow it.

    Args:
        result: what a model scored.
        dense: what the dense model scored at the same task.
        seed: draws the bootstrap samples, the same for every metric.

    Returns:
        Differences of the metrics for which both results have a score per item.

    Raises:
        UsageError: when the items differ.
    """
    shared = [metric for metric in result.scores if metric in dense.scores]
    if not shared:
        return {}
    _check_same_items(dense, result)
    draws = Bootstrap(len(result.item_hashes), seed)
    return {metric: _difference(dense, result, metric, draws) for metric in shared}


def paired_difference(dense: TaskResult, other: TaskResult, metric: str, *, seed: int) -> Estimate:
    """How much higher (or lower) a model scores than the dense model at the same items.

    Args:
        dense: what the dense model scored.
        other: what the other model scored.
        metric: a key of :attr:`TaskResult.scores`.
        seed: draws the bootstrap samples.

    Returns:
        The mean of ``other - dense`` over items, with the percentile interval of a paired bootstrap over items.

    Raises:
        UsageError: when the items differ, or the metric has no score per item.
    """
    _check_same_items(dense, other)
    for result in (dense, other):
        if metric not in result.scores:
            known = f"{', '.join(result.scores) or 'none'} of its metrics"
            raise UsageError(f"Task {result.task} has no score per item for {metric!r}; it has them for {known}.")
    return _difference(dense, other, metric, Bootstrap(len(dense.item_hashes), seed))


def _difference(dense: TaskResult, other: TaskResult, metric: str, draws: Bootstrap) -> Estimate:
    differences = np.asarray(other.scores[metric]) - np.asarray(dense.scores[metric])
    return draws.ratio(differences, np.ones(len(differences)))


def _check_same_items(dense: TaskResult, other: TaskResult) -> None:
    if dense.task != other.task:
        raise UsageError(f"Task {dense.task} cannot be compared with task {other.task}.")
    if not dense.item_hashes or not other.item_hashes:
        raise UsageError(f"{dense.task} was kept without its items, so there is nothing to pair.")
    if dense.item_hashes != other.item_hashes:
        common = len(set(dense.item_hashes) & set(other.item_hashes))
        raise UsageError(
            f"The two results of task {dense.task} are not of the same items ({len(dense.item_hashes)} and "
            f"{len(other.item_hashes)}, {common} of them in common); run both models with the same task, limit, "
            "few-shot examples, chat template and seed."
        )


def task_results(results: Mapping[str, Any], lm_eval_version: str) -> dict[str, TaskResult]:
    """What lm-eval's ``evaluate`` returned, by task and by group; groups that aggregate nothing are left out.

    Args:
        results: the object that ``evaluate`` returned.
        lm_eval_version: version of lm-evaluation-harness.
    """
    found = {}
    for task, entry in results["results"].items():
        metrics = _metrics(entry)
        if not metrics:
            continue
        samples = results.get("samples", {}).get(task, [])
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        version = results["versions"].get(task)
        found[task] = TaskResult(
            task=task,
            metrics=metrics,
            items=int(entry["sample_len"]),
            num_fewshot=_as_count(results["n-shot"].get(task)),
            lm_eval_version=lm_eval_version,
            task_version=None if version in (None, "Yaml") else str(version),  # lm-eval's word for none
            task_hash=_sha256("".join(map(_content, samples))) if samples else None,
            item_hashes=tuple(_sha256(_content(sample))[:16] for sample in first),
            scores=_scores(metrics, samples, len(first)),
        )
    return found


def _metrics(entry: Mapping[str, Any]) -> dict[str, Estimate]:
    metrics = {}
    for key, value in entry.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = entry.get(f"{metric}_stderr,{name}")
        known = isinstance(error, int | float) and math.isfinite(error)
        reach = _NORMAL_95 * float(error) if known else 0.0  # type: ignore[arg-type]  # a number where known
        low, high = (float(value) - reach, float(value) + reach) if known else (math.nan, math.nan)
        metrics[_label(metric, name)] = Estimate(float(value), low, high)
    return metrics


def _scores(
    metrics: Mapping[str, Estimate], samples: Sequence[Mapping[str, Any]], items: int
) -> dict[str, tuple[float, ...]]:
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, bool | int | float | np.number):
                scores.setdefault(_label(metric, sample["filter"]), []).append(float(value))
    # a perplexity, for one, has a number per item too, but is not their mean
    return {
        name: tuple(values)
        for name, values in scores.items()
        if name in metrics
        and len(values) == items
        and math.isclose(float(np.mean(values)), metrics[name].value, rel_tol=_SAME_MEAN, abs_tol=_SAME_MEAN)
    }


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _content(sample: Mapping[str, Any]) -> str:
    return f"{sample['doc_hash']}{sample['prompt_hash']}{sample['target_hash']}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _as_count(value: Any) -> int | None:
    return value if isinstance(value, int) else None
