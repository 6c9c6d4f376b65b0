"""The page: complete, escaped, self-contained, readable, and the same every time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from shape_moe.evaluation.evaluated import read_evaluation
from shape_moe.evaluation.measures import Health
from shape_moe.evaluation.swept import read_sweep
from shape_moe.made_with import MadeWith
from shape_moe.reporting.html import embedded_json, plotly_script, render_report
from shape_moe.reporting.material import Material, Sizes
from shape_moe.reporting.provenance import commands
from shape_moe.reporting.summary import meaning, measured_quality, tiles, warnings
from shape_moe.reporting.theme import DARK, LIGHT
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.text import printable
from support.contrast import contrast
from support.data import routing_trace, synthetic_trace
from support.results import write_evaluation, write_sweep

HOSTILE = "<script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=1>&amp;%{x}</style>{{ 7*7 }}\x1b[2J\x07"
PRINT = "\N{NO-BREAK SPACE}"


def full_material(tmp_path, *, name: str = "org/model", keep: float = 0.6) -> Material:
    """Everything at once."""
    trace = synthetic_trace(layers=4, experts=16, top_k=3)
    trace = replace(trace, info=replace(trace.info, model=name))
    selection = select_from_trace(trace, SelectOptions(keep=keep))
    points = {"total": 64, "methods": (("shape", "coverage"),), "keeps": (0.8, keep, 0.4), "model": name}
    sweep = read_sweep(write_sweep(tmp_path, dense_bytes=10 * 2**20, fingerprint=trace.info.fingerprint, **points))
    evaluation = read_evaluation(write_evaluation(tmp_path, model=name))
    rivals = tuple(score_trace(trace, scorer) for scorer in ("shape", "reap", "contribution", "random"))
    sizes = Sizes(10 * 2**20, 6.5 * 2**20, "measured")
    return Material("traces/t", selection, rivals[0], trace, rivals, sizes, sweep, evaluation)


class Page(HTMLParser):
    """What a test wants to know about a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace(PRINT, " ").split())


def page_of(material: Material) -> tuple[str, list[str], Page]:
    text, names = render_report(material)
    return text, names, Page(text)


def test_everything_is_there(tmp_path) -> None:
    text, names, page = page_of(full_material(tmp_path))
    assert names == [
        *("sweep", "quality", "footprint", "layers", "values", "agreement", "coverage", "coalitions", "provenance")
    ]
    assert (
        "org/model (4 layers of 16 experts): 35 % smaller, from 10.00 MiB to 6.50 MiB; 38 of 64 experts kept."
        in page.words
    )
    assert "What this report could show besides" not in page.words
    assert "Evaluation's seed 0" in page.words
    assert text.count(plotly_script()[:400]) == 1
    assert page.of("html")[0]["lang"] == "en"
    plots = [a for a in page.of("div") if a.get("role") == "img"]
    assert len(plots) == 15
    assert all(len(a["aria-label"] or "") > 20 for a in plots)


def test_nothing_is_loaded_from_elsewhere(tmp_path) -> None:
    text, _, page = page_of(full_material(tmp_path))
    loaded = [a for _, a in page.tags if {"src", "href"} & set(a) and not str(a.get("href", "")).startswith("#")]
    assert loaded == []
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
    own = text.replace(plotly_script(), "")
    assert not re.search(r"https?://", own)


def test_headings_ids_and_labels_are_in_order(tmp_path) -> None:
    _, _, page = page_of(full_material(tmp_path))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.of("a")] + [a["for"] for a in page.of("label") if "for" in a]
    targets += [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(targets) <= set(ids)
    assert all(a["aria-label"] for a in page.of("button"))
    assert all(a["id"] in targets for a in page.of("select"))
    assert all(a.get("scope") for a in page.of("th"))


def test_hostile_names_stay_text(tmp_path) -> None:
    clean, _, _ = page_of(full_material(tmp_path))
    material = full_material(tmp_path, name=HOSTILE)
    points = tuple(replace(point, method=replace(point.method, scorer=HOSTILE)) for point in material.sweep.points)
    models = tuple(
        replace(model, name=HOSTILE + str(i), footprint=replace(model.footprint, device=HOSTILE))
        for i, model in enumerate(material.evaluation.models)
    )
    selection = replace(
        material.selection,
        warnings=(HOSTILE,),
        scorer=HOSTILE,
        family=HOSTILE,
        constraints={**material.selection.constraints, HOSTILE: HOSTILE},
    )
    material = replace(
        material,
        source=HOSTILE,
        selection=selection,
        sweep=replace(
            material.sweep,
            points=points,
            reason=HOSTILE,
            split=HOSTILE,
            made_with=MadeWith(0, {HOSTILE: HOSTILE}, HOSTILE),
        ),
        evaluation=replace(material.evaluation, models=models, data=HOSTILE),
        rivals=tuple(replace(entry, scorer=f"{HOSTILE}{i}") for i, entry in enumerate(material.rivals)),
    )
    text, _, page = page_of(material)
    assert [tag for tag, _ in page.tags].count("script") == clean.count("<script") - plotly_script().count("<script")
    assert page.of("img") == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert printable(HOSTILE) in "".join(page.text)
    own = text.replace(plotly_script(), "")
    assert "<script>window" not in own
    assert "<img" not in own
    assert not set(own) & set("\x1b\x07")
    assert r"\\u001b" not in own
    data = re.search(r'id="report-data">(.*?)</script>', own, re.DOTALL)[1]
    assert not set(data) & set("<>&")
    names = [trace.get("name", "") for spec in json.loads(data) for trace in spec["data"]]
    assert not any("<script" in name for name in names)  # Plotly would interpret tags
    assert any("&lt;script" in name for name in names)


def test_the_same_material_gives_the_same_page(tmp_path) -> None:
    assert render_report(full_material(tmp_path)) == render_report(full_material(tmp_path))


def test_what_several_parts_show_is_computed_once(tmp_path, monkeypatch) -> None:
    from shape_moe.reporting import material as parts
    from shape_moe.reporting.figures import co_activation, values

    calls: list[str] = []
    for module, name in (
        *((parts, name) for name in ("kept_mass", "lost_shares")),
        *((values, name) for name in ("shares", "layer_ranks")),
        (co_activation, "expected_together"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=original: (calls.append(f.__name__), f(*args))[1])
    render_report(full_material(tmp_path))
    assert {name: calls.count(name) for name in calls} == {
        **dict.fromkeys(("kept_mass", "lost_shares", "shares", "layer_ranks"), 1),
        "expected_together": 4,
    }


def test_what_is_missing_says_what_would_add_it(tmp_path) -> None:
    whole = full_material(tmp_path)
    _, names, page = page_of(Material("values.csv", scores=replace(whole.scores, scorer="table")))
    assert names == ["values", "coverage", "provenance"]
    for command in (
        "shape-moe select values.csv --keep 0.8 -o selection.json",
        "shape-moe trace MODEL --data TASK.jsonl -o TRACE",
        "shape-moe sweep MODEL --trace TRACE -o SWEEP",
        "shape-moe report values.csv --sweep SWEEP",
        "shape-moe evaluate MODEL PRUNED",
    ):
        assert command in page.words
    _, names, page = page_of(Material("DIR", selection=whole.selection))
    assert names == ["layers", "values", "provenance"]
    assert "coloured experts are kept" in page.words
    _, names, _ = page_of(Material("SWEEP", sweep=whole.sweep))
    assert names == ["sweep", "provenance"]
    _, names, _ = page_of(Material("TRACE", trace=whole.trace, scores=whole.scores, rivals=whole.rivals[:1]))
    assert names == ["values", "coverage", "coalitions", "provenance"]
    without = replace(whole.evaluation, models=tuple(replace(m, footprint=None) for m in whole.evaluation.models))
    _, names, _ = page_of(Material("TRACE", selection=whole.selection, evaluation=without))
    assert names == ["sizes", "quality", "layers", "values", "provenance"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", "org/name"),
        ("/models/Qwen3/", "Qwen3"),
        ("./Qwen3", "Qwen3"),
        ("C:\\models\\Qwen3", "Qwen3"),
        ("/models/demo/model", "demo/model"),
        ("model", "model"),
        (None, "values.csv"),
    ],
)
def test_the_heading_names_the_model(model: str | None, name: str) -> None:
    assert Material("/tables/values.csv", given_model=model).model_name == name


def test_summary_tells_sizes_value_quality_and_stability(tmp_path) -> None:
    material = full_material(tmp_path)
    found = {tile.label: tile for tile in tiles(material)}
    assert found["Experts kept"].value == "38 of 64"
    assert found["Experts kept"].share == 38 / 64
    assert found["Weights"].value.replace(PRINT, " ") == "10.00 → 6.50 MiB"
    assert found["Weights"].share == 0.65
    assert found["Value kept"].share == pytest.approx(
        sum(material.selection.mass_kept.values()) / len(material.selection.mass_kept)
    )
    assert found["KL to the dense model"].value == "0.13"
    assert found["Halves agree"].share == material.selection.stability["agreement"]
    told = " ".join(meaning(material)).replace(PRINT, " ")
    assert "26 experts leave the model for good" in told
    assert "That frees 3.50 MiB, 35.0 % of the weights." in told
    assert "KL to the dense model 0.13 [0.11, 0.16]" in told
    small = Material("s", material.selection, sizes=Sizes(2**31, 2**29, "measured"))
    assert tiles(small)[1].value.replace(PRINT, " ") == "2.00 GiB → 512.00 MiB"


def test_without_measurements_nobody_is_told_that_it_is_good(tmp_path) -> None:
    whole = full_material(tmp_path)
    material = replace(whole, sweep=None, evaluation=None)
    assert measured_quality(material) is None
    assert "Nothing here says how good the pruned model is" in meaning(material)[-1]
    by_evaluation = replace(whole, sweep=None)
    measured, where = measured_quality(by_evaluation)
    models = whole.evaluation.models
    assert measured == models[1].sets["task"]
    assert where == "Measured on gsm8k-test.jsonl."
    smaller = tuple(replace(m, selection=replace(m.selection, keep=0.5) if m.selection else None) for m in models)
    another = replace(by_evaluation, evaluation=replace(whole.evaluation, models=smaller))
    assert measured_quality(another) is None


def test_warnings_are_prominent(tmp_path) -> None:
    material = full_material(tmp_path, keep=0.4)
    material = replace(
        material, selection=replace(material.selection, warnings=("Beware of this.",)), remarks=("And this.",)
    )
    found = warnings(material)
    assert found[-2:] == ["Beware of this.", "And this."]
    assert any("does not meet the limit" in text for text in found)
    nothing = replace(material.sweep, recommended=None, reason="None is within the limit")
    assert "The sweep recommends no selection. None is within the limit." in warnings(replace(material, sweep=nothing))
    unhealthy = Health({}, {}, 64, ("answers loop",))
    points = tuple(
        replace(p, measured=replace(p.measured, health=unhealthy), fits=False, meets=True)
        for p in material.sweep.points
    )
    found = warnings(replace(material, sweep=replace(material.sweep, points=points)))
    assert any("loop" in text for text in found)
    assert any("does not fit" in text for text in found)
    noted = replace(material, evaluation=replace(material.evaluation, notes=("Few examples.",)))
    assert "Few examples." in warnings(noted)
    text, _, page = page_of(material)
    assert text.index('class="warnings"') < text.index('class="meaning"')
    assert "Beware of this." in page.words


def test_a_sweep_names_the_smallest_selection_that_is_not_recommended(tmp_path) -> None:
    sweep = full_material(tmp_path).sweep
    place = sweep.smallest_within_limit
    assert place == sweep.recommended
    told = f"smallest selection within the limit keeps {100 * sweep.points[place].keep:.1f} %"
    assert told not in page_of(Material("s", sweep=sweep))[2].words
    for another in (None, place - 1):
        words = page_of(Material("s", sweep=replace(sweep, recommended=another)))[2].words
        assert f"{told} of the experts ({sweep.points[place].method})." in words
    assert (
        "smallest selection within the limit"
        not in page_of(Material("s", sweep=replace(sweep, recommended=None, smallest_within_limit=None)))[2].words
    )


def test_commands_give_the_artifacts_again(tmp_path) -> None:
    trace = synthetic_trace(layers=4, experts=16, top_k=3)
    source = {
        "data": "my data.jsonl",
        "split": "train",
        "samples": 25,
        "seed": 3,
        "content_hash": "sha256:1",
        "template": False,
        "max_new_tokens": 64,
        "answers_from": "http://h/v1",
        "template_args": {"thinking": False},
        "max_length": 99,
        "fields": {"prompt": "the question", "response": "answer"},
    }
    trace = replace(trace, info=replace(trace.info, model="org/model", source=source))
    fixed = {"multiple_of": 4, "allow_rounding": True, "skip_layers": (1,), "protect": {2: (0, 5)}}
    selection = select_from_trace(trace, SelectOptions(0.55, Method("reap"), **fixed))
    made = commands(Material("t", selection, score_trace(trace, "reap"), trace))
    assert made == [
        "shape-moe trace org/model --data 'my data.jsonl' --samples 25 --seed 3 --max-length 99 "
        "--map 'prompt=the question' --map response=answer --max-new-tokens 64 "
        "--responses-from http://h/v1 --template-arg thinking=false --no-template -o trace",
        "shape-moe select trace --keep 0.55 --scorer reap --rule coverage --routing drop --skip-layers 1 "
        "--protect 2:0,5 --multiple-of 4 --allow-rounding -o selection.json",
        "shape-moe prune org/model --selection selection.json -o pruned",
    ]
    merged = replace(trace.info, source={"merged": [{"weight": 1.0, **source}, {"weight": 2.0, **source}]})
    made = commands(Material("t", trace=replace(trace, info=merged)))
    assert made[-1] == "shape-moe merge trace-1 trace-2 --weight 1 --weight 2 -o trace"
    several = {
        "data": "a + b",
        "sources": ["a", "b"],
        "weights": [2.0, 1.0],
        "turns": "last",
        "content_hash": "sha256:1",
    }
    made = commands(Material("t", trace=replace(trace, info=replace(trace.info, source=several))))
    assert made == ["shape-moe trace org/model --data a --data b --weight 2 --weight 1 --turns last -o trace"]
    memory = replace(trace.info, source={**source, "in_memory": True})
    assert commands(Material("t", trace=replace(trace, info=memory))) == []
    converted = replace(trace.info, source={"data": "responses.jsonl"})
    assert commands(Material("t", trace=replace(trace, info=converted))) == []


def test_the_printed_trace_command_reads_the_same_records(tmp_path, embedded) -> None:
    import shlex

    from shape_moe.cli.main import run
    from shape_moe.demo.tasks import examples
    from shape_moe.tracing.trace import load_trace

    rows = [{"the question": row["prompt"], "answer": row["response"]} for row in examples("addition", 12, seed=0)]
    data, first, again = tmp_path / "my data.jsonl", tmp_path / "first", tmp_path / "trace"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = ["--samples", "4", "--seed", "5", "--map", "prompt=the question", "--map", "response=answer"]
    assert run(["trace", str(embedded), "--data", str(data), *drawn, "-o", str(first), "--device", "cpu", "-q"]) == 0
    (made,) = commands(Material("first", trace=load_trace(first)))
    words = [str(again) if word == "trace" and place > 1 else word for place, word in enumerate(shlex.split(made))]
    assert run([*words[1:], "--device", "cpu", "-q"]) == 0
    found = [load_trace(folder).info.source for folder in (first, again)]
    salted = ("salt", "prompts")  # hashes of the same prompts, with a salt of each trace's own
    assert len(found[0]["prompts"]) == len(found[1]["prompts"]) == 4
    first_source, second_source = ({k: v for k, v in source.items() if k not in salted} for source in found)
    assert first_source == second_source
    assert len(found[0]["records"]) == 4


@pytest.mark.parametrize(
    ("source", "split", "shown"),
    [("org/data", "train", False), ("org/data", "test", True), ("preset:gsm8k", "train", True)],
)
def test_a_split_is_printed_where_it_is_not_the_default(source: str, split: str, shown: bool) -> None:
    trace = synthetic_trace()
    info = replace(trace.info, source={"data": source, "split": split, "content_hash": "sha256:1"})
    (made,) = commands(Material("t", trace=replace(trace, info=info)))
    assert (f"--split {split}" in made) is shown


def test_a_trace_drawn_beside_held_out_examples_has_no_command_but_says_so(tmp_path) -> None:
    trace, sentence = synthetic_trace(), "12 of 40 records calibrate, 28 others judge; seed 3"
    source = {"data": "tasks.jsonl", "samples": 12, "content_hash": "sha256:1", "split_sentence": sentence}
    trace = replace(trace, info=replace(trace.info, model="org/model", source=source))
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    material = Material("t", selection, score_trace(trace), trace)
    assert [words.split()[1] for words in commands(material)] == ["select", "prune"]
    _, _, page = page_of(material)
    assert f"{sentence}." in page.words
    plain = {**source, "split_sentence": None}
    merged = replace(trace, info=replace(trace.info, source={"merged": [plain, source]}))
    assert commands(Material("t", trace=merged)) == []
    assert f"Split {sentence}." in page_of(Material("t", trace=merged))[2].words


def test_what_a_sweep_recommends_is_made_again_by_the_sweep(tmp_path) -> None:
    whole = full_material(tmp_path)
    place = whole.sweep.points.index(whole.sweep.point_of(whole.selection))
    chosen = replace(whole, sweep=replace(whole.sweep, recommended=place), evaluation=None)
    source = {"data": "tasks.jsonl", "content_hash": "sha256:1"}
    traced = replace(chosen, trace=replace(whole.trace, info=replace(whole.trace.info, source=source)))
    assert commands(traced) == [
        "shape-moe trace org/model --data tasks.jsonl -o traces/gsm8k",
        "shape-moe sweep Qwen/Qwen3-30B-A3B --trace traces/gsm8k --max-kl 0.1 -o sweeps/gsm8k",
        "shape-moe prune org/model --selection sweeps/gsm8k/recommended.json -o pruned",
    ]
    another = replace(traced, sweep=replace(traced.sweep, recommended=None))
    assert [words.split()[1] for words in commands(another)] == ["trace", "select", "prune", "sweep"]


def test_results_without_a_command_print_none(tmp_path) -> None:
    whole = full_material(tmp_path)
    silent = MadeWith(0, {}, "")
    from_python = replace(
        whole,
        trace=None,
        sweep=replace(whole.sweep, made_with=silent),
        evaluation=replace(whole.evaluation, made_with=silent),
    )
    assert [words.split()[1] for words in commands(from_python)] == ["select", "prune"]
    assert render_report(from_python)


def test_the_selection_command_is_one_that_the_command_line_takes(tmp_path) -> None:
    import shlex

    from shape_moe.cli.main import run

    trace = synthetic_trace(layers=4, experts=16, top_k=3)
    (tmp_path / "trace").mkdir()
    trace.save(tmp_path / "trace")
    options = SelectOptions(keep=0.55, multiple_of=4, allow_rounding=True, skip_layers=(1,), protect={2: (0, 5)})
    selection = select_from_trace(trace, options)
    (select, _) = commands(Material("t", selection, score_trace(trace), trace))
    words = shlex.split(select)[1:]
    places = {"trace": str(tmp_path / "trace"), "selection.json": str(tmp_path / "selection.json")}
    assert run([places.get(word, word) for word in words] + ["-q"]) == 0
    from shape_moe.selection.selection import load_selection

    assert load_selection(tmp_path / "selection.json").layers == selection.layers


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_contrast(palette: dict[str, str]) -> None:
    """WCAG AA: 4.5 for text, 3 for what carries meaning."""
    for text, back in (
        *(("text", back) for back in ("page", "surface", "inset", "accent-soft", "sequence-low", "sequence-high")),
        *(("muted", back) for back in ("page", "surface", "inset")),
        *(("accent", back) for back in ("page", "surface", "accent-soft")),
        ("warn-text", "warn-back"),
        ("mark", "surface"),
    ):
        assert contrast(palette[text], palette[back]) >= 4.5, (text, back)
    for mark in ("kept", "mark", "accent", *(name for name in palette if name.startswith("series-"))):
        assert contrast(palette[mark], palette["surface"]) >= 3, mark
    assert contrast(palette["kept"], palette["dropped"]) >= 2
    assert set(palette) == set(LIGHT)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_json_cannot_leave_its_element() -> None:
    text = embedded_json({"a": "</script><!--", "b": [float("nan"), float("inf"), 1.5], "c": ("&",)})
    assert not set(text) & set("<>&")
    assert json.loads(text) == {"a": "</script><!--", "b": [None, None, 1.5], "c": ["&"]}


def test_large_models_stay_below_eight_megabytes() -> None:
    """48 layers of 512 experts, top-10."""
    trace = routing_trace(48, 512, 10, 1500)
    selection = select_from_trace(trace, SelectOptions(keep=0.5, method=Method("reap")))
    rivals = tuple(score_trace(trace, name) for name in ("reap", "frequency", "random"))
    text, names = render_report(Material("t", selection, rivals[0], trace, rivals))
    assert "coalitions" in names
    assert len(text.encode()) < 8e6


@pytest.mark.reference
def test_published_selection(reference) -> None:
    from shape_moe.scoring.scores import read_scores

    scores = read_scores(reference / "gsm8k_shapley_values.csv")
    selection = select_from_scores(scores, SelectOptions(keep=0.6))
    text, names, page = page_of(Material("gsm8k_shapley_values.csv", selection, scores))
    assert names == ["layers", "values", "coverage", "provenance"]
    assert "(48 layers of 128 experts): 3,686 of 6,144 experts kept." in page.words
    assert len(text.encode()) < 8e6
