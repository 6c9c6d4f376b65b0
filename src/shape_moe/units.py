"""Numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, floor, isnan, log10

NONE = "\N{EN DASH}"
"""Stands in tables where there is no number."""


def readable_size(size: float) -> str:
    """Bytes in the largest binary unit that keeps the number above one."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def size_unit(largest: float) -> tuple[str, float]:
    """The unit for several sizes of weights side by side, by the largest of them, and its bytes."""
    return ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """A whole number with its noun."""
    return f"{count:,.0f} {noun if count == 1 else plural or f'{noun}s'}"


def capitalised(text: str) -> str:
    """The text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def joined(parts: Sequence[str], word: str = "and") -> str:
    """Parts of a sentence: ``a``, ``a and b``, ``a, b and c``; or with another word before the last."""
    *first, last = parts
    return f"{', '.join(first)} {word} {last}" if first else last


def readable_duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def readable_share(share: float) -> str:
    """A share in percent, with the digits that mean something: never more than a tenth, and no minus before a zero."""
    percent = abs(share) * 100
    sign = "-" if share < 0 else ""
    if percent == 0:
        return "0 %"
    if percent < 0.1:
        return "> -0.1 %" if sign else "< 0.1 %"
    if 99.9 < percent < 100:
        return "< -99.9 %" if sign else "> 99.9 %"
    shown = f"{percent:.1f}" if percent < 9.95 or 99 < percent < 100 else f"{percent:.0f}"
    return f"{sign}{shown.removesuffix('.0')} %"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent to fixed digits, for columns and captions of figures; a dash where there is none."""
    return NONE if share is None or isnan(share) else f"{100 * share:z.{digits}f}\N{NO-BREAK SPACE}%"


def readable_points(difference: float) -> str:
    """A difference of shares in percentage points with its sign, to the digits of :func:`readable_share`."""
    shown = readable_share(difference).removesuffix(" %")
    return re.sub(r"(?=\d)", "+", shown, count=1) if difference > 0 else shown


def named_share(share: float) -> str:
    """A share that somebody named, such as a keep rate, in percent to four digits: ``62.5 %`` stays that."""
    return f"{100 * share:.4g} %"


def share_as_option(share: float) -> str:
    """A share as options take it, ``60%``; :func:`share_from` reads it."""
    return f"{100 * share:.4g}%"


def share_from(text: str) -> float | None:
    """The share that a text names, ``60%`` or ``0.6``; None where it names none."""
    match = re.fullmatch(r"\s*(-?\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    return None if match is None else float(match[1]) / (100 if match[2] else 1)


def share_at_most(share: float) -> str:
    """A bound in percent, rounded up to what :func:`readable_share` shows, so that it still holds."""
    step = 0.001 if share < 0.1 else 0.01
    return readable_share(min(1.0, ceil(share / step - 1e-9) * step))


def readable_kl(nats: float) -> str:
    """A divergence in nats to two digits; below a thousandth only that."""
    return "< 0.001" if nats < 0.001 else f"{nats:.2g}" if nats < 10 else f"{nats:.0f}"


def kl_at_most(nats: float) -> str:
    """A bound on a divergence in nats, rounded up to two digits, so that it still holds."""
    if nats < 0.001:
        return "0.001"
    step = 10.0 ** (floor(log10(nats)) - 1)
    return readable_kl(ceil(nats / step * (1 - 1e-12)) * step)


def kl_at_least(nats: float) -> str:
    """A divergence in nats of which only a lower bound is known, rounded down so that it still holds."""
    if nats < 0.001:
        return "at least 0"
    step = 10.0 ** (floor(log10(nats)) - 1)
    return f"at least {floor(nats / step * (1 + 1e-12)) * step:.2g}"
