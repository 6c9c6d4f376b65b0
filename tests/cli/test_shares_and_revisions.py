"""Shares are written alike everywhere, and wherever a model on the hub is named its revision can be."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import yaml

import shape_moe
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.experiments.reader import read_config
from shape_moe.units import share_from
from support.cli import refused
from support.data import write_lines

REVISION = "v1.2"
NAME = "somebody/some-model"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("60%", 0.6),
        ("60 %", 0.6),
        (" 0.6 ", 0.6),
        (".5", 0.5),
        ("1", 1.0),
        ("0.1%", 0.001),
        ("100%", 1.0),
        ("sixty", None),
        ("-1%", -0.01),
        ("1e-2", None),
        ("60%%", None),
        ("", None),
        ("nan", None),
    ],
)
def test_a_share_is_a_number_or_a_percentage(text, share) -> None:
    assert share_from(text) == pytest.approx(share, abs=1e-15)


@pytest.fixture(scope="module")
def traced(embedded, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trace")
    data = write_lines(folder / "d.jsonl", examples("sorting", 8, seed=1))
    shape_moe.trace(embedded, data, folder / "t")
    return str(folder / "t")


def test_sixty_per_cent_is_what_it_says(call, traced) -> None:
    chosen = [json.loads(call("select", traced, "--keep", keep, "--json")[1]) for keep in ("60%", "0.6", "60 %")]
    assert [found["layers"] for found in chosen[1:]] == [chosen[0]["layers"]] * 2
    assert chosen[0]["keep_asked"] == 0.6
    assert sum(map(len, chosen[0]["layers"].values())) == 77


KEEPING = [
    ("select", "T"),
    ("prune", "M", "--data", "D", "-o", "O"),
    ("sweep", "M", "--data", "D"),
    ("demo",),
]


@pytest.mark.parametrize("verb", KEEPING, ids=lambda verb: verb[0])
def test_sixty_alone_is_refused_with_what_was_meant(call, verb) -> None:
    refused(call(*verb, "--keep", "60"), 2, "not 60: write 0.6 or 60% to keep 60 % of the experts")
    refused(call(*verb, "--keep", "150%"), 2, "above 0 and at most 1, not 1.5")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *((("--keep", *verb), "--keep takes a share such as 60% or 0.6, not 'much'") for verb in KEEPING),
        (("--max-drop", "prune", "M", "--data", "D", "-o", "O"), "--max-drop takes a share such as 1% or 0.01"),
        (("--max-drop", "sweep", "M", "--data", "D"), "--max-drop takes a share such as 1% or 0.01, not 'much'"),
        (("--max-drop", "evaluate", "M", "--data", "D"), "--max-drop takes a share such as 1% or 0.01, not 'much'"),
        (("--tolerance", "select", "T", "--keep", "1"), "--tolerance takes a share such as 1% or 0.01, not 'much'"),
    ],
)
def test_what_is_no_share_is_refused_by_the_options_name(call, arguments, words) -> None:
    option, *verb = arguments
    refused(call(*verb, option, "much"), 2, words)


def grid(tmp_path, **changes) -> str:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "response": "r"}])
    content = {
        "models": ["embedded"],
        "calibration": {"a": {"data": "a.jsonl"}},
        "keep": ["60%", 0.5, "100 %"],
        "evaluation": {"e": {"data": "b.jsonl"}},
        **changes,
    }
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_experiments_take_percentages_too(call, tmp_path) -> None:
    assert read_config(grid(tmp_path)).keep == (0.6, 0.5, 1.0)
    sizes = [
        json.loads(call("experiment", grid(tmp_path), "--dry-run", "--only", f"keep={keep}", "--json")[1])["cells"]
        for keep in ("60%", "0.6")
    ]
    assert sizes == [1, 1]
    with pytest.raises(UsageError, match=r"keep.*not 60: write 0.6"):
        read_config(grid(tmp_path, keep=[60]))
    with pytest.raises(UsageError, match="keep, entry 1 must be a number, not 'most'"):
        read_config(grid(tmp_path, keep=["most"]))


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str | None]]:
    """What the hub was asked for; it has nothing."""
    names: list[tuple[str, str | None]] = []

    def nothing(name: str, revision: str | None = None, **_: object) -> str:
        names.append((name, revision))
        raise OSError("nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", nothing)
    return names


@pytest.mark.parametrize("revision", [REVISION, None])
@pytest.mark.parametrize(
    "verb",
    [
        ("inspect", NAME),
        ("trace", NAME, "--data", "D", "-o", "O"),
        ("prune", NAME, "--data", "D", "--keep", "60%", "-o", "O"),
        ("prune", NAME, "--data", "D", "--fit", "24GiB", "-o", "O"),
        ("sweep", NAME, "--data", "D", "--keep", "60%"),
        ("sweep", NAME, "--data", "D", "--fit", "24GiB"),
        ("evaluate", NAME, "--data", "D"),
        ("convert", "C", "--from", "selected", "--model", NAME, "-o", "O"),
        ("serve", NAME, "--selection", "S"),
    ],
    ids=lambda verb: f"{verb[0]} {verb[4][2:] if len(verb) > 4 else ''}" if isinstance(verb, tuple) else None,
)
def test_every_verb_that_names_a_model_takes_its_revision(call, asked, verb, revision, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shape_moe.cli.serve._vllm_command", lambda: "vllm")
    (tmp_path / "C").write_text("{}")
    write_lines(tmp_path / "D", examples("sorting", 3, seed=1))
    given = [] if revision is None else ["--revision", revision]
    refused(call(verb[0], *verb[1:], *given), 1, f"There is no folder {NAME}, and the hub could not provide it")
    assert set(asked) == {(NAME, revision)}


def test_verify_takes_the_originals_revision(call, asked, embedded, traced, tmp_path) -> None:
    out = tmp_path / "pruned"
    assert call("prune", embedded, "--trace", traced, "--keep", "60%", "-o", out, "--no-judge", "--no-logits")[0] == 0
    code, shown, _ = call("verify", out, "--original", NAME, "--revision", REVISION)
    assert code == 1
    assert f"original: There is no folder {NAME}" in shown
    assert asked == [(NAME, REVISION)]
    refused(call("verify", out, "--revision", REVISION), 2, "name the original, or leave it out")


def test_experiments_take_revisions(call, asked, tmp_path) -> None:
    file = grid(tmp_path, models=[{"model": NAME, "name": "m", "revision": REVISION}])
    refused(call("experiment", file, "-o", tmp_path / "out"), 1, "the hub could not provide it")
    assert asked == [(NAME, REVISION)]


def test_a_folder_has_no_revisions(call, embedded) -> None:
    refused(call("inspect", embedded, "--revision", "main"), 2, "is a folder on this machine", "leave the revision out")
    with pytest.raises(UsageError, match="A live model has no revisions"):
        shape_moe.trace(object(), [{"prompt": "p"}], tokenizer=object(), revision="main")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, folder: shape_moe.prune(model, folder / "out", data=[{"prompt": "p"}], keep=0.5),
        lambda model, _: shape_moe.inspect_model(model),
        lambda model, _: shape_moe.evaluate(model, data=[{"prompt": "p"}]),
        lambda model, _: shape_moe.sweep(model, data=[{"prompt": "p"}]),
    ],
    ids=["prune", "inspect", "evaluate", "sweep"],
)
def test_a_live_model_is_refused_where_a_folder_is_needed(verb, embedded_model, tmp_path) -> None:
    words = r"not by a \w+ForCausalLM: save it first .*save_pretrained.*shape_moe.trace.*shape_moe.prune_model"
    with pytest.raises(UsageError, match=words):
        verb(embedded_model[0], tmp_path)
    assert not (tmp_path / "out").exists()
