"""Numbers as people read them."""

from __future__ import annotations


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


def counted(count: float, noun: str) -> str:
    """A whole number with its noun."""
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def readable_duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
