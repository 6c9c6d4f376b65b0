"""What verbs write is read back as it was: every field, and nothing beside it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.evaluation.evaluated import Chosen, Evaluated, Evaluation, read_evaluation
from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.footprint import Footprint
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.keep_rate import Limit, Point, SweptPoint
from shape_moe.evaluation.measures import Health, Measured
from shape_moe.evaluation.swept import Sweep, read_sweep
from shape_moe.evaluation.task_results import TaskResult
from shape_moe.made_with import MadeWith
from shape_moe.selection.method import Method
from shape_moe.selection.selection import Selection

RELEASED = Path(__file__).parent / "released"
"""Documents that version 0.1.0 wrote about the embedded model."""

names = st.text(min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)
estimates = st.builds(Estimate, numbers, numbers, numbers)
figures = st.dictionaries(st.sampled_from(["nll", "perplexity", "kl", "top1", "exact_match"]), estimates)
answers = st.dictionaries(st.sampled_from(["loop_rate", "no_end_rate", "length", "exact_match"]), estimates, min_size=1)
healths = st.builds(Health, answers, figures, st.integers(1, 4096), st.lists(names).map(tuple))
verdicts = st.builds(Measured, figures, figures, st.none() | healths)
controls = st.builds(Measured, figures.filter(lambda found: "kl" in found), figures)
made = st.builds(MadeWith, st.none() | st.integers(0, 2**32), st.dictionaries(names, names), names)
routings = st.sampled_from(["drop", "reroute"])
combinations = st.builds(Method, names, names, routings, st.sampled_from(["ragged", "stock"]))
truths = st.none() | st.booleans()
points = st.builds(SweptPoint, combinations, numbers, numbers, counts, st.none() | counts, verdicts, truths, truths)
footprints = st.builds(Footprint, names, names, numbers, counts, numbers, numbers, st.dictionaries(names, counts))
tasks = st.dictionaries(names, st.tuples(st.dictionaries(names, estimates), counts), max_size=2).map(
    lambda found: {name: TaskResult(name, metrics, items, None, "", None) for name, (metrics, items) in found.items()}
)
groups = st.dictionaries(
    names,
    st.fixed_dictionaries({"quality": figures, "change": st.builds(lambda nll: {"nll": nll}, estimates)}),
    max_size=2,
)
models = st.builds(
    Evaluated,
    names,
    st.sampled_from(["dense", "mask", "checkpoint"]),
    st.none() | st.builds(Chosen, names, names, routings, numbers),
    st.none() | counts,
    st.dictionaries(st.sampled_from(["task", "also"]), verdicts),
    groups,
    tasks,
    st.none() | st.dictionaries(names, figures, max_size=2),
    st.none() | footprints,
)
checks = st.builds(Faithfulness, names, controls, controls, st.lists(controls, min_size=1, max_size=2).map(tuple))


def through_json(document: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(document))


@pytest.mark.parametrize(
    ("kind", "made"),
    [(Health, healths), (Measured, verdicts), (Faithfulness, checks), (Footprint, footprints), (SweptPoint, points)],
    ids=lambda entry: getattr(entry, "__name__", ""),
)
def test_parts_are_read_back(kind, made) -> None:
    @given(made)
    def check(whole: Any) -> None:
        assert kind.from_document(through_json(whole.to_document())) == whole

    check()


@given(made)
def test_how_a_document_was_made_is_read_back(whole) -> None:
    assert MadeWith.from_document(through_json({"model": "m", **whole.to_document()})) == whole


@given(st.data())
def test_a_sweep_is_read_back(data) -> None:
    found = tuple(data.draw(st.lists(points, min_size=1, max_size=3)))
    place = st.none() | st.integers(0, len(found) - 1)
    limit = st.none() | st.builds(Limit, st.sampled_from(["max_kl", "max_drop"]), st.floats(0.001, 0.999))
    source = st.dictionaries(names, names | counts, max_size=2)
    whole = data.draw(
        st.builds(
            Sweep,
            *(names, st.none() | names, names, st.integers(1, 99), source, source, limit, verdicts, st.none() | counts),
            *(st.just(found), place, place, names, made),
        )
    )
    assert Sweep.from_document(through_json(whole.to_document())) == whole


@given(st.data())
def test_an_evaluation_is_read_back(data) -> None:
    found = tuple(data.draw(st.lists(models, min_size=1, max_size=3)))
    by = data.draw(names) if any(model.classes for model in found) else None
    whole = data.draw(
        st.builds(
            Evaluation,
            *(names, st.none() | names, st.none() | names, st.none() | names, counts, st.just(by), st.just(found)),
            *(st.lists(checks, max_size=2).map(tuple), st.lists(names, unique=True).map(tuple), made),
        )
    )
    assert Evaluation.from_document(through_json(whole.to_document())) == whole


def test_an_unknown_end_is_null_and_comes_back() -> None:
    verdict = Measured({"kl": Estimate(0.5, nan, 0.75)})
    document = through_json(verdict.to_document())
    assert document["quality"] == {"kl": {"value": 0.5, "low": None, "high": 0.75}}
    read = Measured.from_document(document).quality["kl"]
    assert (read.value, isnan(read.low), read.high) == (0.5, True, 0.75)


def test_a_live_point_is_described_without_its_experts() -> None:
    chosen = Selection(None, None, None, "shape", "coverage", "drop", 4, 2, {0: [0, 1], 3: [2]}, 0.4)
    method = Method("shape", "coverage", "drop")
    point = Point(method, chosen, 1234, Measured({}), meets=True, fits=False)
    assert point.described == SweptPoint(method, 0.4, 3 / 8, 3, 1234, Measured({}), meets=True, fits=False)
    assert point.healthy is None


@pytest.mark.parametrize(("complaints", "healthy"), [((), True), (("loops",), False)])
@pytest.mark.parametrize(("meets", "fits"), [(None, None), (True, True), (False, None), (True, False)])
def test_what_speaks_against_a_point(complaints, healthy, meets, fits) -> None:
    verdict = Measured({}, health=Health({}, {}, 8, complaints))
    point = SweptPoint(Method("shape", "coverage", "drop"), 0.5, 0.5, 4, None, verdict, meets, fits)
    assert point.healthy is healthy
    assert point.good is (healthy and meets is not False and fits is not False)
    assert point.to_document()["healthy"] is healthy


def test_documents_of_the_first_release_are_read_whole() -> None:
    """Written anew, they say the same, so that nothing of them was left out; what came later is not known."""
    for file, read in (("sweep.json", read_sweep), ("evaluation.json", read_evaluation)):
        document, again = (json.loads((RELEASED / file).read_text()), through_json(read(RELEASED / file).to_document()))
        methods = [
            *again.get("points", ()),
            *(model["selection"] for model in again.get("models", ()) if model["selection"] is not None),
        ]
        assert [method.pop("gate_scale") for method in methods] == ["survivors"] * len(methods)
        assert {method.pop(name, None) for method in methods for name in ("num_layers", "num_experts")} == {None}
        assert again == document, file


def test_every_field_of_a_point_is_in_its_document() -> None:
    plain = SweptPoint(Method("a", "b", "drop"), 0.5, 0.25, 4, 100, Measured({}), meets=True, fits=True)
    changes = {
        "method": Method("a", "b", "drop", "stock"),
        "keep_asked": 0.75,
        "keep": 0.375,
        "kept": 5,
        "size": 101,
        "measured": Measured({"kl": Estimate(1.0, 0.5, 2.0)}),
        "meets": False,
        "fits": False,
    }
    assert set(changes) == {entry.name for entry in fields(SweptPoint)}
    for name, value in changes.items():
        assert replace(plain, **{name: value}).to_document() != plain.to_document(), name
