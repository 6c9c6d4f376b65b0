"""Where a template has its assistant think before it answers, and how a thought ends."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shape_moe.calibration.schema import Message

_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thoughts on and off."""


@dataclass(frozen=True)
class Thought:
    """The tags around a thought."""

    open: str
    close: str

    def begun_by(self, text: str) -> bool:
        """Whether a text ends inside a thought that has only just begun."""
        return text.rstrip().endswith(self.open)

    def closing(self, text: str) -> str:
        """What ends the thought that a text begins, so that it is empty."""
        gap = text[len(text.rstrip()) :]
        return f"{'' if gap.count(chr(10)) > 1 else chr(10) * (2 - gap.count(chr(10)))}{self.close}\n\n"

    def split(self, message: Message) -> Message:
        """A message whose content begins with a thought, with the thought in a field of its own."""
        content = (message.get("content") or "").lstrip()
        thought, found, answer = content.removeprefix(self.open).partition(self.close)
        if message["role"] != "assistant" or message.get("reasoning_content") or not found:
            return message
        if not content.startswith(self.open) and self.open in thought:
            return message
        return {**message, "reasoning_content": thought.strip("\n"), "content": answer.lstrip("\n")}


def find_thought(template: str) -> Thought | None:
    """The tags that a template puts around thoughts, None for one that knows of none."""
    return next((Thought(*tags) for tags in _TAGS if any(tag in template for tag in tags)), None)


def find_switches(template: str) -> list[str]:
    """Variables of a template that may turn its thoughts off."""
    return [name for name in _SWITCHES if re.search(rf"(?<![.\w'\"]){name}\b(?!['\"])", template)]
