"""Conversations as a chat template writes them, and which characters of that the assistant wrote."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.calibration.schema import Message, parse_json
from shape_moe.calibration.thoughts import find_switches, find_thought
from shape_moe.calibration.tool_calls import STYLES, Style, calls_are_written, probe
from shape_moe.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "\ue000answer\ue001"
"""Stands for a turn while its place is looked for; private characters, which no text and no template has."""
_END = re.compile(r"<\|(?:end|im_end|eot|eot_id|eom_id|call|return|eos|endoftext|end_of_turn)\|>|</s>|<end_of_turn>")
"""Ends of turns, for templates that end the last turn in another way than the others."""
_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")


def read_chat_template(path: str | os.PathLike[str]) -> str:
    """A chat template from a Jinja file, or from a JSON file that has it under ``chat_template``.

    Raises:
        DataError: when the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The chat template {path} cannot be read: {first_line(error)}.") from error
    if Path(path).suffix.lower() == ".json":
        content = parse_json(text, str(path))
        if not isinstance(content, dict) or not isinstance(content.get("chat_template"), str):
            raise DataError(f"{path} has no chat_template that is text.")
        return str(content["chat_template"])
    return text


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the template wrote.
        spans: half-open ranges of characters that the assistant wrote, in order.
        ends: whether the text ends as a turn does; if not, the end-of-sequence token is missing.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: bool = True


class ChatTemplate:
    """A tokenizer's chat template, or another one, applied to conversations.

    Args:
        tokenizer: the model's tokenizer.
        template: a template instead of the tokenizer's own.
        args: extra variables of the template.

    Attributes:
        notes: what was done to conversations, each said once, in order.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, args: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer, self._override, self._args = tokenizer, template, dict(args or {})
        own = template or tokenizer.chat_template
        self.text = own if isinstance(own, str) else "\n".join(map(str, (own or {}).values()))
        self.thought = find_thought(self.text)
        self._style: Style | None = None
        self.notes: dict[str, None] = {}

    @property
    def hash(self) -> str:
        """sha256 of the template."""
        own = self._override or self._tokenizer.chat_template
        return f"sha256:{hashlib.sha256(str(own).encode()).hexdigest()}"

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the assistant writes (``{% generation %}``)."""
        return bool(_GENERATION.search(self.text))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> str:
        """What the model continues: the conversation without a final answer."""
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return self._write(self._prepared(messages, tools, where)[: len(asked)], tools, where, answer_next=True)

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str, *, all_turns: bool = True
    ) -> Rendered:
        """The whole conversation, and what of it the assistant wrote.

        Args:
            messages: the messages; where the last is not the assistant's, the text ends where it would begin.
            tools: functions that the assistant may call.
            where: for messages.
            all_turns: every turn of the assistant, or the last one alone.

        Raises:
            DataError: when the template refuses the conversation, or a turn cannot be found in what it writes.
        """
        messages = self._prepared(messages, tools, where)
        writer = _Writer(self, tools, where, self._switched(messages, tools, where))
        answered = messages[-1]["role"] == "assistant"
        before = messages[:-1] if answered else messages
        head = writer.write(before, answer_next=True)
        turns = [place for place, message in enumerate(before) if message["role"] == "assistant"]
        spans = [
            writer.turn(head, before, place) for place in turns if all_turns or (not answered and place == turns[-1])
        ]
        if not answered:
            return Rendered(head, tuple(spans))
        prompt, answer, ends = writer.answer(head, messages)
        if str(messages[-1].get("reasoning_content", "")).strip() not in answer:
            self.said("The chat template writes no thoughts (reasoning_content): they are left out.")
        return Rendered(prompt + answer, (*spans, (len(prompt), len(prompt) + len(answer))), ends)

    def masked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str
    ) -> tuple[list[int], list[int]] | None:
        """Tokens, and the template's own mask of what the assistant wrote; None where it marks nothing."""
        messages = self._prepared(messages, tools, where)
        switch = self._switched(messages, tools, where)
        answered = messages[-1]["role"] == "assistant"
        if self.thought and answered:
            head = self._write(messages[:-1], tools, where, answer_next=True, **switch)
            if self.thought.begun_by(head):
                return None
        try:
            found = self._apply(
                messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                add_generation_prompt=not answered, **switch,
            )  # fmt: skip
        except Exception as error:
            raise self._refusal(where, error) from error
        mask = [int(value) for value in found.get("assistant_masks", [])]
        return (list(found["input_ids"]), mask) if any(mask) else None

    def said(self, note: str) -> None:
        """Remember what there is to say."""
        self.notes.setdefault(note)

    def _prepared(self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> list[Message]:
        """Messages as this template wants them."""
        found = list(messages)
        if self.thought:
            found = [self.thought.split(message) for message in found]
        if "developer" not in self.text and any(message["role"] == "developer" for message in found):
            self.said("The chat template has no developer role: such messages are written as the system's.")
            found = [{**m, "role": "system"} if m["role"] == "developer" else m for m in found]
        if not any(message.get("tool_calls") for message in found):
            found = STYLES[0].shaped(found)
            self._check_written(found, tools, where)
            return found
        found = self._styled(found, tools, where)
        self._check_written(found, tools, where)
        return found

    def _styled(self, messages: list[Message], tools: Sequence[Any] | None, where: str) -> list[Message]:
        """Messages whose tool calls the template writes, in the first style that it writes right."""
        reason: Exception | None = None
        for style in [*([self._style] if self._style else []), *STYLES]:
            shaped = style.shaped(messages)
            try:
                self._apply(shaped, tools, tokenize=False, add_generation_prompt=False)
                text = self._apply(style.shaped(probe(messages)), tools, tokenize=False, add_generation_prompt=False)
            except Exception as error:  # noqa: BLE001 -- templates are programs and raise what they like
                reason = reason or error
                continue
            if calls_are_written(shaped, str(text)):
                if style.arguments == "text" and not self._style:
                    self.said("The chat template takes the arguments of tool calls as JSON text.")
                self._style = style
                return shaped
        if reason is not None:
            raise self._refusal(where, reason) from reason
        raise DataError(
            f"{where}: the chat template does not write tool calls, so they would be lost; give one that does with "
            "--chat-template FILE."
        )

    def _check_written(self, messages: list[Message], tools: Sequence[Any] | None, where: str) -> None:
        """Say what the template leaves out."""
        text = self._write(messages, tools, where, answer_next=False)
        for message in messages:
            content = str(message.get("content") or "").strip()
            escaped = json.dumps(content, ensure_ascii=False)[1:-1]
            if content and message["role"] != "assistant" and content not in text and escaped not in text:
                self.said(f"The chat template does not write messages of role {message['role']!r} as they are.")
        if tools and text == self._write(messages, None, where, answer_next=False):
            self.said("The chat template does not write the tools of a record: they are left out.")

    def _switched(self, messages: list[Message], tools: Sequence[Any] | None, where: str) -> dict[str, Any]:
        """The template's switch for thoughts, as the data has it; empty where it makes no difference."""
        if messages[-1]["role"] != "assistant" or self.thought is None:
            return {}
        thoughts = [message.get("reasoning_content") for message in messages if message.get("reasoning_content")]
        for name in find_switches(self.text):
            if name in self._args:
                continue
            plain = self._write(messages, tools, where, answer_next=False)
            head = self._write(messages[:-1], tools, where, answer_next=True)
            if thoughts:
                on = self._write(messages, tools, where, answer_next=False, **{name: True})
                head = self._write(messages[:-1], tools, where, answer_next=True, **{name: True})
                written = str(thoughts[-1]).strip() in on or self.thought.begun_by(head)
                if str(thoughts[-1]).strip() not in plain and written:
                    self.said(f"Thoughts are in the data: the chat template's {name} is on where they are.")
                    return {name: True}
            elif (plain, head) != (
                self._write(messages, tools, where, answer_next=False, **{name: False}),
                self._write(messages[:-1], tools, where, answer_next=True, **{name: False}),
            ):
                self.said(f"Answers without thoughts: the chat template's {name} is off for them.")
                return {name: False}
        return {}

    def _write(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, where: str, *, answer_next: bool, **args: Any
    ) -> str:
        try:
            return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=answer_next, **args))
        except Exception as error:  # templates are programs and raise what they like
            raise self._refusal(where, error) from error

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any] | None, **args: Any) -> Any:
        more: dict[str, Any] = {"chat_template": self._override} if self._override else {}
        more |= {"tools": list(tools)} if tools else {}
        return self._tokenizer.apply_chat_template(list(messages), **more, **{**self._args, **args})

    @staticmethod
    def _refusal(where: str, error: Exception) -> DataError:
        reason = f"{where}: the chat template refuses this conversation: {first_line(error)}"
        return DataError(f"{reason} (another template is given with --chat-template FILE)")


class _Writer:
    """One conversation on its way to text."""

    def __init__(self, chat: ChatTemplate, tools: Sequence[Any] | None, where: str, switch: dict[str, Any]) -> None:
        self.chat, self.tools, self.where, self.switch = chat, tools, where, switch

    def write(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        if not messages:
            return ""
        return self.chat._write(messages, self.tools, self.where, answer_next=answer_next, **self.switch)  # noqa: SLF001 -- its other half

    def turn(self, text: str, messages: list[Message], place: int) -> tuple[int, int]:
        """The range of one of the assistant's turns in a conversation that goes on after it."""
        before, stand_in = messages[:place], {"role": "assistant", "content": _SENTINEL}
        head = self._head(before)
        follows = bool(head) and text.startswith(head)
        through = self.write(messages[: place + 1], answer_next=False).rstrip()
        if follows and len(through) > len(head) and text.startswith(through):
            return len(head), len(through)
        other = self.write([*before, stand_in, *messages[place + 1 :]], answer_next=True)
        found = other.find(_SENTINEL)
        begin = len(head) if follows else min(found, _common(text, other))
        if len(through) > begin >= 0 and text.startswith(through):
            return begin, len(through)
        shared = min(len(other) - found - len(_SENTINEL), _common(text[::-1], other[::-1]))
        end = len(text) - shared
        if found < 0 or end <= begin:
            raise DataError(
                f"{self.where}: turn {place + 1} of the conversation cannot be found in what the chat template writes; "
                "--turns last counts the last answer alone, --chat-template FILE gives another template."
            )
        return begin, end + self._ending(text[end:], before)

    def answer(self, head: str, messages: list[Message]) -> tuple[str, str, bool]:
        """Prompt and answer of a conversation that the assistant ends, and whether the answer has its end."""
        thought, reasoning = self.chat.thought, messages[-1].get("reasoning_content")
        whole = self.write(messages, answer_next=False)
        other = self.write([*messages[:-1], {"role": "assistant", "content": _SENTINEL}], answer_next=False)
        found = other.find(_SENTINEL)
        end = other[found + len(_SENTINEL) :] if found >= 0 else ""
        inside = thought is not None and thought.begun_by(head)
        if whole.startswith(head):
            rest = whole[len(head) :]
        elif found >= 0:
            rest = whole[_common(whole, other) :]
            self.chat.said(
                "The chat template writes an answer differently from where it lets the model begin one: examples are "
                "the latter, the answer and its end."
            )
        else:
            raise DataError(
                f"{self.where}: the answer cannot be found in what the chat template writes; give another one with "
                "--chat-template FILE, or leave the answer out."
            )
        if inside and thought is not None:
            head, rest = self._after_thought(head, rest, reasoning)
        return self._ended(head, rest, end)

    def _after_thought(self, head: str, rest: str, reasoning: str | None) -> tuple[str, str]:
        """Prompt and answer where the prompt has begun a thought."""
        thought = self.chat.thought
        assert thought is not None
        if reasoning:
            if reasoning.strip() in rest:
                return head, rest.lstrip().removeprefix(thought.open).lstrip("\n")
            self.chat.said(f"The thoughts in the data are written before the answer, and closed by {thought.close}.")
            return head, f"{reasoning.strip()}\n{thought.close}\n\n{rest}"
        shut = re.match(rf"\s*{re.escape(thought.close)}\n*", rest)
        if shut:
            return head + shut[0], rest[shut.end() :]
        self.chat.said(
            "Answers without thoughts: the thought that the chat template begins is closed empty before them."
        )
        return head + thought.closing(head), rest

    def _ended(self, head: str, rest: str, end: str) -> tuple[str, str, bool]:
        """The answer with the mark that ends a turn, and without the space that follows that."""
        mark = end.rstrip()
        if end and rest.endswith(end):
            rest = rest[: len(rest) - len(end)] + mark
            return head, rest, bool(mark)
        trimmed = rest.rstrip()
        other = any(match.end() == len(trimmed) for match in _END.finditer(trimmed))
        marked = other or (bool(mark) and trimmed.endswith(mark))
        return head, trimmed if marked else rest, marked

    def _head(self, before: list[Message]) -> str:
        try:
            return self.write(before, answer_next=True)
        except DataError:
            return ""

    def _ending(self, following: str, before: list[Message]) -> int:
        """How many of the characters after a turn's content end the turn."""
        alone = self.write([*before, {"role": "assistant", "content": _SENTINEL}], answer_next=False)
        end = alone[alone.find(_SENTINEL) + len(_SENTINEL) :].rstrip() if _SENTINEL in alone else ""
        if end and following.startswith(end):
            return len(end)
        mark = _END.match(following)
        return mark.end() if mark else 0


def _common(first: str, second: str) -> int:
    """Length of the common beginning."""
    return len(os.path.commonprefix([first, second]))  # noqa: RUF071 -- characters are what counts
