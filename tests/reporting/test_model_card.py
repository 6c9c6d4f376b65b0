"""The model card says what was done, with a header that model hubs read."""

from __future__ import annotations

from dataclasses import replace

import yaml

from shape_moe.reporting.model_card import CardFacts, render_card
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.units import readable_size
from support.data import synthetic_trace


def facts(**changes) -> CardFacts:
    trace = synthetic_trace()
    trace = replace(
        trace, info=replace(trace.info, source={"data": "tasks.jsonl"}, tokens={"prompt": 1200, "response": 34})
    )
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    entries = {"model": "org/model", "bytes_before": 2 * 2**30, "bytes_after": 2**30, "selection": selection}
    return CardFacts(**{**entries, "target": "ragged", "trace": trace, **changes})


def test_header_is_yaml() -> None:
    header = yaml.safe_load(render_card(facts()).split("---")[1])
    assert header["base_model"] == "org/model"
    assert header["pipeline_tag"] == "text-generation"
    assert "expert-pruning" in header["tags"]
    local = yaml.safe_load(render_card(facts(model="/data/model")).split("---")[1])
    assert "base_model" not in local


def test_facts_are_told() -> None:
    card = render_card(facts())
    for text in (
        "Method: shape/coverage, drop, ragged, 200 calibration examples (not the published SHAPE method).",
        "org/model (3 layers of 8 experts): 50 % smaller, from 2.00 GiB to 1.00 GiB; 12 of 24 experts kept.",
        "Keep rate: 50 % (50 % asked).",
        "2.00 GiB | 1.00 GiB (50 %)",
        "`shape`",
        "`coverage` with alpha",
        "`drop`",
    ):
        assert text in card
    assert "200 examples of `tasks.jsonl` (1,200 prompt and 34 response tokens)" in card
    assert "import shape_moe" in card
    assert "trust_remote_code=True" in card
    assert "2606.09886" in card


def test_stock_checkpoints_need_no_package() -> None:
    card = render_card(facts(target="stock"))
    assert "import shape_moe" not in card
    assert "Qwen3MoeForCausalLM" in card


def test_warnings_and_missing_traces() -> None:
    selection = replace(facts().selection, warnings=("Something to know.",), family=None, top_k=None)
    card = render_card(facts(selection=selection, trace=None))
    assert "## Warnings\n\n- Something to know." in card
    assert "Calibration:" not in card


def test_hostile_names_stay_text() -> None:
    hostile = "<img src=x onerror=alert(1)> [a](javascript:b) `c` \x1b[2J\x07\n# d_e"
    found = facts(model=f"./{hostile.replace('/', '')}")
    trace = replace(found.trace, info=replace(found.trace.info, source={"data": hostile}))
    selection = replace(
        found.selection,
        scorer=hostile,
        warnings=(hostile,),
        choice={
            "examples": 3,
            "reason": hostile,
            "split": hostile,
            "tried": [],
        },
    )
    card = render_card(replace(found, trace=trace, selection=selection))
    assert not set(card) & set("\x1b\x07")
    text = r"&lt;img src=x onerror=alert(1)&gt; \[a\](javascript:b) \`c\` \\x1b\[2J\\x07 \# d\_e"
    for line in (f"# {text}, pruned to 50 % of its experts", f"- {text}", f"held-out examples ({text})."):
        assert line in card
    code = r"``<img src=x onerror=alert(1)> [a](javascript:b) `c` \x1b[2J\x07 # d_e``"
    assert f"- Values: {code}. Rule" in card
    assert f"examples of {code} (1,200" in card
    beside = card.replace(code, "")
    assert "<" not in beside.split("## How to load it")[0]


def test_the_name_on_a_hub_is_kept_in_the_header() -> None:
    card = render_card(facts(model="some_org/my_model"))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "some_org/my_model"
    assert r"# some\_org/my\_model, pruned" in card


def test_an_alpha_above_one_says_nothing() -> None:
    plain, above = facts().selection, replace(facts().selection, alpha=1.5)
    assert f"with alpha = {plain.alpha:.4g}" in render_card(facts(selection=plain))
    assert "alpha" not in render_card(facts(selection=above))


def test_sizes_are_readable() -> None:
    assert [readable_size(n) for n in (5, 2048, 3 * 2**20, 57 * 2**30)] == ["5 B", "2.00 KiB", "3.00 MiB", "57.00 GiB"]
