"""Selections of one set of examples, traced with other threads and batch sizes: equal but for named near-ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shape_moe
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.scoring.registry import scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.near_ties import rounding_of
from shape_moe.selection.rules import rules
from shape_moe.selection.select import SelectOptions, TraceSelector
from support.data import write_lines


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def traces(request, embedded, tmp_path_factory):
    data = write_lines(tmp_path_factory.mktemp("data") / "d.jsonl", examples("sorting", 40, seed=5))
    threads, found = torch.get_num_threads(), []
    try:
        for count, size in ((2, 8), (1, 8), (1, 1), (2, 3)):
            torch.set_num_threads(count)
            answers = AnswerOptions(batch_size=size)
            options = shape_moe.ExampleOptions(
                DataOptions(str(data)), answers=answers, device="cpu", dtype=request.param
            )
            found.append(shape_moe.trace(embedded, options))
    finally:
        torch.set_num_threads(threads)
    return found


def test_selections_are_equal_but_for_named_near_ties(traces) -> None:
    selectors = [TraceSelector(trace) for trace in traces]
    for scorer in scorers():
        for rule in rules():
            for keep in (0.8, 0.6, 0.4, 0.25):
                options = SelectOptions(keep, Method(scorer, rule))
                first, *others = (selector.select(options) for selector in selectors)
                assert first.near_ties is not None
                near = np.zeros_like(first.mask())
                for row, layer in enumerate(first.layers):
                    near[row, first.near_ties.get(layer, [])] = True
                for other in others:
                    assert not ((first.mask() != other.mask()) & ~near).any(), (scorer, rule, keep)


def test_values_move_by_less_than_the_bound(traces) -> None:
    for name in scorers():
        first, *others = (score_trace(trace, name).values for trace in traces)
        for other in others:
            assert (np.abs(other - first) <= rounding_of(traces[0].info.dtype) * np.abs(first)).all(), name


def test_near_ties_are_few(traces) -> None:
    """A bound that names half the experts would say nothing."""
    chosen = [TraceSelector(traces[0]).select(SelectOptions(0.6, Method(scorer))) for scorer in ("shape", "easy-ep")]
    assert all(sum(map(len, (selection.near_ties or {}).values())) <= 6 for selection in chosen)
