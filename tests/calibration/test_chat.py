"""What kinds of chat templates write, and which tokens of it are response: one golden rendering per kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.errors import DataError
from support import chat_templates as kinds

TALK = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)
CALL = {"type": "function", "id": "call_1", "function": {"name": "find", "arguments": {"key": "x"}}}
TRAJECTORY = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "found"},
    {"role": "assistant", "content": "b"},
)
TOOLS = ({"type": "function", "function": {"name": "find", "parameters": {}}},)


@pytest.fixture(scope="module")
def tokenizer(embedded):
    """One token per character, and ``<|end|>`` as the end of a sequence."""
    return AutoTokenizer.from_pretrained(embedded)


@pytest.fixture
def write(tokenizer):
    """Render with a template: the text with responses in guillemets, and what was said."""

    def write(template: str, messages, tools=None, **options) -> tuple[str, list[str]]:
        tokeniser = Tokeniser(tokenizer, None, TokenOptions(chat_template=template, **options))
        example = tokeniser.example(Record(0, "line 1", messages=tuple(messages), tools=tools))
        pieces, done = [], 0
        for begin, end in example.spans:
            decode = tokenizer.decode
            pieces += [decode(example.tokens[done:begin]), f"«{decode(example.tokens[begin:end])}»"]
            done = end
        return "".join([*pieces, tokenizer.decode(example.tokens[done:])]), tokeniser.fresh_notes()

    return write


def thinking(messages, thought="hmm"):
    return (*messages[:-1], {**messages[-1], "reasoning_content": thought})


GOLDEN = {
    "chatml": (
        kinds.CHATML,
        TALK,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n«d<|im_end|>»",
    ),
    "llama3": (
        kinds.LLAMA3,
        TALK,
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«b<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n«d<|eot_id|>»",
    ),
    "mistral": (kinds.MISTRAL, TALK, "<s>[INST] a[/INST]« b</s>»[INST] c[/INST]« d</s>»"),
    "qwen3": (
        kinds.QWEN3,
        TALK,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«d<|im_end|>»",
    ),
    "qwen3, thinking": (
        kinds.QWEN3,
        thinking(TALK),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nhmm\n</think>\n\nd<|im_end|>»",
    ),
    "r1": (
        kinds.DEEPSEEK_R1,
        TALK,
        "<|bos|><|User|>a<|Assistant|>«b<|eos|>»<|User|>c<|Assistant|><think>\n\n</think>\n\n«d<|eos|>»",
    ),
    "r1, thinking": (
        kinds.DEEPSEEK_R1,
        thinking(TALK),
        "<|bos|><|User|>a<|Assistant|>«b<|eos|>»<|User|>c<|Assistant|><think>\n«hmm\n</think>\n\nd<|eos|>»",
    ),
    "r1, thought in the content": (
        kinds.DEEPSEEK_R1,
        (*TALK[:3], {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nd"}),
        "<|bos|><|User|>a<|Assistant|>«b<|eos|>»<|User|>c<|Assistant|><think>\n«hmm\n</think>\n\nd<|eos|>»",
    ),
    "v3.1": (
        kinds.DEEPSEEK_V31,
        TALK,
        "<|bos|><|User|>a<|Assistant|></think>«b<|eos|>»<|User|>c<|Assistant|></think>«d<|eos|>»",
    ),
    "v3.1, thinking": (
        kinds.DEEPSEEK_V31,
        thinking(TALK),
        "<|bos|><|User|>a<|Assistant|></think>«b<|eos|>»<|User|>c<|Assistant|><think>«hmm\n</think>\n\nd<|eos|>»",
    ),
    "glm": (
        kinds.GLM,
        TALK,
        "<|user|>\na/nothink<|assistant|>\n<think></think>«\nb»<|user|>\nc/nothink<|assistant|>\n<think></think>«\nd<|end|>»",
    ),
    "glm, thinking": (
        kinds.GLM,
        thinking(TALK),
        "<|user|>\na<|assistant|>«\n<think></think>\nb»<|user|>\nc<|assistant|>«\n<think>hmm</think>\nd<|end|>»",
    ),
    "harmony": (
        kinds.HARMONY,
        TALK,
        "<|start|>system<|message|>You are a model.<|end|><|start|>user<|message|>a<|end|><|start|>assistant"
        "«<|channel|>final<|message|>b<|end|>»<|start|>user<|message|>c<|end|><|start|>assistant"
        "«<|channel|>final<|message|>d<|return|>»",
    ),
    "harmony, thinking": (
        kinds.HARMONY,
        thinking(TALK[2:]),
        "<|start|>system<|message|>You are a model.<|end|><|start|>user<|message|>c<|end|><|start|>assistant"
        "«<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>»",
    ),
    "marked": (kinds.MARKED, TALK, "U: a\nA: «b|»\nU: c\nA: «d|»\n"),
    "no end": (kinds.NO_END, TALK, "user: a\nassistant: «b»\nuser: c\nassistant: «d<|end|>»"),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_renderings(write, kind) -> None:
    template, messages, expected = GOLDEN[kind]
    assert write(template, messages)[0] == expected


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_last_turn_alone(write, kind) -> None:
    template, messages, expected = GOLDEN[kind]
    first, _, last = expected.rpartition("«")
    assert write(template, messages, turns="last")[0] == first.replace("«", "").replace("»", "") + "«" + last


CALLS = {
    "qwen3": (
        kinds.QWEN3,
        '«<tool_call>\n{"name": "find", "arguments": {"key": "x"}}\n</tool_call><|im_end|>»',
        "«b<|im_end|>»",
    ),
    "mistral": (
        kinds.MISTRAL,
        '«[TOOL_CALLS] [{"name": "find", "arguments": {"key": "x"}, "id": "74196fe72"}]</s>»',
        "« b</s>»",
    ),
    "glm": (kinds.GLM, "«\n<tool_call>find<arg>key=x</arg></tool_call>»", "«\nb<|end|>»"),
    "r1": (kinds.DEEPSEEK_R1, '«<|call|>find\n```json\n{"key": "x"}\n```<|call_end|><|eos|>»', "«b<|eos|>»"),
    "harmony": (
        kinds.HARMONY,
        '« to=functions.find<|channel|>commentary json<|message|>{"key": "x"}<|call|>»',
        "«<|channel|>final<|message|>b<|return|>»",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_tool_calls_are_response(write, kind) -> None:
    """Templates want arguments as a mapping or as text, and ids of any kind or of nine letters."""
    template, call, answer = CALLS[kind]
    text, _ = write(template, TRAJECTORY, TOOLS)
    assert call in text
    assert text.endswith(answer)
    assert text.count("«") == 2
    assert "found" in text
    assert "find" in text.partition("«")[0] or kind in (
        "mistral",
        "r1",
        "glm",
    )  # tools reach the templates that write them


def test_templates_that_lose_tool_calls_are_refused(write) -> None:
    with pytest.raises(DataError, match=r"line 1: the chat template does not write tool calls.*--chat-template FILE"):
        write(kinds.CHATML, TRAJECTORY, TOOLS)
    with pytest.raises(DataError, match="does not write tool calls"):  # the tools' names are no calls
        write("{% for t in tools %}{{ t | tojson }}{% endfor %}" + kinds.CHATML, TRAJECTORY, TOOLS)


def test_what_a_template_leaves_out_is_said(write) -> None:
    _, notes = write(kinds.CHATML, thinking(TALK), TOOLS)
    assert [note for note in notes if "writes no thoughts" in note]
    assert [note for note in notes if "does not write the tools" in note]
    dropping = "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}"
    _, notes = write(dropping, ({"role": "system", "content": "be kind"}, *TALK))
    assert notes[0] == "The chat template does not write messages of role 'system' as they are."


def test_developers_speak_as_the_system_where_a_template_knows_none(write) -> None:
    text, notes = write(kinds.CHATML, ({"role": "developer", "content": "s"}, *TALK))
    assert text.startswith("<|im_start|>system\ns<|im_end|>\n")
    assert "no developer role" in notes[0]


def test_thoughts_of_a_trajectory(write) -> None:
    """A thought before a call is response as well."""
    messages = (TRAJECTORY[0], {**TRAJECTORY[1], "reasoning_content": "look"}, *TRAJECTORY[2:])
    text, _ = write(kinds.QWEN3, messages)
    assert "assistant\n«<think>\nlook\n</think>\n\n<tool_call>" in text
    text, _ = write(kinds.HARMONY, messages)
    assert "assistant«<|channel|>analysis<|message|>look<|end|><|start|>assistant to=functions.find" in text


def test_a_switch_of_the_user_stays(write) -> None:
    text, notes = write(kinds.QWEN3, TALK, template_args={"enable_thinking": True})
    assert text.endswith("<|im_start|>assistant\n«<think>\n\n</think>\n\nd<|im_end|>»")
    assert not notes


ANY_TEXT = st.text(st.characters(codec="ascii", exclude_characters="<>|[]"), min_size=1, max_size=8).map(
    lambda text: f"x{text}x"
)


@given(talk=st.lists(ANY_TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@settings(max_examples=40, deadline=None)
def test_spans_hold_the_answers_and_their_ends(tokenizer, talk) -> None:
    """Whatever is said, also the same twice: every span is one answer with its end."""
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk))
    for template, end in ((kinds.CHATML, "<|im_end|>"), (kinds.QWEN3, "<|im_end|>"), (kinds.DEEPSEEK_R1, "<|eos|>")):
        tokeniser = Tokeniser(tokenizer, None, TokenOptions(chat_template=template))
        example = tokeniser.example(Record(0, "line 1", messages=messages))
        assert [tokenizer.decode(example.tokens[slice(*span)]) for span in example.spans] == [
            text + end for text in talk[1::2]
        ]


def test_conversations_that_wait_for_an_answer(write) -> None:
    text, _ = write(kinds.CHATML, TALK[:3])
    assert text.endswith("<|im_start|>assistant\n«b<|im_end|>»\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")


def test_what_was_done_is_said_once(tokenizer) -> None:
    tokeniser = Tokeniser(tokenizer, None, TokenOptions(chat_template=kinds.DEEPSEEK_R1))
    for _ in range(3):
        tokeniser.example(Record(0, "line 1", messages=TALK))
    notes = tokeniser.fresh_notes()
    assert len(notes) == len(set(notes))
    assert any("closed empty" in note for note in notes)
    tokeniser.example(Record(0, "line 1", messages=TALK))
    assert tokeniser.fresh_notes() == []
