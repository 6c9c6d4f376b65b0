"""What lm-eval returns becomes estimates: filters have names, and only means have scores per item."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan

import pytest

from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.task_results import TaskResult, paired_difference, task_changes, task_results


def sample(item: int, filter_name: str, **metrics) -> dict:
    hashes = {"doc_hash": f"d{item}", "prompt_hash": f"p{item}", "target_hash": f"t{item}"}
    return {**hashes, "filter": filter_name, "metrics": list(metrics), **metrics}


RESULTS = {
    "results": {
        "maths": {
            "name": "maths",
            "alias": "maths",
            "sample_len": 2,
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": 0.1,
            "exact_match,flexible": 1.0,
            "exact_match_stderr,flexible": "N/A",
            "perplexity,none": 7.0,
            "perplexity_stderr,none": 0.5,
            "f1,none": 0.5,
            "f1_stderr,none": float("nan"),
        },
        "folder": {"name": "folder", "alias": "folder", "sample_len": 2},
    },
    "versions": {"maths": 3.0, "folder": None},
    "n-shot": {"maths": 5},
    "samples": {
        "maths": [
            *(sample(i, "strict", exact_match=float(i)) for i in range(2)),
            *(sample(i, "flexible", exact_match=True) for i in range(2)),
            *(sample(i, "none", perplexity=-1.0, f1=(i, 1)) for i in range(2)),
        ]
    },
}


def test_metrics_filters_and_scores() -> None:
    found = task_results(RESULTS, "1.2.3")
    assert list(found) == ["maths"]
    result = found["maths"]
    assert result.metrics == {
        "exact_match,strict": Estimate(0.5, 0.5 - 0.196, 0.5 + 0.196),
        "exact_match,flexible": Estimate(1.0, nan, nan),
        "perplexity": Estimate(7.0, 7.0 - 0.98, 7.0 + 0.98),
        "f1": Estimate(0.5, nan, nan),
    }
    assert result.scores == {"exact_match,strict": (0.0, 1.0), "exact_match,flexible": (1.0, 1.0)}
    assert (result.items, len(result.item_hashes), result.num_fewshot) == (2, 2, 5)
    assert (result.lm_eval_version, result.task_version) == ("1.2.3", "3.0")
    assert result.to_document()["f1"] == {"value": 0.5, "low": None, "high": None}


def test_items_are_told_apart_by_document_prompt_and_target() -> None:
    first = task_results(RESULTS, "1")["maths"]
    for part in ("doc_hash", "prompt_hash", "target_hash"):
        changed = [
            {**entry, part: "other"} if entry["filter"] == "strict" else entry for entry in RESULTS["samples"]["maths"]
        ]
        other = task_results({**RESULTS, "samples": {"maths": changed}}, "1")["maths"]
        assert not set(first.item_hashes) & set(other.item_hashes)
        assert first.task_hash != other.task_hash


def test_changes_are_of_the_metrics_that_both_results_have_by_item() -> None:
    dense = task_results(RESULTS, "1")["maths"]
    other = replace(dense, scores={**dense.scores, "f1": (0.0, 1.0), "exact_match,strict": (1.0, 1.0)})
    found = task_changes(other, dense, seed=3)
    assert set(found) == {"exact_match,strict", "exact_match,flexible"}  # f1 has no score by item in the dense result
    for metric, estimate in found.items():
        assert estimate == paired_difference(dense, other, metric, seed=3)
    assert found["exact_match,strict"].value == 0.5
    assert found["exact_match,flexible"] == Estimate(0, 0, 0)


def test_what_has_no_items_has_no_changes_and_other_items_are_refused() -> None:
    dense = task_results(RESULTS, "1")["maths"]
    group = replace(dense, item_hashes=(), scores={})
    assert task_changes(group, group, seed=0) == {}
    with pytest.raises(UsageError, match="not of the same items"):
        task_changes(replace(dense, item_hashes=("x", "y")), dense, seed=0)


def test_a_result_with_its_items_outlives_json() -> None:
    result = task_results(RESULTS, "1")["maths"]
    again = TaskResult.from_items(json.loads(json.dumps(result.to_items())))
    assert again.scores == result.scores
    assert again.to_document() == result.to_document()
    assert replace(again, metrics=result.metrics) == result  # an unknown end, NaN, is not equal to itself
    assert not again.metrics["f1"].has_interval
