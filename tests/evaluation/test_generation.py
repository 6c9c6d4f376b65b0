from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.errors import DataError, UsageError
from shape_moe.evaluation.generation import Generated, GenerationOptions, answer_limit, ends_in_loop, generate
from shape_moe.evaluation.intervals import Bootstrap
from shape_moe.evaluation.measures import health
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from support.held_out import random_set, task_set
from support.tiny_models import make_model


def keep(ids: list[int]) -> Selection:
    return Selection(None, None, None, "t", "t", "drop", 32, 4, dict.fromkeys(range(4), ids), 0.5)


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=7), st.integers(4, 9))
def test_repeated_endings_are_loops(start, block, times) -> None:
    if len(block) * times >= 16:
        assert ends_in_loop([*start, *block * times])


@given(st.lists(st.integers(0, 3), max_size=60))
def test_loops_are_found_as_a_plain_search_finds_them(tokens) -> None:
    plain = any(
        len(tokens) >= period * times and tokens[-period * times :] == tokens[-period:] * times
        for period in range(1, len(tokens) + 1)
        for times in range(4, len(tokens) + 1)
        if period * times >= 16
    )
    # A loop may end within its period: four whole copies and the 16 tokens are what counts.
    assert ends_in_loop(tokens) >= plain
    if ends_in_loop(tokens):
        assert len(tokens) >= 16


@pytest.mark.parametrize("tokens", [[], [1], list(range(40)), [1, 2] * 3, [7] * 15])
def test_other_answers_are_no_loops(tokens) -> None:
    assert not ends_in_loop(tokens)


def test_the_dense_model_answers_well(embedded_model) -> None:
    model, tokenizer = embedded_model
    made = generate(model, tokenizer, task_set(tokenizer, "words", 20))
    verdict = health(made, None, Bootstrap(20))
    assert verdict.figures["exact_match"].value >= 0.95
    assert verdict.figures["no_end_rate"].value == verdict.figures["loop_rate"].value == 0
    assert not verdict.complaints


def test_answers_are_those_of_generate_one_by_one(embedded_model) -> None:
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "words", 8)
    selection = keep(list(range(0, 32, 3)))
    with masked(model, selection):
        made = generate(model, tokenizer, held_out, GenerationOptions(max_new_tokens=24))
        for position, answer in zip(made.positions, made.answers, strict=True):
            example = held_out.examples[position]
            prompt = torch.tensor([example.tokens[: example.prompt_length]])
            out = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
            assert list(answer) == out[0, example.prompt_length :].tolist()


def test_a_broken_model_is_unhealthy_though_its_likelihood_may_look_fine(embedded_model) -> None:
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "words", 16)
    dense = generate(model, tokenizer, held_out)
    with masked(model, keep([3, 7])):
        broken = generate(model, tokenizer, held_out)
    verdict = health(broken, dense, Bootstrap(16))
    assert verdict.complaints
    assert verdict.change["exact_match"].value < -0.5
    assert health(dense, dense, Bootstrap(16)).complaints == ()


def test_a_pattern_picks_the_part_that_must_be_right(embedded_model) -> None:
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "sorting", 12)
    spoilt = []
    for i, example in enumerate(held_out.examples):
        answer = held_out.response(i)
        wrong_start = tokenizer("9", add_special_tokens=False).input_ids
        tokens = (*example.tokens[: example.prompt_length], *wrong_start, *answer[1:])
        spoilt.append(dataclasses.replace(example, tokens=tokens))
    changed = dataclasses.replace(held_out, examples=tuple(spoilt))
    whole = generate(model, tokenizer, changed)
    part = generate(model, tokenizer, changed, GenerationOptions(answer_pattern=r"(\d\d)\s*$"))
    assert whole.exact.sum() < part.exact.sum() == 12


def test_examples_are_spread_over_the_set_and_limits_follow_the_responses(embedded_model) -> None:
    model, tokenizer = embedded_model
    held_out = task_set(tokenizer, "sorting", 20)
    made = generate(model, tokenizer, held_out, GenerationOptions(examples=4))
    assert made.positions == (0, 5, 10, 15)
    assert made.limit == int(1.25 * 9) + 16
    assert answer_limit(held_out, GenerationOptions(max_new_tokens=3)) == 3


def test_what_cannot_be_generated_from_is_refused() -> None:
    held_out = random_set()
    texts = tuple(dataclasses.replace(e, spans=(), plain=True) for e in held_out.examples)
    with pytest.raises(DataError, match="no example with a prompt and a response"):
        generate(make_model("mixtral"), None, dataclasses.replace(held_out, examples=texts))
    with pytest.raises(UsageError, match="not a regular expression"):
        GenerationOptions(answer_pattern="(")
    with pytest.raises(UsageError, match="at least 1"):
        GenerationOptions(examples=0)


def test_lengths_far_from_the_dense_models_are_a_complaint() -> None:
    import numpy as np

    def made(length: int) -> Generated:
        ended = np.ones(10, dtype=bool)
        return Generated(tuple(range(10)), ((5,) * length,) * 10, 50, ended, ~ended, ended)

    assert health(made(10), made(10), Bootstrap(10)).complaints == ()
    assert "tokens on average" in health(made(14), made(10), Bootstrap(10)).complaints[0]
