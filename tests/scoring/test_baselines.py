"""Every baseline is what its formula says, on a traced model."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from shape_moe.calibration.batches import batches
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.scoring import registry
from shape_moe.scoring.registry import ScoreOptions, get_scorer, register, scorers
from shape_moe.scoring.scores import read_scores, score_trace
from shape_moe.tracing.token_weights import SegmentWeights
from support.data import make_examples, synthetic_trace, trace_model
from support.naive_trace import capture, expert_output
from support.tiny_models import make_model, moe_block

OPTIONS = ScoreOptions(SegmentWeights(prompt=0.25, response=2.0))


@pytest.fixture(scope="module")
def traced():
    model = make_model("qwen2_moe")  # its gate weights do not sum to one
    examples = make_examples(6, seed=1)
    return model, examples, trace_model(model, examples)


@pytest.fixture(scope="module")
def naive(traced):
    """Score tables added up token by token from the definitions."""
    model, examples, _ = traced
    rows = {
        name: [] for name in ("frequency", "gating", "gating-renormalised", "ean", "easy-ep", "sum", "sum-renormalised")
    }
    for layer in range(3):
        table = {name: np.zeros(16) for name in rows}
        for batch in batches(examples, 6, 0):
            captured = capture(model, batch)[layer]
            experts = moe_block(model.model.layers[layer]).experts
            for token, segment in enumerate(batch.segments.tolist()):
                if segment < 0:
                    continue
                factor = (0.25, 2.0)[segment]
                ids, g = captured.ids[token].tolist(), captured.gates[token].double()
                outputs = [expert_output(experts, i, captured.hidden[token]) for i in ids]
                h = captured.residual[token].double()
                y = sum(w * o for w, o in zip(g, outputs, strict=True))
                turned = 1 - float((h @ (h + y)) / (h.norm() * (h + y).norm()))
                for slot, i in enumerate(ids):
                    norm, weight = float(outputs[slot].norm()), float(g[slot])
                    table["frequency"][i] += factor
                    table["gating"][i] += factor * weight
                    table["gating-renormalised"][i] += factor * weight / float(g.sum())
                    table["ean"][i] += factor * norm
                    table["easy-ep"][i] += factor * turned * weight * norm
                    table["sum"][i] += factor * weight * norm
                    table["sum-renormalised"][i] += factor * weight / float(g.sum()) * norm
        for name, values in table.items():
            rows[name].append(values)
    tables = {name: np.array(values) for name, values in rows.items()}
    seen = tables["frequency"] > 0
    for name, source in (("reap", "sum-renormalised"), ("reap-received", "sum")):
        tables[name] = np.divide(tables[source], tables["frequency"], out=np.zeros_like(tables[source]), where=seen)
    return tables


@pytest.mark.parametrize(
    "name", ["frequency", "gating", "gating-renormalised", "ean", "easy-ep", "reap", "reap-received"]
)
def test_baseline_equals_its_formula(traced, naive, name) -> None:
    np.testing.assert_allclose(score_trace(traced[2], name, OPTIONS).values, naive[name], rtol=2e-5, atol=1e-9)


def test_reap_is_zero_for_unused_experts() -> None:
    trace = synthetic_trace(tokens=5, experts=32)
    unused = trace.sums("tokens") == 0
    assert unused.any()
    assert (score_trace(trace, "reap").values[unused] == 0).all()


def test_random_follows_its_seed_alone() -> None:
    first = score_trace(synthetic_trace(seed=0), "random", ScoreOptions(seed=3)).values
    second = score_trace(synthetic_trace(seed=1), "random", ScoreOptions(seed=3)).values
    other = score_trace(synthetic_trace(seed=0), "random", ScoreOptions(seed=4)).values
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_documentation_says_what_is_computed() -> None:
    for name, scorer in scorers().items():
        text = scorer.function.__doc__
        assert all(word in text for word in ("Args:", "Returns:", "float64 [L, E]")), name
        assert scorer.summary.endswith((".", "`."))


@pytest.fixture
def fresh_registry(monkeypatch):
    """Scorers that a test registers are gone afterwards."""
    scorers()
    again = copy.deepcopy(registry._SCORERS)
    monkeypatch.setattr(registry, "_SCORERS", again)
    return again


def test_collisions_are_refused(fresh_registry) -> None:
    def mine(trace, options):
        return trace.sums("tokens")

    with pytest.raises(UsageError, match=r"Two scorers are called 'shape'.*scoring\.shape"):
        register("shape", needs=())(mine)
    register("mine", needs=("tokens",))(mine)
    register("mine", needs=("tokens",))(mine)
    trace = synthetic_trace()
    assert np.array_equal(score_trace(trace, "mine").values, trace.sums("tokens"))


def test_scorers_say_how_many_experts_per_token_they_need(fresh_registry) -> None:
    assert [name for name, scorer in scorers().items() if not scorer.can_value(1)] == ["shape"]
    assert get_scorer("shape").can_value(2)
    register("threes", needs=(), least_top_k=3)(lambda trace, options: np.zeros((3, 8)))
    assert [get_scorer("threes").can_value(top_k) for top_k in (1, 2, 3, 4)] == [False, False, True, True]


def test_unknown_scorers_and_wrong_results(fresh_registry) -> None:
    with pytest.raises(UsageError, match="no scorer 'best'.*shape"):
        get_scorer("best")
    register("bad", needs=())(lambda trace, options: np.full((3, 8), np.nan))
    with pytest.raises(ShapeMoeError, match="finite numbers"):
        score_trace(synthetic_trace(), "bad")


def test_tables_round_trip(tmp_path) -> None:
    scores = score_trace(synthetic_trace(), "shape")
    file = tmp_path / "values.csv"
    scores.table().write_csv(file)
    assert file.read_text().splitlines()[0] == "Layer,Expert_ID,Total_Activations,Shapley_Value"
    loaded = read_scores(file)
    np.testing.assert_array_equal(loaded.values, scores.values)
    np.testing.assert_array_equal(loaded.activations, scores.activations)
    assert loaded.layers == scores.layers


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Layer,Expert_ID\n0,1\n", "needs the columns"),
        ("Layer,Expert_ID,Total_Activations,Shapley_Value\n", "no rows"),
        ("Layer,Expert_ID,Total_Activations,Shapley_Value\n0,0,1,x\n", "number in each"),
        ("Layer,Expert_ID,Total_Activations,Shapley_Value\n0,0,1,\n", "number in each"),
        ("Layer,Expert_ID,Total_Activations,Shapley_Value\n0,0,1,1\n1,0,1,1\n1,1,1,1\n", "each of the 2 experts"),
        ("Layer,Expert_ID,Total_Activations,Shapley_Value\n0,0,1,inf\n0,1,1,2\n", "finite"),
        ("", "not a table"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, word) -> None:
    file = tmp_path / "values.csv"
    file.write_text(text)
    with pytest.raises(ShapeMoeError, match=word):
        read_scores(file)


def test_missing_table_is_named(tmp_path) -> None:
    with pytest.raises(ShapeMoeError, match="no file"):
        read_scores(tmp_path / "none.csv")
