"""What the command said, held against what a user may expect of it."""

from __future__ import annotations


def refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """One clear sentence on stderr, nothing on stdout, no traceback."""
    assert result[0] == code, result
    assert result[1] == ""
    assert "Traceback" not in result[2]
    assert result[2].startswith(("Error: ", "Usage: ")) or "Error" in result[2]
    for word in words:
        assert word in " ".join(result[2].split()), result[2]
