"""The canary: neutral text that the model continues, different enough to ask many experts; none of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shape_moe.architectures.sites import find_sites
from shape_moe.calibration.records import DataOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.verify import verify
from shape_moe.pruning.canary import (
    SEQUENCE_LENGTH,
    SEQUENCES,
    TOP,
    Canary,
    canary_texts,
    canary_tokens,
    load_canary,
    random_tokens,
    record_canary,
)
from shape_moe.pruning.compare import file_hash
from shape_moe.selection.select import SelectOptions
from support.data import write_lines
from support.leaks import leaks
from support.tiny_models import make_model

RECORDS = [
    {
        "prompt": f"Zyxwolf {name} quagmirth\tobelisk #{name[::-1]}?",
        "response": f"Vexillum of {name} jigsawed thricely.",
    }
    for name in ("Brambletwist", "Quillfeather", "Moonwhistle", "Thornapple", "Dapplegrim", "Wickerjack")
]


def touched(model, rows: list[list[int]]) -> float:
    """Share of all experts that at least one token of the rows is routed to."""
    seen = {site.layer: set() for site in find_sites(model)}
    hooks = [
        site.experts.register_forward_pre_hook(
            lambda _module, args, layer=site.layer: seen[layer].update(args[1].unique().tolist())
        )
        for site in find_sites(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor(rows), use_cache=False)
    for hook in hooks:
        hook.remove()
    total = sum(site.experts.num_experts for site in find_sites(model))
    return sum(map(len, seen.values())) / total


def test_texts_are_sixteen_and_unlike() -> None:
    texts = canary_texts()
    assert len(texts) == SEQUENCES
    assert all(len(text.encode()) >= 110 for text in texts)
    words = [set(text.split()) for text in texts]
    for i, some in enumerate(words):
        for others in words[:i]:
            assert len(some & others) <= 0.35 * min(len(some), len(others))


def test_sequences_are_text_and_the_models_own_continuation(embedded_model) -> None:
    model, tokenizer = embedded_model
    rows = canary_tokens(model, tokenizer)
    assert [len(row) for row in rows] == [SEQUENCE_LENGTH] * SEQUENCES
    begun = SEQUENCE_LENGTH // 2
    assert [row[:begun] for row in rows] == [tokenizer(text).input_ids[:begun] for text in canary_texts()]
    for row in rows[:1]:
        expected = row[:begun]
        while len(expected) < SEQUENCE_LENGTH:
            with torch.no_grad():
                expected = [*expected, int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax())]
        assert row == expected


def test_many_experts_are_asked(embedded_model) -> None:
    """At least nine in ten of the experts, of a trained model and of random ones."""
    model, tokenizer = embedded_model
    models = {"embedded": model, **{name: make_model(name, vocab_size=300) for name in ("olmoe", "deepseek_v3")}}
    for name, asked in models.items():
        share = touched(asked, canary_tokens(asked, tokenizer))
        print(f"{name}: {share:.1%} of the experts")
        assert share >= 0.9, name


def test_without_a_tokenizer_token_ids_are_drawn() -> None:
    model = make_model("olmoe")
    assert canary_tokens(model, None) == random_tokens(128)
    assert max(map(max, random_tokens(128))) < 128


def test_what_is_kept_are_the_most_likely_next_tokens_and_their_log_probabilities() -> None:
    model = make_model("qwen3_moe")
    rows = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    canary = record_canary(model, rows)
    assert [sequence.tokens for sequence in canary.sequences] == rows
    for sequence in canary.sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.tokens])).logits[0].double().numpy()
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        order = np.argsort(-logprobs, axis=1)[:, : len(sequence.top_ids[0])]
        assert len(sequence.top_ids[0]) == TOP
        np.testing.assert_array_equal(sequence.top_ids, order)
        np.testing.assert_allclose(sequence.top_logprobs, np.take_along_axis(logprobs, order, axis=1), atol=2e-5)


def test_tokenizers_that_do_not_fit_the_model(embedded_model) -> None:
    """A tokenizer with ids that the model does not embed cannot make its sequences."""
    assert canary_tokens(make_model("olmoe"), embedded_model[1]) == random_tokens(128)


@pytest.fixture(scope="module")
def pruned(embedded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    data = write_lines(folder / "data.jsonl", RECORDS)
    options = ExampleOptions(data=DataOptions(str(data)), device="cpu")
    return prune(embedded, folder / "out", PruneOptions(SelectOptions(0.6), device="cpu"), data=options).path


def sequences(embedded) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    return [tokenizer(text).input_ids for record in RECORDS for text in record.values()]


def test_nothing_that_is_written_but_the_trace_holds_calibration_text(embedded, pruned) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert leaks(pruned, sequences(embedded), tokenizer, but=["shape/trace"]) == []


def test_leaks_are_found(embedded, pruned, tmp_path) -> None:
    """The search itself: text, escaped text and token ids, with a word before and after."""
    tokenizer, rows = AutoTokenizer.from_pretrained(embedded), sequences(embedded)
    texts = [RECORDS[2]["prompt"][4:16], json.dumps(RECORDS[0]["prompt"])[18:40], str(rows[3][5:14]), "innocent"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.json").write_text(f"before {text} after")
    assert [line.split(":")[0] for line in leaks(tmp_path, rows, tokenizer)] == ["0.json", "1.json", "2.json"]
    assert leaks(tmp_path, rows, tokenizer, but=["0.json", "1.json", "2.json"]) == []


def test_canaries_of_older_checkpoints_still_verify(embedded_model, pruned, tmp_path) -> None:
    """Their sequences were the beginnings of calibration examples; only what is recorded counts."""
    import shutil

    from shape_moe.pruning.masks import masked
    from shape_moe.selection.selection import load_selection

    folder = shutil.copytree(pruned, tmp_path / "older")
    model, tokenizer = embedded_model
    rows = [tokenizer(text).input_ids[:64] for record in RECORDS for text in record.values()]
    with masked(model, load_selection(folder)):
        older: Canary = record_canary(model, rows)
    older.save(folder / "shape" / "canary.json")
    assert load_canary(folder / "shape" / "canary.json").sequences[0].tokens == rows[0]
    assert file_hash(folder / "shape" / "canary.json") != file_hash(pruned / "shape" / "canary.json")
    checks = {check.name: check for check in verify(folder, device="cpu", dtype="float32")}
    assert checks["canary"].passed, checks["canary"].detail
