"""Text of foreign origin (names of files and models, records, messages of libraries), made safe to show."""

from __future__ import annotations

import re
from unicodedata import category

_MARKDOWN = re.compile(r"[\\`*_\[\]|~#$]")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def printable(text: str) -> str:
    r"""Text whose control characters, other than tab and line feed, are spelled out: ``\x1b`` for ESC.

    A terminal acts on them, and those that turn the writing direction let a name look like another one.
    """
    return "".join(letter if _shows(letter) else _spelled(letter) for letter in text)


def _shows(letter: str) -> bool:
    return letter in "\t\n" or category(letter) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _spelled(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def in_markdown(text: object) -> str:
    """Text as it is, for a line of Markdown: nothing in it is a tag, a link or emphasis."""
    line = printable(str(text)).replace("\n", " ").replace("\t", " ")
    return _MARKDOWN.sub(r"\\\g<0>", line).translate(_HTML)


def in_code(text: object) -> str:
    """Text as a code span of Markdown, in which nothing is interpreted; its fence is longer than any in the text."""
    line = printable(str(text)).replace("\n", " ")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def one_line(text: str) -> str:
    """Foreign text on one line, control characters spelled out."""
    return printable(text).replace("\n", " ").replace("\t", " ")
