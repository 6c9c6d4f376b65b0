"""Records to tokens: templates, segments, limits; and batches of them."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from shape_moe.calibration.batches import PADDING, PROMPT, RESPONSE, batches, make_batch
from shape_moe.calibration.examples import Example, Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.errors import DataError
from support.data import make_examples

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if thinking is defined %}[{{ thinking }}]{% endif %};"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    tokenizer.chat_template = CHATML
    return tokenizer


def decode(tokeniser: Tokeniser, example: Example) -> tuple[str, str]:
    cut = example.prompt_length
    return tokeniser.tokenizer.decode(example.tokens[:cut]), tokeniser.tokenizer.decode(example.tokens[cut:])


def test_the_template_wraps_prompt_and_response(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions())
    example = tokeniser.example(Record(0, "r", prompt="hi", response="yo"))
    assert decode(tokeniser, example) == ("<|user|>hi;<|assistant|>", "yo;")
    assert tokeniser.template_hash.startswith("sha256:")


def test_messages_end_in_the_response(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions())
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    record = Record(0, "r", messages=(*turns, {"role": "assistant", "content": "d"}))
    assert decode(tokeniser, tokeniser.example(record)) == ("<|user|>a;<|assistant|>b;<|user|>c;<|assistant|>", "d;")
    open_record = Record(0, "r", messages=turns)
    assert decode(tokeniser, tokeniser.example(open_record, [65])) == (
        "<|user|>a;<|assistant|>b;<|user|>c;<|assistant|>",
        "A",
    )


def test_raw_text_without_template(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions(template=False))
    assert decode(tokeniser, tokeniser.example(Record(0, "r", prompt="hi", response="yo"))) == ("hi", "yo")
    assert tokeniser.template_hash is None
    with pytest.raises(DataError, match="--no-template is set"):
        tokeniser.example(Record(0, "r", messages=({"role": "user", "content": "a"},)))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has none"):
        Tokeniser(tokenizer, None, TokenOptions()).example(Record(0, "r", messages=({"role": "user", "content": "a"},)))


def test_text_is_prompt_and_never_templated(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions())
    assert decode(tokeniser, tokeniser.example(Record(0, "r", text="plain"))) == ("plain", "")


def test_template_arguments_reach_the_template(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions(template_args={"thinking": False}))
    prompt, _ = decode(tokeniser, tokeniser.example(Record(0, "r", prompt="hi", response="yo")))
    assert prompt == "<|user|>hi[False];<|assistant|>"


def test_special_tokens_are_added_once(tokenizer) -> None:
    """A template writes its own special tokens; raw text gets the tokenizer's."""
    calls = []

    class Spy:
        chat_template = CHATML
        eos_token_id = 257
        is_fast = False

        def apply_chat_template(self, *args, **kwargs):
            return tokenizer.apply_chat_template(*args, **kwargs)

        def __call__(self, text, *, add_special_tokens, verbose):
            calls.append((text, add_special_tokens))
            return tokenizer(text, add_special_tokens=False)

    example = Tokeniser(Spy(), None, TokenOptions()).example(Record(0, "r", prompt="hi", response="yo"))
    assert example.spans == ((24, 27),)
    assert calls == [("<|user|>hi;<|assistant|>", False), ("yo;", False)]
    calls.clear()
    Tokeniser(Spy(), None, TokenOptions(template=False)).example(Record(0, "r", prompt="hi", response="yo"))
    assert calls == [("hi", True), ("yo", False)]


def test_templates_that_write_the_prompt_differently_before_an_answer(tokenizer) -> None:
    """The example is what the model would be asked, then the answer and its end."""
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }};{% endfor %}"
    tokeniser = Tokeniser(tokenizer, None, TokenOptions())
    assert decode(tokeniser, tokeniser.example(Record(0, "r", prompt="hi", response="yo"))) == ("1hi;", "yo;")
    assert "writes an answer differently" in tokeniser.fresh_notes()[0]
    assert tokeniser.fresh_notes() == []


def test_conversations_that_the_template_refuses(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses this conversation: no system role"):
        Tokeniser(tokenizer, None, TokenOptions()).example(Record(0, "r", prompt="hi", response="yo"))


def test_texts_longer_than_the_context(tokenizer) -> None:
    record = Record(0, "line 4", prompt="x" * 40)
    with pytest.raises(DataError, match=r"line 4: \d+ tokens are more than.*context of 32; --max-length 32"):
        Tokeniser(tokenizer, 32, TokenOptions()).example(record)
    example = Tokeniser(tokenizer, 32, TokenOptions(max_length=20)).example(record)
    assert len(example.tokens) == example.prompt_length == 20
    assert example.truncated


def test_records_without_tokens(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions(template=False, max_length=5))
    with pytest.raises(DataError, match="line 9: the record has no tokens"):
        tokeniser.example(Record(0, "line 9", text=""))


def test_batches_are_right_padded_and_know_their_segments() -> None:
    examples = [Example.answered(0, "a", (5, 6, 7), 2), Example(1, "b", (8,))]
    batch = make_batch(examples, [0, 9], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.segments.tolist() == [PROMPT, PROMPT, RESPONSE, PROMPT, PADDING, PADDING]
    assert batch.folds.view(2, 3)[:, 0].tolist() == [0, 1]


def test_batches_hold_every_example_once_longest_first() -> None:
    examples = make_examples(23)
    found = list(batches(examples, 5, 0))
    assert sorted(e.index for batch in found for e in batch.examples) == list(range(23))
    lengths = [batch.input_ids.shape[1] for batch in found]
    assert lengths == sorted(lengths, reverse=True)
    for batch in found:
        folds = batch.folds.view(batch.input_ids.shape)[:, 0].tolist()
        assert folds == [e.index % 8 for e in batch.examples]


def test_rows_of_a_batch() -> None:
    batch = make_batch(make_examples(4), range(4), 0)
    part = batch.rows([2, 0])
    assert part.examples == (batch.examples[2], batch.examples[0])
    assert part.segments.tolist() == batch.segments.view(4, -1)[[2, 0]].flatten().tolist()


def test_batches_of_padding_only_are_refused() -> None:
    with pytest.raises(DataError, match="nothing but padding"):
        make_batch([Example(0, "a", ())], [0], 0)
