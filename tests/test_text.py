"""Names of hostile files, as they are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.text import in_code, in_markdown, printable


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("gsm8k-train.jsonl", "gsm8k-train.jsonl"),
        ("Bücher, 数学 und 🦊", "Bücher, 数学 und 🦊"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2Jgone\x07", r"\x1b[2Jgone\x07"),
        ("a\x9b31mred", r"a\x9b31mred"),
        ("txt.\u202elnosj", r"txt.\u202elnosj"),
        ("\x7f\r\x00", r"\x7f\x0d\x00"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_control_characters_are_spelled_out(raw, shown) -> None:
    assert printable(raw) == shown


@given(st.text())
def test_what_is_shown_is_printable_and_stays_so(raw) -> None:
    shown = printable(raw)
    assert all(letter.isprintable() or letter in "\t\n" or not letter.isascii() for letter in shown)
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("raw", "markdown"),
    [
        ("data/gsm8k-train.jsonl", "data/gsm8k-train.jsonl"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("[a](javascript:b) *c* _d_ `e` | #f ~g~ $h$", r"\[a\](javascript:b) \*c\* \_d\_ \`e\` \| \#f \~g\~ \$h\$"),
        ("a\n# b\x1b", r"a \# b\\x1b"),
        ("Q&amp;A", "Q&amp;amp;A"),
    ],
)
def test_markdown_shows_text_as_it_is(raw, markdown) -> None:
    assert in_markdown(raw) == markdown


@pytest.mark.parametrize(
    ("raw", "code"),
    [("a_b", "`a_b`"), ("`", "`` ` ``"), ("a``b`c", "```a``b`c```"), ("<b>\n\x1b", r"`<b> \x1b`"), ("", "``")],
)
def test_code_shows_text_as_it_is(raw, code) -> None:
    assert in_code(raw) == code
