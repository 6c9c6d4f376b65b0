"""One judge per set: its verdicts, classes where they are asked for, and what it keeps while it judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shape_moe.evaluation import judge as module
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.faithfulness import faithfulness
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.judge import Judge
from shape_moe.evaluation.measures import Figures
from shape_moe.scoring.scores import Scores
from support.held_out import task_set
from support.selections import seven_of_eight

COUNT = 12


@pytest.fixture
def judge_of(embedded_model):
    """Judges of the embedded model, by how many candidates the best is picked from."""
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "addition", COUNT)

    def make(comparisons: int = 1) -> Judge:
        options = GenerationOptions(examples=5, max_new_tokens=4)
        made = Judge(model, tokenizer, held_out, generation=options, comparisons=comparisons)
        made.answer_as_dense(model)
        return made

    return make


def wider(ours: Figures, theirs: Figures) -> bool:
    return all(ours[name].high - ours[name].low > theirs[name].high - theirs[name].low for name in theirs)


def test_every_interval_of_a_verdict_holds_for_all_candidates(embedded_model, judge_of) -> None:
    model, _ = embedded_model
    found = []
    for comparisons in (1, 16):
        judge = judge_of(comparisons)
        sums = judge.compare_masked(model, seven_of_eight())
        found.append((judge.verdict(sums, judge.answer_masked(model, seven_of_eight())), judge.dense_verdict()))
    (one, own), (many, own_of_many) = found
    assert wider({"kl": many.quality["kl"]}, {"kl": one.quality["kl"]})
    for few, more in ((one.health, many.health), (own.health, own_of_many.health)):
        assert wider(
            {name: more.figures[name] for name in ("loop_rate", "no_end_rate", "exact_match")},
            {name: few.figures[name] for name in ("loop_rate", "no_end_rate", "exact_match")},
        )


def test_classes_are_judged_only_where_they_are_asked_for(embedded_model, judge_of, monkeypatch) -> None:
    model, _ = embedded_model
    judge, asked = judge_of(), []
    original = module.measures.by_group
    monkeypatch.setattr(module.measures, "by_group", lambda *given: asked.append(given) or original(*given))
    sums = judge.compare_masked(model, seven_of_eight())
    whole = judge.verdict(sums)
    assert not asked
    classes = judge.by_group(sums)
    assert classes == {"addition": {"quality": whole.quality, "change": whole.change}}


def test_log_probabilities_go_when_the_judge_is_closed(judge_of, monkeypatch) -> None:
    monkeypatch.setattr(module, "DenseReference", lambda: DenseReference(memory_limit=0))
    judge = judge_of()
    folder = Path(judge.reference._folder.name)
    assert list(folder.iterdir())
    judge.close()
    assert not folder.exists()


def test_a_selection_that_was_judged_already_is_not_judged_again(embedded_model, judge_of, monkeypatch) -> None:
    model, _ = embedded_model
    judge, selection, judged, steps = judge_of(), seven_of_eight(), [], []
    compare = Judge.compare_masked
    monkeypatch.setattr(
        Judge, "compare_masked", lambda self, model, chosen: judged.append(chosen) or compare(self, model, chosen)
    )
    kept = judge.verdict(judge.compare_masked(model, selection))
    rng = np.random.default_rng(0)
    layers = tuple(selection.layers)
    values = rng.random((len(layers), selection.num_experts))
    scores = Scores("t", layers, values, values)
    judged.clear()
    found = faithfulness(model, judge, selection, scores, name="s", kept=kept, advance=steps.append)
    assert found.kept is kept
    assert (len(judged), steps) == (4, [1] * 4)  # the inversion and three random ones
    assert selection not in judged
    judged.clear()
    again = faithfulness(model, judge, selection, scores, name="s")
    assert judged[0] == selection
    assert (again.kept, again.inverted, again.random) == (kept, found.inverted, found.random)
