"""Task generators: right answers, seeds, and held-out prompts that training never sees."""

from __future__ import annotations

import random
import re

import pytest

from shape_moe.demo.tasks import END, TABLE, TASKS, examples, is_held_out, number_to_words


def answer(task: str, prompt: str) -> str:
    """The right answer by other means than the generator's."""
    body = prompt.split(" ", 1)[1].removesuffix("=")
    if task == "addition":
        return "".join(reversed(str(sum(map(int, body.split("+"))))))
    if task == "sorting":
        return "".join(str(d) * body.count(str(d)) for d in range(10))
    if task == "reversal":
        return body[::-1]
    if task == "key-value":
        return " ".join(sorted(body.split(), key=lambda pair: pair[0]))
    if task == "lookup":
        return " ".join(TABLE[pair] for pair in body.split())
    return number_to_words(int(body))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_prompts_differ(task) -> None:
    for held_out in (False, True):
        rows = examples(task, 200, seed=1, held_out=held_out)
        assert len({row["prompt"] for row in rows}) == 200
        assert all(row["response"] == answer(task, row["prompt"]) + END for row in rows)
        assert all(is_held_out(row["prompt"]) == held_out for row in rows)


@pytest.mark.parametrize("task", TASKS)
def test_seeds_decide(task) -> None:
    assert examples(task, 20, seed=1) == examples(task, 20, seed=1)


def test_a_seed_draws_the_same_examples_on_every_machine() -> None:
    drawn = {seed: [row["prompt"] for row in examples("addition", 2, seed=seed)] for seed in (1, 2)}
    assert drawn == {1: ["add 695+746=", "add 171+963="], 2: ["add 207+137=", "add 948+715="]}


def test_a_tenth_is_held_out() -> None:
    rng = random.Random(0)
    prompts = {TASKS["addition"].draw(rng)[0] for _ in range(5000)}
    assert 0.08 < sum(map(is_held_out, prompts)) / len(prompts) < 0.12


def test_numbers_in_words() -> None:
    known = {0: "zero", 13: "thirteen", 40: "forty", 99: "ninety nine", 100: "one hundred", 1000: "one thousand"}
    known |= {
        4821: "four thousand eight hundred twenty one",
        2010: "two thousand ten",
        9999: "nine thousand nine hundred ninety nine",
    }
    assert {n: number_to_words(n) for n in known} == known
    assert len({number_to_words(n) for n in range(10_000)}) == 10_000
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", number_to_words(n)) for n in range(10_000))


def test_small_tasks_run_out() -> None:
    with pytest.raises(ValueError, match="fewer than 2000 different prompts"):
        examples("words", 2000, seed=0, held_out=True)
    with pytest.raises(KeyError):
        examples("cooking", 1, seed=0)
