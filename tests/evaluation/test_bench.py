"""The bench: what it measures, classes where they are asked for, ties, and what it keeps while it judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shape_moe.evaluation import bench as module
from shape_moe.evaluation import measures
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.comparison import POINTS_FILE
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.faithfulness import faithfulness
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.measures import Figures
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.pruning.masks import masked
from shape_moe.scoring.scores import Scores
from support.held_out import task_set
from support.interruptions import stopped_after
from support.selections import seven_of_eight

COUNT = 12


@pytest.fixture
def bench_of(embedded_model):
    """Benches of the embedded model."""
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "addition", COUNT)

    def make(**options) -> Bench:
        return Bench(model, tokenizer, held_out, generation=GenerationOptions(5, 4), **options)

    return make


def wider(ours: Figures, theirs: Figures) -> bool:
    return all(ours[name].high - ours[name].low > theirs[name].high - theirs[name].low for name in theirs)


def test_every_interval_holds_for_all_candidates(bench_of) -> None:
    found = []
    for comparisons in (1, 16):
        bench = bench_of(comparisons=comparisons)
        found.append((bench.judge(seven_of_eight()), bench.dense()))
    (one, own), (many, own_of_many) = found
    assert wider({"kl": many.quality["kl"]}, {"kl": one.quality["kl"]})
    for few, more in ((one.health, many.health), (own.health, own_of_many.health)):
        assert wider(
            {name: more.figures[name] for name in ("loop_rate", "no_end_rate", "exact_match")},
            {name: few.figures[name] for name in ("loop_rate", "no_end_rate", "exact_match")},
        )


def test_the_dense_model_is_at_no_distance_from_itself(embedded_model, bench_of) -> None:
    model, _ = embedded_model
    bench = bench_of()
    own, again = bench.dense(), bench.judge(model)
    assert own.change == {}
    assert again.quality["nll"].value == pytest.approx(own.quality["nll"].value, rel=1e-5)
    assert again.quality["kl"].value < 1e-6 * own.quality["nll"].value
    assert (again.quality["top1"].value, again.change["exact_match"].value) == (1.0, 0.0)
    assert again.health.change["exact_match"].value == 0.0
    assert again.health.complaints == ()


def test_a_mask_is_judged_as_the_masked_model_is(embedded_model, bench_of) -> None:
    model, _ = embedded_model
    bench, selection = bench_of(), seven_of_eight()
    with masked(model, selection):
        live = bench.judge(model)
    assert bench.judge(selection) == live
    assert bench.judge(selection, freely=False) == replace(live, health=None)


def test_classes_are_judged_only_where_they_are_asked_for(bench_of, monkeypatch) -> None:
    bench = bench_of()
    whole, asked = stopped_after(100, measures.by_group)
    monkeypatch.setattr(measures, "by_group", whole)
    measured = bench.judge(seven_of_eight())
    assert not asked
    classes = bench.by_group(bench.sums(seven_of_eight()))
    assert classes == {"addition": {"quality": measured.quality, "change": measured.change}}


def test_what_the_dense_model_said_goes_when_the_bench_is_closed(bench_of, monkeypatch) -> None:
    monkeypatch.setattr(module, "DenseReference", lambda: DenseReference(memory_limit=0))
    with bench_of() as bench:
        folder = Path(bench.reference._folder.name)
        assert list(folder.iterdir())
    assert not folder.exists()


def test_the_dense_model_can_go_before_others_are_judged(embedded_model, bench_of) -> None:
    model, _ = embedded_model
    bench = bench_of()
    dense = bench.dense()
    bench.unload()
    assert bench.dense() == dense
    assert bench.judge(model).health.figures == dense.health.figures


def test_a_selection_is_judged_once_and_found_by_a_later_bench(bench_of, tmp_path, monkeypatch) -> None:
    counted, runs = stopped_after(100, module.compare_with_dense)
    monkeypatch.setattr(module, "compare_with_dense", counted)
    first, selection = bench_of(folder=tmp_path), seven_of_eight()
    measured = first.judge(selection)
    renamed = replace(selection, scorer="other", keep_asked=0.9)  # keeps the same, and is routed alike
    assert first.judge(renamed) == measured
    assert len(runs) == 1
    assert len((tmp_path / POINTS_FILE).read_text().splitlines()) == 1
    assert bench_of(folder=tmp_path).judge(selection) == measured
    assert len(runs) == 1
    assert first.judge(replace(selection, routing="reroute")).quality != measured.quality
    assert len(runs) == 2


def test_answers_decide_exact_match_where_they_are_asked_to(bench_of) -> None:
    bench, selection = bench_of(by_answers=True), seven_of_eight()
    assert len(bench.dense_answers.positions) == COUNT  # all of them, not the five asked for
    assert bench.dense_sums.exact.tolist() == bench.dense_answers.exact.tolist()
    assert bench.sums(selection).exact.tolist() == bench.answers(selection).exact.tolist()


def sums_with(kl: list[float]) -> TeacherForced:
    count = len(kl)
    tokens = np.full(count, 10)
    return TeacherForced(tokens, np.zeros(count), np.array(kl), tokens, np.ones(count, dtype=bool))


@pytest.mark.parametrize(
    ("kl", "tied"),
    [
        ([1.0] * COUNT, True),
        ([1.1] * COUNT, False),  # a little worse on every example
        ([1.1, 0.9] * (COUNT // 2), True),
        ([2.0] + [1.0] * (COUNT - 1), True),  # one example alone may be luck
        ([0.9] * COUNT, True),
    ],
)
def test_ties_are_within_noise_of_the_paired_difference(bench_of, monkeypatch, kl, tied) -> None:
    bench, best = bench_of(), seven_of_eight()
    other = replace(best, routing="reroute")
    sums = {best.digest: sums_with([1.0] * COUNT), other.digest: sums_with(kl)}
    monkeypatch.setattr(bench, "sums", lambda chosen: sums[chosen.digest])
    assert bench.tied(other, best) is tied


def test_faithfulness_does_not_judge_again_what_was_judged(bench_of, monkeypatch) -> None:
    counted, runs = stopped_after(100, module.compare_with_dense)
    bench, selection, steps = bench_of(), seven_of_eight(), []
    kept = bench.judge(selection, freely=False)
    monkeypatch.setattr(module, "compare_with_dense", counted)
    layers = tuple(selection.layers)
    values = np.random.default_rng(0).random((len(layers), selection.num_experts))
    scores = Scores("t", layers, values, values)
    found = faithfulness(bench, selection, scores, name="s", advance=steps.append)
    assert found.kept == kept
    assert (len(runs), steps) == (4, [1] * 5)  # the inversion and three random ones; the selection was known
    assert faithfulness(bench_of(), selection, scores, name="s") == found
