from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.evaluation.falls import Pairs
from shape_moe.evaluation.tool_call_formats import ToolCall, calls_of_message, parse_calls
from shape_moe.evaluation.tool_calls import ToolExample, call_problem, compare_calls, match_calls

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"name": "get_time", "input_schema": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, TIME]


def hermes(name: str, arguments: dict) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def mark(name: str) -> str:
    """A special token of DeepSeek's."""
    return f"<\uff5ctool▁{name}\uff5c>"


FORMATS = {
    "hermes": hermes,
    "thinking": lambda name, a: f"<think>Maybe <tool_call>no</tool_call></think>\n\n{hermes(name, a)}<|im_end|>",
    "mistral": lambda name, a: f"[TOOL_CALLS] [{json.dumps({'name': name, 'arguments': a})}]</s>",
    "mistral, named": lambda name, a: f"[TOOL_CALLS]{name}[ARGS]{json.dumps(a)}</s>",
    "mistral, with id": lambda name, a: f"[TOOL_CALLS]{name}[CALL_ID]abc123[ARGS]{json.dumps(a)}</s>",
    "llama": lambda name, a: json.dumps({"name": name, "parameters": a}) + "<|eot_id|>",
    "llama, typed": lambda name, a: json.dumps({"type": "function", "name": name, "parameters": a}),
    "llama, tag": lambda name, a: "<|python_tag|>" + json.dumps({"name": name, "parameters": a}) + "<|eom_id|>",
    "llama, function": lambda name, a: f"<function={name}>{json.dumps(a)}</function>",
    "deepseek v3": lambda name, a: (
        mark("calls▁begin")
        + mark("call▁begin")
        + "function"
        + mark("sep")
        + f"{name}\n```json\n{json.dumps(a)}\n```"
        + mark("call▁end")
        + mark("calls▁end")
    ),
    "deepseek v3.1": lambda name, a: (
        mark("calls▁begin") + mark("call▁begin") + name + mark("sep") + json.dumps(a) + mark("call▁end")
    ),
    "kimi": lambda name, a: (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{json.dumps(a)}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "harmony": lambda name, a: (
        "<|channel|>analysis<|message|>The user asks.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.{name} <|constrain|>json<|message|>{json.dumps(a)}<|call|>"
    ),
    "harmony, role first": lambda name, a: (
        f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{json.dumps(a)}<|call|>"
    ),
    "granite": lambda name, a: "<|tool_call|>" + json.dumps([{"name": name, "arguments": a}]) + "<|end_of_text|>",
    "fenced": lambda name, a: "```json\n" + json.dumps({"name": name, "arguments": a}) + "\n```",
}
words = st.text(st.characters(codec="ascii", exclude_characters="<>|`[]"))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | words | st.floats(-9, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
arguments_of_any_kind = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=4)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=40, deadline=None)
@given(arguments=arguments_of_any_kind)
def test_a_call_is_read_whatever_its_format(form, arguments) -> None:
    (call,) = parse_calls(FORMATS[form]("get_weather", arguments), TOOLS)
    assert call.problem is None
    assert call.key == ToolCall("get_weather", arguments).key


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_that_breaks_off_is_a_call_that_cannot_be_read(form) -> None:
    whole = FORMATS[form]("get_weather", {"city": "Paris", "days": 3})
    broken = whole[: whole.index(" 3")]
    made = parse_calls(broken, TOOLS)
    assert len(made) == 1
    assert made[0].problem is not None
    assert made[0].name == "get_weather"
    match = match_calls((ToolCall("get_weather", {"city": "Paris", "days": 3}),), made, TOOLS)
    assert match.made
    assert match.name
    assert not match.arguments
    assert match.valid is False


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_text_is_too_odd(form, data) -> None:
    whole = FORMATS[form]("get_weather", {"city": "Paris"})
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    for text in (whole[start:end], whole[:end] + data.draw(st.text(max_size=20)) + whole[end:]):
        for call in parse_calls(text, TOOLS):
            assert (call.arguments is None) == (call.problem is not None)


@given(st.text())
def test_plain_text_makes_no_call(text) -> None:
    assert parse_calls("It is sunny. " + text.replace("<", "").replace("[", "").replace("to=", "")) == ()


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        '{"city": "Paris", "days": 3}',
        'Use {"name": "get_weather", "parameters": {}} to ask.',
        "<think>I could say <tool_call>{}</tool_call></think>No need.",
        "",
        "[1, 2]",
    ],
)
def test_answers_that_make_no_call(text) -> None:
    assert parse_calls(text, TOOLS) == ()


def test_several_calls() -> None:
    paris, rome = ToolCall("get_weather", {"city": "Paris"}), ToolCall("get_weather", {"city": "Rome"})
    texts = [
        hermes("get_weather", {"city": "Paris"}) + "\n" + hermes("get_weather", {"city": "Rome"}),
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_weather", "arguments": {"city": "Rome"}}]',
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_weather", "parameters": {"city": "Rome"}}',
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}'
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}',
    ]
    for text in texts:
        assert parse_calls(text, TOOLS) == (paris, rome)
    assert match_calls((rome, paris), (paris, rome), TOOLS).right
    assert not match_calls((rome, paris), (paris, paris), TOOLS).right
    assert not match_calls((rome, paris), (paris,), TOOLS).name


def test_arguments_in_tags_have_the_types_of_the_schema() -> None:
    expected = (ToolCall("get_weather", {"city": "75000", "days": 3}),)
    qwen = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n75000\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    glm = (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>75000</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>"
    )
    assert parse_calls(qwen, TOOLS) == expected
    assert parse_calls(glm, TOOLS) == expected
    assert call_problem(parse_calls(glm, TOOLS)[0], TOOLS) is None
    assert parse_calls("<tool_call>get_time</tool_call>", TOOLS) == (ToolCall("get_time", {}),)
    assert parse_calls(glm[: glm.index("3</arg")], TOOLS)[0].problem == "an argument is not complete"


def test_built_in_tools_of_llama() -> None:
    assert parse_calls('<|python_tag|>brave_search.call(query="weather, Paris")<|eom_id|>') == (
        ToolCall("brave_search", {"query": "weather, Paris"}),
    )
    for text in ("x) + (y", "query=open('f')", "query={1}", "'unnamed'"):
        assert parse_calls(f"<|python_tag|>brave_search.call({text})")[0].problem is not None


def test_messages_of_a_server() -> None:
    def message(arguments) -> dict:
        call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    expected = (ToolCall("get_weather", {"city": "Paris"}),)
    assert calls_of_message(message('{"city": "Paris"}')) == expected
    assert calls_of_message(message({"city": "Paris"})) == expected
    assert calls_of_message(
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    )
    assert calls_of_message(message('{"city": '))[0].problem is not None
    assert calls_of_message({"role": "assistant", "content": "Fine."}) == ()
    assert calls_of_message({"role": "assistant", "content": hermes("get_weather", {"city": "Paris"})}) == expected
    assert calls_of_message({"tool_calls": ["odd"]})[0].problem is not None
    assert calls_of_message({"tool_calls": "odd"})[0].problem is not None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": 1}, {"a": 1.0}, True), ({"a": 1}, {"a": True}, False),
        ({"a": "1"}, {"a": 1}, False), ({"a": [1, 2]}, {"a": [2, 1]}, False), ({}, {"a": None}, False),
        ({"a": {"b": 2.0}}, {"a": {"b": 2}}, True),
    ],
)  # fmt: skip
def test_what_equal_arguments_are(one, other, same) -> None:
    assert match_calls((ToolCall("f", one),), (ToolCall("f", other),), ()).arguments is same


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (ToolCall("get_weather", {"city": "Paris"}), None),
        (ToolCall("get_time", {"anything": 1}), None),
        (ToolCall("get_weather", {"city": 3}), "3 is not of type 'string'"),
        (ToolCall("get_weather", {"days": 3}), "'city' is a required property"),
        (ToolCall("get_weather", {"city": "x", "days": 0}), "0 is less than the minimum of 1"),
        (ToolCall("forecast", {}), "there is no function 'forecast'"),
    ],
)
def test_arguments_are_held_to_the_schema(call, problem) -> None:
    assert call_problem(call, TOOLS) == problem


def test_a_schema_that_is_none_says_nothing() -> None:
    broken = [{"name": "f", "parameters": {"type": "no type"}}]
    elsewhere = [{"name": "f", "parameters": {"$ref": "https://example.com/schema.json"}}]
    for tools in (broken, elsewhere):
        with pytest.raises(ValueError, match="not a JSON schema"):
            call_problem(ToolCall("f", {}), tools)
        assert match_calls((ToolCall("f", {}),), (ToolCall("f", {}),), tools).valid is None


def test_deep_nesting_is_a_call_that_cannot_be_read() -> None:
    for depth in (200, 100_000):
        text = '{"name": "f", "parameters": ' + '{"a": ' * depth + "1" + "}" * depth + "}"
        assert parse_calls(text)[0].problem is not None


def test_what_both_models_got_right_is_counted() -> None:
    """Against a count by hand over all combinations of reference, dense and pruned answers."""
    right, other, none = (ToolCall("get_weather", {"city": "Paris"}),), (ToolCall("get_weather", {"city": 7}),), ()
    answers = [right, other, none]
    examples = [ToolExample(TOOLS, right, right, pruned) for pruned in answers]
    examples += [ToolExample(TOOLS, none, none, pruned) for pruned in answers]
    examples += [ToolExample(TOOLS, right, dense, right) for dense in answers]
    found = compare_calls(examples)
    assert found["right"] == Pairs(9, 7, 4, 2)
    assert found["decision"] == Pairs(9, 8, 3, 1)
    assert found["made"] == Pairs(6, 5, 1, 1)
    assert found["name"] == Pairs(6, 5, 1, 1)
    assert found["arguments"] == Pairs(6, 4, 2, 2)
    assert found["valid"] == Pairs(6, 4, 2, 2)
    assert compare_calls([]) == {}


def test_the_dense_model_is_the_reference_where_it_differs_from_the_data() -> None:
    mine, data = (ToolCall("get_weather", {"city": "Paris"}),), (ToolCall("get_time", {}),)
    for reference in (data, None):
        found = compare_calls([ToolExample(TOOLS, reference, mine, mine), ToolExample(TOOLS, reference, mine, ())])
        assert found["right"] == Pairs(2, 2, 1, 0)
