"""The six tasks that the embedded model knows, as seeded generators of examples.

Prompts are split by a hash of their text: one in ten is held out and never seen in training, so that
``examples(..., held_out=True)`` is fresh data for any seed.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

END = "\n"
"""Every answer ends with this character; generation stops at it."""

_HELD_OUT_SHARE = 10
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TABLE_SEED = 20260609


@dataclass(frozen=True)
class Task:
    """A task: its name, one line that explains it, and a function that draws one (prompt, answer)."""

    name: str
    description: str
    draw: Callable[[random.Random], tuple[str, str]]


def _addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return f"add {a}+{b}=", str(a + b)[::-1]


def _sorting(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices(string.digits, k=8)
    return f"sort {''.join(digits)}=", "".join(sorted(digits))


def _reversal(rng: random.Random) -> tuple[str, str]:
    letters = "".join(rng.choices(string.ascii_lowercase, k=8))
    return f"rev {letters}=", letters[::-1]


def _key_value(rng: random.Random) -> tuple[str, str]:
    pairs = [key + rng.choice(string.digits) for key in rng.sample(string.ascii_lowercase, 5)]
    return f"keys {' '.join(pairs)}=", " ".join(sorted(pairs))


def _make_table() -> dict[str, str]:
    rng = random.Random(_TABLE_SEED)
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    return {pair: "".join(rng.choices(string.ascii_lowercase, k=2)) for pair in pairs}


TABLE = _make_table()
"""The fixed table of the lookup task: 676 letter pairs to letter pairs."""


def _lookup(rng: random.Random) -> tuple[str, str]:
    pairs = rng.choices(list(TABLE), k=3)
    return f"look {' '.join(pairs)}=", " ".join(TABLE[pair] for pair in pairs)


def number_to_words(number: int) -> str:
    """Spell ``0 <= number <= 9999`` in English words, without hyphens and without "and"."""
    words: list[str] = []
    if number >= 1000:
        words += [_UNITS[number // 1000], "thousand"]
    if number % 1000 >= 100:
        words += [_UNITS[number % 1000 // 100], "hundred"]
    rest = number % 100
    if rest >= 20:
        words.append(_TENS[rest // 10 - 2])
        rest %= 10
    if rest or not words:
        words.append(_UNITS[rest])
    return " ".join(words)


def _words(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(0, 9999)
    return f"words {number}=", number_to_words(number)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("addition", "add two numbers; the sum is written last digit first", _addition),
        Task("sorting", "sort eight digits", _sorting),
        Task("reversal", "reverse eight letters", _reversal),
        Task("key-value", "sort five key-value pairs by key", _key_value),
        Task("lookup", "look three letter pairs up in a table learned by heart", _lookup),
        Task("words", "spell a number in English words", _words),
    )
}


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth of all prompts that training never sees."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_SHARE == 0


def examples(task: str, count: int, *, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    """Draw ``count`` different examples of a task as calibration records.

    Args:
        task: a key of :data:`TASKS`.
        count: how many records; all prompts differ.
        seed: the same seed gives the same records on every machine.
        held_out: draw from the held-out prompts instead of the training prompts.

    Returns:
        Records with the fields ``prompt``, ``response`` (ending with :data:`END`) and ``task``.

    Raises:
        KeyError: for an unknown task.
        ValueError: when the task does not have that many different prompts.
    """
    draw = TASKS[task].draw
    rng = random.Random(f"{task}/{seed}")
    records: dict[str, dict[str, str]] = {}
    attempts_left = 1000 + 200 * count
    while len(records) < count:
        attempts_left -= 1
        if attempts_left < 0:
            raise ValueError(f"task {task!r} has fewer than {count} different prompts")
        prompt, answer = draw(rng)
        if is_held_out(prompt) == held_out:
            records.setdefault(prompt, {"prompt": prompt, "response": answer + END, "task": task})
    return list(records.values())
