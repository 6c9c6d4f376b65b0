"""What goes through a model together, what of it is scored, and how speed is counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from shape_moe.calibration.examples import Example
from shape_moe.evaluation import footprint
from shape_moe.evaluation.dense_reference import Entered, Outputs, kl_divergence, logprobs
from shape_moe.evaluation.footprint import Workload
from shape_moe.evaluation.teacher_forced import record_dense
from support.held_out import random_set


def made(*examples: Example, **changes):
    return replace(random_set(), examples=examples, groups=(None,) * len(examples), **changes)


@pytest.mark.parametrize(
    ("length", "batch_size", "vocabulary", "rows"),
    [
        (64, 4, 0, 32),  # 2,048 tokens at a time while examples are short
        (63, 4, 0, 32),
        (65, 4, 0, 31),
        (1024, 4, 0, 4),  # the batch size that was asked for
        (1024, 4, 2**19, 2),  # 4 GiB of log-probabilities
        (4096, 4, 2**20, 1),  # never none
    ],
)
def test_how_many_examples_go_through_together(length, batch_size, vocabulary, rows) -> None:
    assert replace(random_set(), batch_size=batch_size, vocabulary=vocabulary).rows_of(length) == rows


def test_batches_hold_every_scored_example_once_longest_first() -> None:
    rows = [Example.answered(i, str(i), (5,) * length, 1) for i, length in enumerate((700, 3, 1500, 3, 700))]
    rows.append(Example.answered(5, "prompt alone", (5, 6, 7), 3))
    held_out = made(*rows, batch_size=2)
    assert [positions for positions, _ in held_out.batches()] == [[2, 0], [4, 1], [3]]
    for positions, batch in held_out.batches():
        assert [example.index for example in batch.examples] == positions


def test_what_has_a_prompt_and_a_whole_response_can_be_answered() -> None:
    held_out = made(
        Example.answered(0, "both", (5, 6, 2, 9), 2),
        Example(1, "plain", (5, 6), plain=True),
        Example.answered(2, "no prompt", (5, 6), 0),
        Example(3, "cut", (5, 6, 7), ((2, 3),), truncated=True),
        Example.answered(4, "one", (5, 6), 1),
    )
    assert held_out.answered() == [0, 4]
    assert held_out.response(0) == [2]  # up to and with what ends it
    assert held_out.response(4) == [6]


class Next(torch.nn.Module):
    """A model that finds the token one above the last one likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> torch.nn.Module:
        return self

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        logits = torch.nn.functional.one_hot((input_ids + 1) % 12, 12).float() * 5
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_scored_are_responses_and_plain_texts_but_for_their_first_token() -> None:
    from shape_moe.evaluation.dense_reference import DenseReference

    held_out = made(
        Example.answered(0, "right", (3, 4, 5, 6), 2),
        Example.answered(1, "wrong at its end", (3, 4, 5, 7), 2),
        Example.answered(2, "wrong after its end", (3, 4, 5, 2, 9), 2),
        Example(3, "plain", (3, 4, 5), plain=True),
        Example.answered(4, "prompt alone", (3, 4), 2),
        Example.answered(5, "no prompt", (3, 4, 5), 0),
        Example.answered(6, "right until it ends", (1, 1, 2, 9, 9), 2),
    )
    with DenseReference() as reference:
        found = record_dense(Next(), held_out, reference)
    assert found.tokens.tolist() == [2, 2, 3, 2, 0, 2, 3]
    assert found.exact.tolist() == [True, False, False, True, False, True, True]
    right = -float(logprobs(torch.tensor([5.0] + 11 * [0.0]))[0])
    assert found.nll[[0, 3, 5]] == pytest.approx([2 * right] * 3)
    assert found.nll[1] == pytest.approx(2 * right + 5)
    assert found.nll[6] == pytest.approx(3 * right + 10)


def test_divergence_is_of_the_dense_distribution_from_the_other() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.25 * torch.log(torch.tensor(0.5))
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(float(expected), rel=1e-6)
    skewed = torch.tensor([[0.9, 0.05, 0.05]])
    there, back = kl_divergence(p.log(), skewed.log()), kl_divergence(skewed.log(), p.log())
    assert float(there) == pytest.approx(0.5 * torch.tensor(5 / 9).log().item() + 0.5 * torch.tensor(5.0).log().item())
    assert float(back) != pytest.approx(float(there), rel=0.1)


def test_logits_come_again_to_within_a_millionth_of_a_nat() -> None:
    head = torch.nn.Linear(4, 6)
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    entered = Entered(states, head, torch.device("cpu"))
    with torch.no_grad():
        logits = head(states)
    assert Outputs(logits, entered).come_again(entered)
    assert not Outputs(logits * 1.1, entered).come_again(entered)
    one_row = logits.clone()
    one_row[2] *= 1.5
    assert not Outputs(one_row, entered).come_again(entered)


def test_speed_is_the_median_after_a_warm_up(monkeypatch) -> None:
    seconds = iter([(100.0, 100.0), (1.0, 4.0), (2.0, 2.0), (4.0, 1.0)])
    monkeypatch.setattr(footprint, "run_once", lambda *_: next(seconds))
    monkeypatch.setattr("shape_moe.architectures.loading.input_device", lambda _: torch.device("cpu"))
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10)))
    found = footprint._time(model, Workload(batch_size=2, prompt_tokens=50, new_tokens=8, repeats=3))
    assert found == (2 * 50 / 2.0, 2 * 8 / 2.0)


def test_one_run_is_a_prefill_and_as_many_steps_as_were_asked_for(monkeypatch) -> None:
    calls: list[tuple[int, int]] = []
    clock = iter([10.0, 13.0, 20.0])
    monkeypatch.setattr(footprint, "_now", lambda _: next(clock))

    def model(input_ids, **options):
        calls.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7), past_key_values=None)

    assert footprint.run_once(model, torch.zeros(3, 5, dtype=torch.long), 4) == (3.0, 7.0)
    assert calls == [(3, 5)] + [(3, 1)] * 4
