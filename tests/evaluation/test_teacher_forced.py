"""Likelihood, KL divergence and exact match equal what a plain loop computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from shape_moe.calibration.examples import Example
from shape_moe.errors import DataError, ShapeMoeError
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.held_out_set import HeldOutSet, scored_positions
from shape_moe.evaluation.teacher_forced import compare_with_dense, record_dense
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from support.held_out import random_set, task_set
from support.tiny_models import make_model


def plain(model, held_out: HeldOutSet, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (float64) at the scored positions of one example by itself, and the right tokens."""
    example = held_out.examples[i]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.tokens]), use_cache=False).logits[0].double()
    length = len(example.tokens)
    start = example.prompt_length if example.prompt_length < length else 1
    rows = logits.log_softmax(-1)[start - 1 : length - 1]
    return rows, torch.tensor(example.tokens[start:])


def rounding(*rows: torch.Tensor) -> float:
    """What float32 logits may change of a sum over positions: relative to the largest log-probability at each."""
    return 1e-5 * sum(float(row.abs().amax(-1).sum()) for row in rows)


@pytest.fixture(scope="module")
def judged():
    model = make_model("qwen3_moe")
    held_out = random_set()
    layers = {0: [0, 2, 3, 5, 7, 9, 11, 13], 2: [1, 2, 4, 8, 10, 15]}
    return model, held_out, Selection(None, None, None, "test", "test", "drop", 16, 4, layers, 0.5)


def test_figures_equal_a_plain_loop(judged) -> None:
    model, held_out, selection = judged
    with DenseReference() as reference:
        dense = record_dense(model, held_out, reference)
        with masked(model, selection):
            pruned = compare_with_dense(model, held_out, reference)
    for i in range(len(held_out.examples)):
        p, targets = plain(model, held_out, i)
        with masked(model, selection):
            q, _ = plain(model, held_out, i)
        assert dense.tokens[i] == pruned.tokens[i] == len(targets)
        if not len(targets):
            continue
        assert dense.nll[i] == pytest.approx(-p.gather(1, targets[:, None]).sum().item(), abs=rounding(p))
        assert pruned.nll[i] == pytest.approx(-q.gather(1, targets[:, None]).sum().item(), abs=rounding(q))
        assert pruned.kl[i] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=rounding(p, q))
        assert pruned.agree[i] == (p.argmax(-1) == q.argmax(-1)).sum().item()
        assert dense.agree[i] == len(targets)
        assert dense.kl[i] == 0
    assert pruned.kl.sum() > 0.1  # the mask changed something


def test_batches_do_not_change_figures(judged) -> None:
    model, _, selection = judged
    found = []
    for batch_size in (1, 5):
        with DenseReference() as reference, masked(model, selection):
            found.append(record_dense(model, random_set(batch_size=batch_size), reference))
    np.testing.assert_allclose(found[0].nll, found[1].nll, rtol=1e-5)
    assert (found[0].exact == found[1].exact).all()


def test_a_reference_on_disk_gives_the_same(judged) -> None:
    model, held_out, selection = judged
    results = []
    for limit in (0, 2**30):
        with DenseReference(limit) as reference:
            record_dense(model, held_out, reference)
            folder = reference._folder
            assert (folder is not None) == (limit == 0)
            with masked(model, selection):
                results.append(compare_with_dense(model, held_out, reference))
        if folder is not None:
            assert not Path(folder.name).exists()
    assert (results[0].kl == results[1].kl).all()


def test_a_reference_takes_the_room_of_hidden_states(judged) -> None:
    model, held_out, _ = judged
    with DenseReference() as reference:
        dense = record_dense(model, held_out, reference)
        assert reference._used == 4 * model.config.hidden_size * dense.tokens.sum()
        again = compare_with_dense(model, held_out, reference)
    assert again.kl.max() < 1e-9
    assert (again.agree == dense.tokens).all()


def test_logits_that_are_scaled_afterwards_are_kept_themselves(judged) -> None:
    _, held_out, selection = judged
    model = make_model("granitemoe")
    layers = {layer: [0, 2, 3] for layer in range(model.config.num_hidden_layers)}
    selection = dataclasses.replace(selection, layers=layers, num_experts=model.config.num_local_experts)
    model.config.logits_scaling = 4.0
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    with DenseReference() as reference:
        dense = record_dense(model, held_out, reference)
        assert reference._used == 4 * model.config.vocab_size * dense.tokens.sum()
        with masked(model, selection):
            pruned = compare_with_dense(model, held_out, reference)
    for i in np.flatnonzero(dense.tokens):
        p, _ = plain(model, held_out, i)
        with masked(model, selection):
            q, _ = plain(model, held_out, i)
        assert pruned.kl[i] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=rounding(p, q))
    assert pruned.kl.sum() > 0.1


def test_exact_match_is_what_greedy_generation_gives(embedded_model) -> None:
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "words", 30)
    layers = {layer: list(range(0, 32, 2)) for layer in range(4)}
    selection = Selection(None, None, None, "t", "t", "drop", 32, 4, layers, 0.5)
    with DenseReference() as reference:
        record_dense(model, held_out, reference)
        with masked(model, selection):
            found = compare_with_dense(model, held_out, reference)
            right = []
            for i, example in enumerate(held_out.examples):
                wanted = held_out.response(i)
                prompt = torch.tensor([example.tokens[: example.prompt_length]])
                out = model.generate(prompt, max_new_tokens=len(wanted), do_sample=False, pad_token_id=0)
                right.append(out[0, example.prompt_length :].tolist() == wanted)
    assert found.exact.tolist() == right
    assert 0 < sum(right) < 30  # both outcomes were seen


def test_every_turn_of_the_assistant_is_scored(embedded_model) -> None:
    """Two spans: both are scored, what lies between and before is not, and the last is what the model is asked for."""
    model, _ = embedded_model
    tokens = tuple(range(40, 60))
    example = Example(0, "talk", tokens, ((4, 7), (12, 17)))
    held_out = HeldOutSet("talk", (example, Example.answered(1, "one", tokens[:9], 5)), (None, None), 2)
    _, batch = next(held_out.batches())
    scored = scored_positions(batch)
    assert scored[0].nonzero().flatten().tolist() == [3, 4, 5, 11, 12, 13, 14, 15]
    assert scored[1].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert held_out.response(0) == list(tokens[12:17])
    assert held_out.answered() == [0, 1]
    with DenseReference() as reference:
        found = record_dense(model, held_out, reference)
    assert found.tokens.tolist() == [8, 4]


def test_tokens_after_the_end_of_a_response_do_not_count_as_wrong(embedded_model) -> None:
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "sorting", 6)
    longer = tuple(
        dataclasses.replace(e, tokens=(*e.tokens, 7, 9), spans=((e.prompt_length, len(e.tokens) + 2),))
        for e in held_out.examples
    )
    with DenseReference() as reference:
        whole = record_dense(model, held_out, reference)
    with DenseReference() as reference:
        found = record_dense(model, dataclasses.replace(held_out, examples=longer), reference)
    assert whole.exact.all()
    assert found.exact.all()
    assert (found.tokens == whole.tokens + 2).all()


def test_logits_that_are_not_finite_are_refused() -> None:
    model = make_model("mixtral")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ShapeMoeError, match="not finite"), DenseReference() as reference:
        record_dense(model, random_set(), reference)


def test_a_set_without_a_scored_token_is_refused() -> None:
    with pytest.raises(DataError, match="no token that could be scored"):
        HeldOutSet("nothing", (Example(0, "x", (5, 6, 7)), Example(1, "y", (5,), plain=True)), (None, None), 4)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "glm4_moe", "granitemoe"])
def test_every_family_is_judged_at_chosen_positions_only(family) -> None:
    model, held_out = make_model(family), random_set(5)
    with DenseReference() as reference:
        found = record_dense(model, held_out, reference)
    for i in range(len(held_out.examples)):
        p, targets = plain(model, held_out, i)
        assert found.nll[i] == pytest.approx(-p.gather(1, targets[:, None]).sum().item(), abs=rounding(p))
