"""Tool calls in answers, in the formats that models write."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DEEPEST = 100
_NOT_JSON = "its arguments are not JSON"


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer makes.

    Attributes:
        name: the function, None where it could not be read.
        arguments: its arguments by name, None where they could not be read.
        problem: why the call could not be read, None where it could.
    """

    name: str | None
    arguments: Mapping[str, Any] | None
    problem: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What is equal for calls that do the same: key order, spaces and ``1`` for ``1.0`` do not count."""
        return self.name or "", "" if self.arguments is None else json.dumps(
            _plain(self.arguments), sort_keys=True, default=str
        )


Calls = tuple[ToolCall, ...]
Tools = Sequence[Mapping[str, Any]]


def calls_of_message(message: Mapping[str, Any]) -> Calls:
    """The calls of an assistant's message: its ``tool_calls`` (or ``function_call``), else what its text holds."""
    made = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if made:
        made = made if isinstance(made, list | tuple) else [made]
        return tuple(_call(entry.get("function") or entry if isinstance(entry, Mapping) else entry) for entry in made)
    content = message.get("content")
    return parse_calls(content) if isinstance(content, str) else ()


def parse_calls(text: str, tools: Tools = ()) -> Calls:
    """The calls that an answer's text makes, special tokens included.

    A call that cannot be read is a call all the same. What stands in a thought (``<think>``) is none.

    Args:
        text: the answer.
        tools: the functions that the model was offered: formats without types take them from there.
    """
    said = text.rpartition("</think>")[2]
    for opening, read in _FORMATS:
        if opening.search(said):
            return tuple(read(said, schemas_of(tools)))
    return tuple(_bare(said))


def schemas_of(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """JSON schemas of parameters by function; one that says nothing takes everything."""
    found = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
        assert isinstance(function, Mapping)
        schema = function.get("parameters", function.get("input_schema"))
        if isinstance(schema, str):
            schema = _json(schema)
        found[str(function.get("name"))] = schema if isinstance(schema, Mapping) else {}
    return found


def _json(text: str) -> Any:
    """What JSON text says, None where it is none (or nested beyond reason)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return None if _too_deep(value) else value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for entry in level
            if isinstance(entry, dict | list)
            for child in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return False
    return True


def _plain(value: Any) -> Any:
    """A value whose JSON text is the same for equal values."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _call(entry: Any) -> ToolCall:
    """A call from a mapping with ``name`` and ``arguments`` (or ``parameters``), which may be JSON text."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        return ToolCall(None, None, "it names no function")
    arguments = entry.get("arguments", entry.get("parameters"))
    return _named(entry["name"], arguments)


def _named(name: str, arguments: Any) -> ToolCall:
    name = name.strip().removeprefix("functions.")
    if isinstance(arguments, str):
        arguments = _json(arguments) if arguments.strip() else {}
    if arguments is None:
        return ToolCall(name, None, _NOT_JSON)
    if not isinstance(arguments, Mapping):
        return ToolCall(name, None, "its arguments are not a mapping")
    if _too_deep(arguments):
        return ToolCall(name, None, "its arguments are nested too deep")
    return ToolCall(name, arguments)


def _entries(text: str) -> Iterator[ToolCall]:
    """Calls of a JSON mapping or list of mappings."""
    value = _json(text)
    if value is None:
        name = re.search(r'"name"\s*:\s*"([^"]+)"', text)
        yield ToolCall(name[1] if name else None, None, "it is not JSON")
        return
    for entry in value if isinstance(value, list) else [value]:
        yield _call({"arguments": {}, **entry} if isinstance(entry, Mapping) and "parameters" not in entry else entry)


def _typed(text: str, schema: Mapping[str, Any], name: str) -> Any:
    """The value of an argument that is written without quotes."""
    properties = schema.get("properties")
    about = properties.get(name) if isinstance(properties, Mapping) else None
    value = _json(text)
    textual = isinstance(about, Mapping) and about.get("type") == "string"
    return text if textual or (value is None and text.strip() != "null") else value


Schemas = Mapping[str, Mapping[str, Any]]
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _tagged(text: str, schemas: Schemas) -> Iterator[ToolCall]:
    """``<tool_call>`` blocks (Hermes, Qwen, GLM, Granite): JSON, or functions and arguments in tags."""
    for block in re.findall(r"<\|?tool_call\|?>(.*?)(?:</tool_call>|(?=<\|?tool_call\|?>)|$)", text, re.DOTALL):
        body = block.strip()
        if "<function=" in body:
            yield from _functions(body, schemas)
        elif "<arg_key>" in body or re.fullmatch(r"[\w.\-]+", body):
            name = body.partition("<arg_key>")[0].strip()
            schema = schemas.get(name, {})
            whole = body.count("<arg_key>") == len(_ARGUMENT.findall(body))
            arguments = {key.strip(): _typed(value, schema, key.strip()) for key, value in _ARGUMENT.findall(body)}
            yield ToolCall(name, arguments) if whole else ToolCall(name, None, "an argument is not complete")
        else:
            yield from _entries(re.sub(r"<\|[^|]*\|>|</s>", "", body))


def _functions(text: str, schemas: Schemas) -> Iterator[ToolCall]:
    """``<function=NAME>`` with parameters in tags (Qwen3-Coder) or JSON (Llama)."""
    for name, body in _FUNCTION.findall(text):
        if "<parameter=" in body or not body.strip():
            found = _PARAMETER.findall(body)
            yield ToolCall(name, {key: _typed(value, schemas.get(name, {}), key) for key, value in found})
        else:
            yield _named(name, body)


def _mistral(text: str, _: Schemas) -> Iterator[ToolCall]:
    """``[TOOL_CALLS]`` and a list, or a name, ``[ARGS]`` and arguments for each call."""
    for part in text.split("[TOOL_CALLS]")[1:]:
        body = re.sub(r"</s>.*", "", part, flags=re.DOTALL).strip()
        named = re.fullmatch(r"([\w.\-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(\{.*)?", body, re.DOTALL)
        if named:
            yield _named(named[1], named[2] or "")
        else:
            yield from _entries(body)


def _deepseek(text: str, _: Schemas) -> Iterator[ToolCall]:
    """Calls between DeepSeek's (or Kimi's) marks; arguments in a fence or bare."""
    begin, end = r"<[|\uff5c]tool[▁_]call[▁_]begin[|\uff5c]>", r"<[|\uff5c]tool[▁_]call[▁_]end[|\uff5c]>"
    split = r"<[|\uff5c]tool(?:[▁_]sep|_call_argument_begin)[|\uff5c]>"
    for block in re.findall(f"{begin}(.*?)(?:{end}|(?={begin})|$)", text, re.DOTALL):
        head, *rest = re.split(split, block, maxsplit=1)
        body = rest[0] if rest else ""
        name, fenced = body.partition("\n")[::2] if head.strip() == "function" else (head, body)
        inside = re.search(r"```(?:json)?\s*(.*?)\s*(?:```|$)", fenced, re.DOTALL)
        yield _named(re.sub(r":\d+$", "", name.strip()), inside[1] if inside else fenced.strip())


_HARMONY = re.compile(
    r"to=functions\.([\w.\-]+)(.*?)<\|message\|>(.*?)(?=<\|(?:call|end|return|start)\|>|$)", re.DOTALL
)


def _harmony(text: str, _: Schemas) -> Iterator[ToolCall]:
    """gpt-oss: messages addressed to ``functions.NAME``."""
    found = list(_HARMONY.finditer(text))
    for match in found:
        yield _named(match[1], match[3])
    if not found:
        name = re.search(r"to=functions\.([\w.\-]+)", text)
        yield ToolCall(name[1] if name else None, None, "it has no message")


def _python_tag(text: str, _: Schemas) -> Iterator[ToolCall]:
    """Llama: JSON after ``<|python_tag|>``, several divided by semicolons, or ``tool.call(key=value)``."""
    body = re.sub(r"<\|(?:eom_id|eot_id|end_of_text)\|>.*", "", text.partition("<|python_tag|>")[2], flags=re.DOTALL)
    built_in = re.fullmatch(r"\s*([\w]+)\.call\((.*)\)\s*", body, re.DOTALL)
    if built_in:
        yield _python(built_in[1], built_in[2])
    else:
        yield from _sequence(body)


def _python(name: str, arguments: str) -> ToolCall:
    try:
        parsed = ast.parse(f"f({arguments})", mode="eval").body
        keywords = parsed.keywords if isinstance(parsed, ast.Call) and not parsed.args else None
        if keywords is not None:
            return _named(name, json.dumps({str(word.arg): ast.literal_eval(word.value) for word in keywords}))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        pass  # what is no Python literal is no argument either
    return ToolCall(name, None, "its arguments cannot be read")


def _sequence(text: str) -> Iterator[ToolCall]:
    """JSON mappings one after another, divided by semicolons."""
    rest = text.strip()
    while rest:
        try:
            value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(rest)
        except (ValueError, RecursionError):
            yield from _entries(rest)
            return
        yield from (
            _entries(json.dumps(value)) if not _too_deep(value) else [ToolCall(None, None, "it is nested too deep")]
        )
        rest = rest[end:].lstrip("; \n")


def _bare(text: str) -> Iterator[ToolCall]:
    """An answer that is nothing but JSON calls: mappings with ``name`` and ``parameters`` or ``arguments``."""
    body = re.sub(r"<\|[^|]*\|>|</s>", "", text).strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*(?:```)?", body, re.DOTALL)
    body = fenced[1] if fenced else body
    if re.match(r'\[?\s*\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"', body) and re.search(
        r'"(parameters|arguments)"\s*:', body
    ):
        yield from _sequence(body)


_FORMATS: tuple[tuple[re.Pattern[str], Callable[[str, Schemas], Iterator[ToolCall]]], ...] = (
    (re.compile(r"<\|?tool_call\|?>"), _tagged),
    (re.compile(r"<[|\uff5c]tool[▁_]call[▁_]begin[|\uff5c]>"), _deepseek),
    (re.compile(r"\[TOOL_CALLS\]"), _mistral),
    (re.compile(r"to=functions\."), _harmony),
    (re.compile(r"<\|python_tag\|>"), _python_tag),
    (re.compile(r"<function="), _functions),
)
